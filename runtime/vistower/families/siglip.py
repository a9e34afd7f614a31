"""SigLIP's vision transformer, and SigLIP 2's of a fixed resolution, which is the same class.

There is no CLS token; ``pooler_output`` is the attention pooling head's. Architecture numbers are
those of ``get_siglip_config`` of ``src/transformers/models/siglip/convert_siglip_to_hf.py`` and
``get_siglip2_config`` of ``src/transformers/models/siglip2/convert_siglip2_to_hf.py`` in
transformers. (SigLIP 2's NaFlex checkpoints have a model type of their own, ``siglip2``.)
"""

from __future__ import annotations

from typing import Any

from vistower.families.record import Backbone, Family, LayerNames, Variant, VitNames

MODEL_TYPE = "siglip_vision_model"

_WIDTHS: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "so400m": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    },
    "giant-opt": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
    },
}

_RELEASED: tuple[tuple[str, str, int, int], ...] = (
    ("siglip-base-patch16-224", "base", 16, 224),
    ("siglip-base-patch16-256", "base", 16, 256),
    ("siglip-base-patch16-384", "base", 16, 384),
    ("siglip-base-patch16-512", "base", 16, 512),
    ("siglip-large-patch16-256", "large", 16, 256),
    ("siglip-large-patch16-384", "large", 16, 384),
    ("siglip-so400m-patch14-224", "so400m", 14, 224),
    ("siglip-so400m-patch14-384", "so400m", 14, 384),
    ("siglip2-base-patch16-224", "base", 16, 224),
    ("siglip2-base-patch16-256", "base", 16, 256),
    ("siglip2-base-patch16-384", "base", 16, 384),
    ("siglip2-base-patch16-512", "base", 16, 512),
    ("siglip2-base-patch32-256", "base", 32, 256),
    ("siglip2-large-patch16-256", "large", 16, 256),
    ("siglip2-large-patch16-384", "large", 16, 384),
    ("siglip2-large-patch16-512", "large", 16, 512),
    ("siglip2-so400m-patch14-224", "so400m", 14, 224),
    ("siglip2-so400m-patch14-384", "so400m", 14, 384),
    ("siglip2-so400m-patch16-256", "so400m", 16, 256),
    ("siglip2-so400m-patch16-384", "so400m", 16, 384),
    ("siglip2-so400m-patch16-512", "so400m", 16, 512),
    ("siglip2-giant-opt-patch16-256", "giant-opt", 16, 256),
    ("siglip2-giant-opt-patch16-384", "giant-opt", 16, 384),
)
"""Name, width, pixels of a patch's side and of a picture's."""


def _siglip(name: str, width: str, patch_size: int, image_size: int) -> Backbone:
    # SigLIP 2's files say null, with which transformers converts nothing.
    own = {"do_convert_rgb": None, "resample": 2} if name.startswith("siglip2") else {"resample": 3}
    return Backbone(
        hub_id=f"google/{name}",
        family=MODEL_TYPE,
        patch_size=patch_size,
        config={"image_size": image_size, "patch_size": patch_size, **_WIDTHS[width]},
        processor={
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": image_size, "width": image_size},
            **own,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )


FAMILY = Family(
    model_type=MODEL_TYPE,
    config_class="SiglipVisionConfig",
    variants=(Variant(hf_class="SiglipVisionModel"),),
    accepts=("siglip",),
    config_defaults={"hidden_size": 768, "image_size": 224, "patch_size": 16},
    positions="learned",
    has_cls=False,
    pooler="attention",
    has_text=True,
    weights=VitNames(
        prefix="vision_model.",
        patch_embedding="embeddings.patch_embedding",
        position_embedding="embeddings.position_embedding.weight",
        norm_after="post_layernorm",
        pooler="head",
        layers="encoder.layers",
        layer=LayerNames(
            norm1="layer_norm1",
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.out_proj",
            norm2="layer_norm2",
            up="mlp.fc1",
            down="mlp.fc2",
        ),
    ),
    backbones=tuple(_siglip(*released) for released in _RELEASED),
)
