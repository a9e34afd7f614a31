"""The plain vision transformer, ``ViTModel``: DINO's first version and many classifiers' trunks.

Checkpoints saved without the pooler's weights, as DINO's, have no ``pooler_output``. Sizes of
facebook's DINO: the README of facebookresearch/dino; of google's: the ViT paper, table 1.
"""

from __future__ import annotations

from typing import Any

from vistower.families.record import Backbone, Family, LayerNames, Variant, VitNames

MODEL_TYPE = "vit"

_SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def _vit(hub_id: str, patch_size: int, config: dict[str, Any], mean: list[float]) -> Backbone:
    dino = hub_id.startswith("facebook/")
    return Backbone(
        hub_id=hub_id,
        family=MODEL_TYPE,
        patch_size=patch_size,
        config={"patch_size": patch_size, **config},
        processor={
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 224, "width": 224},
            "resample": 2,
            "image_mean": mean,
            "image_std": [0.229, 0.224, 0.225] if dino else mean,
        },
    )


_IMAGENET, _HALF = [0.485, 0.456, 0.406], [0.5, 0.5, 0.5]

FAMILY = Family(
    model_type=MODEL_TYPE,
    config_class="ViTConfig",
    variants=(
        Variant(hf_class="ViTModel", needs=("pooler.dense.",)),
        Variant(hf_class="ViTModel", options={"add_pooling_layer": False}),
    ),
    config_defaults={"hidden_size": 768, "image_size": 224, "patch_size": 16},
    positions="learned",
    pooler="dense",
    weights=VitNames(
        # transformers 5 has fewer modules inside each other.
        spellings=(
            ("encoder.layer.", "layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ),
        cls_token="embeddings.cls_token",
        patch_embedding="embeddings.patch_embeddings.projection",
        position_embedding="embeddings.position_embeddings",
        norm_after="layernorm",
        pooler="pooler",
        layers="encoder.layer",
        layer=LayerNames(
            norm1="layernorm_before",
            q="attention.attention.query",
            k="attention.attention.key",
            v="attention.attention.value",
            o="attention.output.dense",
            norm2="layernorm_after",
            up="intermediate.dense",
            down="output.dense",
        ),
    ),
    backbones=(
        _vit("facebook/dino-vits16", 16, _SMALL, _IMAGENET),
        _vit("facebook/dino-vits8", 8, _SMALL, _IMAGENET),
        _vit("facebook/dino-vitb16", 16, {}, _IMAGENET),
        _vit("facebook/dino-vitb8", 8, {}, _IMAGENET),
        _vit("google/vit-base-patch16-224-in21k", 16, {}, _HALF),
        _vit("google/vit-large-patch16-224-in21k", 16, _LARGE, _HALF),
    ),
)
