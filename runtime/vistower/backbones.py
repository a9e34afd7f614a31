"""The checkpoints vistower knows by name, as data: adding a backbone is adding one record.

Architecture numbers come from the released configurations: for CLIP the ``vision_config`` of the
``config.json`` in OpenAI's four ViT repositories, for DINOv3 ``get_dinov3_config`` of
``src/transformers/models/dinov3_vit/convert_dinov3_vit_to_hf.py`` in transformers, the script
that made the released files. Picture statistics are those of each family's own preprocessing.
That DINOv3's Q and V biases are all zero is stated in timm's cards of the converted weights.

A checkpoint that is not listed here can be exported all the same: its own ``config.json`` decides.
This table serves names, metadata before anything is loaded, and random-weight checkpoints.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from vistower.errors import UnsupportedArchitectureError

Family = Literal["clip_vision_model", "dinov3_vit"]
RGB = tuple[float, float, float]

OPENAI_CLIP_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD: RGB = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
# Satellite pictures have statistics of their own: "make_transform" for SAT-493M in the README of
# facebookresearch/dinov3.
SAT493M_MEAN: RGB = (0.430, 0.411, 0.296)
SAT493M_STD: RGB = (0.213, 0.156, 0.143)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """One released vision tower: its names, its architecture and its picture statistics.

    Field names are those of ``CLIPVisionConfig`` and ``DINOv3ViTConfig`` in transformers.

    Attributes:
        hub_id: ``owner/name`` on the model hub.
        aliases: other names it is looked up by.
        family: ``model_type`` of its vision tower.
        image_size: input height and width, pixels.
        patch_size: height and width of a patch, pixels.
        num_register_tokens: tokens between CLS and the first patch.
        projection_dim: width of CLIP's shared space (not part of the tower); 0 for DINOv3.
        use_gated_mlp: SwiGLU, with gate, up and down matrices, in place of up and down.
        query_bias, key_bias, value_bias: whether the projection has a bias vector at all.
        zero_qkv_bias: whether the released Q, K and V biases, where present, are all zeros.
        rope_theta: base of the rotary periods; 0 where positions are learned embeddings.
        image_mean, image_std: of RGB values scaled to [0, 1].
    """

    hub_id: str
    family: Family
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    image_mean: RGB
    image_std: RGB
    aliases: tuple[str, ...] = ()
    image_size: int = 224
    num_register_tokens: int = 0
    projection_dim: int = 0
    use_gated_mlp: bool = False
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    zero_qkv_bias: bool = False
    layer_norm_eps: float = 1e-5
    rope_theta: float = 0.0

    @property
    def name(self) -> str:
        """Last component of the hub id, e.g. ``clip-vit-base-patch32``."""
        return self.hub_id.rpartition("/")[2]

    @property
    def num_patches(self) -> int:
        """Patch tokens of one picture: (image_size / patch_size)²."""
        return (self.image_size // self.patch_size) ** 2


def _clip(
    name: str,
    *,
    patch_size: int,
    image_size: int = 224,
    hidden_size: int,
    num_hidden_layers: int,
    projection_dim: int,
) -> Backbone:
    return Backbone(
        hub_id=f"openai/{name}",
        family="clip_vision_model",
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 64,
        hidden_act="quick_gelu",
        projection_dim=projection_dim,
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )


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
        family="dinov3_vit",
        patch_size=16,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        # The gated towers are SwiGLU, whose gate is SiLU.
        hidden_act="silu" if gated else "gelu",
        num_register_tokens=4,
        use_gated_mlp=gated,
        query_bias=qv_bias,
        key_bias=False,
        value_bias=qv_bias,
        zero_qkv_bias=True,
        rope_theta=100.0,
        image_mean=SAT493M_MEAN if satellite else IMAGENET_MEAN,
        image_std=SAT493M_STD if satellite else IMAGENET_STD,
    )


_RECORDS = (
    _clip(
        "clip-vit-base-patch32",
        patch_size=32,
        hidden_size=768,
        num_hidden_layers=12,
        projection_dim=512,
    ),
    _clip(
        "clip-vit-base-patch16",
        patch_size=16,
        hidden_size=768,
        num_hidden_layers=12,
        projection_dim=512,
    ),
    _clip(
        "clip-vit-large-patch14",
        patch_size=14,
        hidden_size=1024,
        num_hidden_layers=24,
        projection_dim=768,
    ),
    _clip(
        "clip-vit-large-patch14-336",
        patch_size=14,
        image_size=336,
        hidden_size=1024,
        num_hidden_layers=24,
        projection_dim=768,
    ),
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
        aliases=("dinov3-vits16plus", "dinov3-vitsplus16", "dinov3-vitsplus16-pretrain-lvd1689m"),
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
        aliases=("dinov3-vith16plus", "dinov3-vithplus16", "dinov3-vithplus16-pretrain-lvd1689m"),
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
)


def _names(backbone: Backbone) -> Iterator[str]:
    yield backbone.name
    yield from backbone.aliases


CONFIG_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "clip_vision_model": {"hidden_size": 768, "image_size": 224, "patch_size": 32},
    "dinov3_vit": {
        "hidden_size": 384,
        "image_size": 224,
        "num_register_tokens": 0,
        "patch_size": 16,
    },
}
"""What transformers takes where a ``config.json`` of a model type is silent: CLIPVisionConfig and
DINOv3ViTConfig. (transformers leaves such values out of the configs it writes.)"""

BACKBONES: Mapping[str, Backbone] = MappingProxyType({record.name: record for record in _RECORDS})
"""Name (last component of the hub id) → record, in the order of the families' sizes."""

_BY_NAME: Mapping[str, Backbone] = MappingProxyType(
    {name: record for record in _RECORDS for name in _names(record)}
)

EMBED_MODEL_RESOLUTION: Mapping[str, tuple[int, int]] = MappingProxyType(
    {name: (record.image_size, record.patch_size) for name, record in _BY_NAME.items()}
)
"""Every name and alias → (input size, patch size), pixels."""


def find_backbone(name: str) -> Backbone:
    """Return the record of a known checkpoint.

    Args:
        name: a hub id, its last component, a path ending in that, or an alias such as
            ``dinov3-vits16`` (trailing slashes do not matter).

    Raises:
        UnsupportedArchitectureError: the name is not known; the message has the closest one.
    """
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if (found := _BY_NAME.get(last)) is not None:
        return found
    close = difflib.get_close_matches(last, _BY_NAME, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnsupportedArchitectureError(
        f"{name!r} is not a checkpoint vistower knows by name.{hint} Known names: "
        f"{', '.join(BACKBONES)}."
    )
