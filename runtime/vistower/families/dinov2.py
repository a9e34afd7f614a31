"""DINOv2's vision transformers.

Architecture numbers are those of ``get_dinov2_config`` of
``src/transformers/models/dinov2/convert_dinov2_to_hf.py`` in transformers, the script that made the
released files. Positions were learned for 518 pixels; transformers resizes them for any other size.
"""

from __future__ import annotations

from typing import Any

from vistower.families.record import Backbone, Family, GatedNames, LayerNames, Variant, VitNames

MODEL_TYPE = "dinov2"

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 384, "num_attention_heads": 6},
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "giant": {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
}
"""What the released sizes say beyond transformers' defaults."""

WEIGHTS = VitNames(
    # transformers 5 calls these otherwise, and splits the two halves of a SwiGLU.
    spellings=(
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("mlp.weights_out", "mlp.down_proj"),
    ),
    cls_token="embeddings.cls_token",
    register_tokens="embeddings.register_tokens",
    patch_embedding="embeddings.patch_embeddings.projection",
    position_embedding="embeddings.position_embeddings",
    norm_after="layernorm",
    layers="encoder.layer",
    layer=LayerNames(
        norm1="norm1",
        q="attention.attention.query",
        k="attention.attention.key",
        v="attention.attention.value",
        o="attention.output.dense",
        scale1="layer_scale1.lambda1",
        norm2="norm2",
        up="mlp.fc1",
        down="mlp.fc2",
        gated=GatedNames(
            flag="use_swiglu_ffn",
            gate="mlp.gate_proj",
            up="mlp.up_proj",
            down="mlp.weights_out",
            fused="mlp.weights_in",
            activation="silu",
        ),
        scale2="layer_scale2.lambda1",
    ),
)


def backbone(hub_id: str, model_type: str, config: dict[str, Any]) -> Backbone:
    """A released tower, with the processor that all of them have."""
    return Backbone(
        hub_id=hub_id,
        family=model_type,
        patch_size=14,
        config={"image_size": 518, "patch_size": 14, **config},
        processor={
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "size": {"shortest_edge": 256},
            "resample": 3,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    )


FAMILY = Family(
    model_type=MODEL_TYPE,
    config_class="Dinov2Config",
    variants=(Variant(hf_class="Dinov2Model"),),
    config_defaults={"hidden_size": 768, "image_size": 224, "patch_size": 14},
    positions="interpolated",
    weights=WEIGHTS,
    backbones=tuple(
        backbone(f"facebook/dinov2-{size}", MODEL_TYPE, config) for size, config in SIZES.items()
    ),
)
