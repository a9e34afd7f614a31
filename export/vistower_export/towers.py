"""The vision towers the exporter knows, as data: add a family by adding one record to `TOWERS`.

A `TowerFamily` says which Hugging Face class computes the reference numbers, where that class
keeps its weights, and how its ``config.json`` spells the architecture. Everything else (graphs,
parity, bundle) is derived from the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vistower.errors import UnsupportedArchitectureError
from vistower.tokens import TokenLayout
from vistower.tolerance import GraphPrecision

Activation = Literal["gelu", "quick_gelu", "silu"]

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
"""``hidden_act`` of a config → the activation the graph writer emits."""


@dataclass(frozen=True)
class LayerNames:
    """Where one encoder layer keeps its weights, relative to the layer; modules without suffix."""

    norm1: str
    q: str
    k: str
    v: str
    o: str
    norm2: str
    up: str
    down: str
    gate: str | None = None
    scale1: str | None = None
    scale2: str | None = None


@dataclass(frozen=True)
class TowerFamily:
    """A family of vision towers that share one Hugging Face class.

    Weight names are those of the class's state dict with any of ``strip_prefixes`` removed
    (transformers 4 and 5 nest the same modules differently). ``refused_precisions`` maps a
    precision the tower cannot be had in to the reason.
    """

    model_type: str
    hf_class: str
    accepts: tuple[str, ...]
    strip_prefixes: tuple[str, ...]
    cls_token: str
    patch_embedding: str
    layers: str
    layer: LayerNames
    register_tokens: str | None = None
    position_embedding: str | None = None
    rotary_module: str | None = None
    norm_before: str | None = None
    norm_after: str | None = None
    pooler_norm: str | None = None
    refused_precisions: Mapping[GraphPrecision, str] = field(default_factory=dict)


CLIP = TowerFamily(
    model_type="clip_vision_model",
    hf_class="CLIPVisionModel",
    accepts=("clip_vision_model", "clip"),
    strip_prefixes=("vision_model.",),
    cls_token="embeddings.class_embedding",
    patch_embedding="embeddings.patch_embedding",
    position_embedding="embeddings.position_embedding.weight",
    norm_before="pre_layrnorm",
    pooler_norm="post_layernorm",
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
)

DINOV3 = TowerFamily(
    model_type="dinov3_vit",
    hf_class="DINOv3ViTModel",
    accepts=("dinov3_vit",),
    strip_prefixes=("model.",),
    cls_token="embeddings.cls_token",
    register_tokens="embeddings.register_tokens",
    patch_embedding="embeddings.patch_embeddings",
    rotary_module="rope_embeddings",
    norm_after="norm",
    refused_precisions={
        "fp16": "its authors rule float16 out, because activations leave its range; use bf16"
    },
    layers="layer",
    layer=LayerNames(
        norm1="norm1",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        o="attention.o_proj",
        scale1="layer_scale1.lambda1",
        norm2="norm2",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        scale2="layer_scale2.lambda1",
    ),
)

TOWERS: tuple[TowerFamily, ...] = (CLIP, DINOV3)


@dataclass(frozen=True)
class TowerConfig:
    """One checkpoint's architecture, read from its ``config.json``.

    ``image_size`` is (height, width) in pixels, ``patch_size`` in pixels.
    """

    family: TowerFamily
    image_size: tuple[int, int]
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_register_tokens: int
    layer_norm_eps: float
    activation: Activation
    gated_mlp: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layout(self) -> TokenLayout:
        """Where its tokens lie in ``last_hidden_state``."""
        return TokenLayout(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_register_tokens=self.num_register_tokens,
            hidden_size=self.hidden_size,
        )

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and register tokens that come before the patch tokens."""
        return self.layout.num_prefix_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        return self.layout.grid


def _square(value: Any, name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return int(value[0]), int(value[1])
    raise UnsupportedArchitectureError(
        f"config.json says {name}={value!r}; an integer or a pair of integers was expected."
    )


def family_of(config: Mapping[str, Any]) -> TowerFamily:
    """Find the family of a parsed ``config.json``.

    Raises:
        UnsupportedArchitectureError: its ``model_type`` belongs to no family in `TOWERS`.
    """
    model_type = config.get("model_type")
    for family in TOWERS:
        if model_type in family.accepts:
            return family
    known = ", ".join(name for family in TOWERS for name in family.accepts)
    raise UnsupportedArchitectureError(
        f"The checkpoint's config.json says model_type={model_type!r}, which has no tower here. "
        f"Known model types: {known}. A new family is one record in vistower_export/towers.py."
    )


def tower_config(config: Mapping[str, Any], image_size: tuple[int, int]) -> TowerConfig:
    """Read the architecture off a vision ``config.json`` (of the vision tower itself).

    Args:
        config: the vision config with every default filled in (``PretrainedConfig.to_dict()``).
        image_size: (height, width) in pixels of the graphs to be written.

    Raises:
        UnsupportedArchitectureError: an option that changes the numbers is not reproduced.
    """
    family = family_of(config)
    patch_height, patch_width = _square(config["patch_size"], "patch_size")
    if patch_height != patch_width:
        raise UnsupportedArchitectureError(
            f"config.json says patch_size={config['patch_size']!r}; only square patches are known."
        )
    if min(image_size) <= 0 or image_size[0] % patch_height or image_size[1] % patch_width:
        raise UnsupportedArchitectureError(
            f"Pictures of {image_size[0]}x{image_size[1]} pixels were asked for (by --resolution "
            f"or the processor), which is no multiple of the patch size {patch_height}."
        )
    native = _square(config["image_size"], "image_size")
    if family.position_embedding and image_size != native:
        raise UnsupportedArchitectureError(
            f"The processor produces {image_size[0]}×{image_size[1]} pixels, but this tower's "
            f"position embedding is for {native[0]}×{native[1]}: torch refuses it too. "
            f"Correct crop_size in preprocessor_config.json."
        )
    activation = ACTIVATIONS.get(config["hidden_act"])
    if activation is None:
        raise UnsupportedArchitectureError(
            f"config.json says hidden_act={config['hidden_act']!r}; known: "
            f"{', '.join(ACTIVATIONS)}."
        )
    if config.get("num_channels", 3) != 3:
        raise UnsupportedArchitectureError(
            f"config.json says num_channels={config['num_channels']}; only 3 (RGB) is known."
        )
    return TowerConfig(
        family=family,
        image_size=image_size,
        patch_size=patch_height,
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_register_tokens=config.get("num_register_tokens", 0),
        layer_norm_eps=config["layer_norm_eps"],
        activation=activation,
        gated_mlp=bool(config.get("use_gated_mlp", False)),
    )
