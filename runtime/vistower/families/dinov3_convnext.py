"""DINOv3's ConvNeXt towers: patches of a grid of 32 pixels, their mean in front of them.

Architecture numbers are those of ``get_dinov3_config`` of
``src/transformers/models/dinov3_convnext/convert_dinov3_convnext_to_hf.py`` in transformers.
"""

from __future__ import annotations

from vistower.families.dinov3 import processor
from vistower.families.record import Backbone, Family, Variant

MODEL_TYPE = "dinov3_convnext"

_SIZES = (
    ("tiny", [3, 3, 9, 3], [96, 192, 384, 768]),
    ("small", [3, 3, 27, 3], [96, 192, 384, 768]),
    ("base", [3, 3, 27, 3], [128, 256, 512, 1024]),
    ("large", [3, 3, 27, 3], [192, 384, 768, 1536]),
)

FAMILY = Family(
    model_type=MODEL_TYPE,
    config_class="DINOv3ConvNextConfig",
    variants=(Variant(hf_class="DINOv3ConvNextModel"),),
    config_defaults={"image_size": 224, "hidden_sizes": [96, 192, 384, 768]},
    positions="none",
    stride=32,
    stem=4,
    width_key="hidden_sizes",
    exporter="vistower_export.convnext",
    backbones=tuple(
        Backbone(
            hub_id=f"facebook/dinov3-convnext-{size}-pretrain-lvd1689m",
            aliases=(f"dinov3-convnext-{size}",),
            family=MODEL_TYPE,
            patch_size=32,
            config={"image_size": 224, "depths": depths, "hidden_sizes": widths},
            processor=processor(),
        )
        for size, depths, widths in _SIZES
    ),
)
