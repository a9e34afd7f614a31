"""DINOv3's vision transformers.

Architecture numbers are those of ``get_dinov3_config`` of
``src/transformers/models/dinov3_vit/convert_dinov3_vit_to_hf.py`` in transformers, the script that
made the released files. That the Q and V biases are all zero is stated in timm's cards of the
converted weights.
"""

from __future__ import annotations

from typing import Any

from vistower.families.record import (
    RGB,
    Backbone,
    Family,
    GatedNames,
    LayerNames,
    Variant,
    VitNames,
)

MODEL_TYPE = "dinov3_vit"

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
# Satellite pictures have statistics of their own: "make_transform" for SAT-493M in the README of
# facebookresearch/dinov3.
SAT493M_MEAN: RGB = (0.430, 0.411, 0.296)
SAT493M_STD: RGB = (0.213, 0.156, 0.143)


def processor(mean: RGB = IMAGENET_MEAN, std: RGB = IMAGENET_STD) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of the released towers."""
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": True,
        "do_center_crop": None,
        "do_convert_rgb": None,
        "resample": 2,
        "size": {"height": 224, "width": 224},
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _dinov3(
    name: str,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    gated: bool = False,
    qv_bias: bool = True,
    satellite: bool = False,
    aliases: tuple[str, ...] = (),
) -> Backbone:
    return Backbone(
        hub_id=f"facebook/{name}",
        aliases=aliases,
        family=MODEL_TYPE,
        patch_size=16,
        config={
            "image_size": 224,
            "patch_size": 16,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            # The gated towers are SwiGLU, whose gate is SiLU.
            "hidden_act": "silu" if gated else "gelu",
            "layer_norm_eps": 1e-5,
            "num_register_tokens": 4,
            "use_gated_mlp": gated,
            "query_bias": qv_bias,
            "key_bias": False,
            "value_bias": qv_bias,
            "rope_theta": 100.0,
        },
        processor=processor(SAT493M_MEAN, SAT493M_STD) if satellite else processor(),
        zero_qkv_bias=True,
    )


FAMILY = Family(
    model_type=MODEL_TYPE,
    config_class="DINOv3ViTConfig",
    variants=(Variant(hf_class="DINOv3ViTModel"),),
    config_defaults={
        "hidden_size": 384,
        "image_size": 224,
        "num_register_tokens": 0,
        "patch_size": 16,
    },
    positions="rotary",
    has_registers=True,
    auto_on_gpu="bf16",
    refused_precisions={
        "fp16": "its authors rule float16 out, because activations leave its range; use bf16"
    },
    weights=VitNames(
        # transformers 5 has the layers inside a module of their own.
        spellings=(("layer.", "model.layer."),),
        cls_token="embeddings.cls_token",
        register_tokens="embeddings.register_tokens",
        patch_embedding="embeddings.patch_embeddings",
        rotary_module="rope_embeddings",
        norm_after="norm",
        layers="layer",
        layer=LayerNames(
            norm1="norm1",
            q="attention.q_proj",
            k="attention.k_proj",
            v="attention.v_proj",
            o="attention.o_proj",
            scale1="layer_scale1.lambda1",
            norm2="norm2",
            up="mlp.up_proj",
            down="mlp.down_proj",
            gated=GatedNames(
                flag="use_gated_mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"
            ),
            scale2="layer_scale2.lambda1",
        ),
    ),
    backbones=(
        _dinov3(
            "dinov3-vits16-pretrain-lvd1689m",
            aliases=("dinov3-vits16",),
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=6,
        ),
        _dinov3(
            "dinov3-vits16plus-pretrain-lvd1689m",
            aliases=(
                "dinov3-vits16plus",
                "dinov3-vitsplus16",
                "dinov3-vitsplus16-pretrain-lvd1689m",
            ),
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=6,
            gated=True,
        ),
        _dinov3(
            "dinov3-vitb16-pretrain-lvd1689m",
            aliases=("dinov3-vitb16",),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        ),
        _dinov3(
            "dinov3-vitl16-pretrain-lvd1689m",
            aliases=("dinov3-vitl16",),
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
        ),
        _dinov3(
            "dinov3-vitl16-pretrain-sat493m",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            satellite=True,
        ),
        _dinov3(
            "dinov3-vith16plus-pretrain-lvd1689m",
            aliases=(
                "dinov3-vith16plus",
                "dinov3-vithplus16",
                "dinov3-vithplus16-pretrain-lvd1689m",
            ),
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            gated=True,
        ),
        _dinov3(
            "dinov3-vit7b16-pretrain-lvd1689m",
            aliases=("dinov3-vit7b16",),
            hidden_size=4096,
            intermediate_size=8192,
            num_hidden_layers=40,
            num_attention_heads=32,
            gated=True,
            qv_bias=False,
        ),
        _dinov3(
            "dinov3-vit7b16-pretrain-sat493m",
            hidden_size=4096,
            intermediate_size=8192,
            num_hidden_layers=40,
            num_attention_heads=32,
            gated=True,
            qv_bias=False,
            satellite=True,
        ),
    ),
)
