"""CLIP's vision transformer, of OpenAI and of everybody who publishes one in the same format.

Architecture numbers are the ``vision_config`` of the ``config.json`` in OpenAI's four ViT
repositories, for LAION's the ``vision_cfg`` of open_clip's ViT-B-32, ViT-H-14 and ViT-bigG-14.
"""

from __future__ import annotations

from typing import Any

from vistower.families.record import RGB, Backbone, Family, LayerNames, Variant, VitNames

MODEL_TYPE = "clip_vision_model"

OPENAI_CLIP_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD: RGB = (0.26862954, 0.26130258, 0.27577711)


def _clip(
    hub_id: str,
    *,
    patch_size: int,
    image_size: int = 224,
    hidden_size: int,
    num_hidden_layers: int,
    projection_dim: int,
    **changes: Any,
) -> Backbone:
    side = {"height": image_size, "width": image_size}
    return Backbone(
        hub_id=hub_id,
        family=MODEL_TYPE,
        patch_size=patch_size,
        config={
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": hidden_size // 64,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": projection_dim,
            **changes,
        },
        processor={
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_center_crop": True,
            "crop_size": side,
            "size": {"shortest_edge": image_size},
            "resample": 3,
            "image_mean": list(OPENAI_CLIP_MEAN),
            "image_std": list(OPENAI_CLIP_STD),
        },
    )


FAMILY = Family(
    model_type=MODEL_TYPE,
    config_class="CLIPVisionConfig",
    variants=(
        Variant(
            hf_class="CLIPVisionModelWithProjection",
            needs=("visual_projection.",),
            tower="vision_model",
        ),
        Variant(hf_class="CLIPVisionModel"),
    ),
    accepts=("clip",),
    config_defaults={
        "hidden_size": 768,
        "image_size": 224,
        "patch_size": 32,
        "projection_dim": 512,
    },
    positions="learned",
    pooler="norm",
    has_text=True,
    auto_on_gpu="fp16",
    weights=VitNames(
        prefix="vision_model.",
        unprefixed=("visual_projection.",),
        cls_token="embeddings.class_embedding",
        patch_embedding="embeddings.patch_embedding",
        position_embedding="embeddings.position_embedding.weight",
        norm_before="pre_layrnorm",
        pooler="post_layernorm",
        projection="visual_projection",
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
    backbones=(
        _clip(
            "openai/clip-vit-base-patch32",
            patch_size=32,
            hidden_size=768,
            num_hidden_layers=12,
            projection_dim=512,
        ),
        _clip(
            "openai/clip-vit-base-patch16",
            patch_size=16,
            hidden_size=768,
            num_hidden_layers=12,
            projection_dim=512,
        ),
        _clip(
            "openai/clip-vit-large-patch14",
            patch_size=14,
            hidden_size=1024,
            num_hidden_layers=24,
            projection_dim=768,
        ),
        _clip(
            "openai/clip-vit-large-patch14-336",
            patch_size=14,
            image_size=336,
            hidden_size=1024,
            num_hidden_layers=24,
            projection_dim=768,
        ),
        _clip(
            "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
            patch_size=32,
            hidden_size=768,
            num_hidden_layers=12,
            projection_dim=512,
            hidden_act="gelu",
        ),
        _clip(
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            patch_size=14,
            hidden_size=1280,
            num_hidden_layers=32,
            projection_dim=1024,
            num_attention_heads=16,
            hidden_act="gelu",
        ),
        _clip(
            "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
            patch_size=14,
            hidden_size=1664,
            num_hidden_layers=48,
            projection_dim=1280,
            intermediate_size=8192,
            num_attention_heads=16,
            hidden_act="gelu",
        ),
    ),
)
