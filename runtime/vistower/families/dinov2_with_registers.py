"""DINOv2's vision transformers with register tokens.

transformers resizes their positions with an antialias filter, those without registers without.
"""

from __future__ import annotations

from vistower.families.dinov2 import SIZES, WEIGHTS, backbone
from vistower.families.record import Family, Variant

MODEL_TYPE = "dinov2_with_registers"

FAMILY = Family(
    model_type=MODEL_TYPE,
    config_class="Dinov2WithRegistersConfig",
    variants=(Variant(hf_class="Dinov2WithRegistersModel"),),
    config_defaults={
        "hidden_size": 768,
        "image_size": 224,
        "num_register_tokens": 4,
        "patch_size": 16,
    },
    has_registers=True,
    positions="interpolated",
    weights=WEIGHTS,
    backbones=tuple(
        backbone(f"facebook/dinov2-with-registers-{size}", MODEL_TYPE, config)
        for size, config in SIZES.items()
    ),
)
