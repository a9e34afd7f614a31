"""What a family of vision towers is: one record, read by the runtime and by the exporter.

Everything here is data and needs neither torch nor ONNX. A family whose towers are plain vision
transformers is its record and nothing else, see docs/families.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vistower.tolerance import GraphPrecision

RGB = tuple[float, float, float]

LAST_HIDDEN_STATE = "last_hidden_state"
POOLER_OUTPUT = "pooler_output"
IMAGE_EMBEDS = "image_embeds"

OUTPUTS: Mapping[str, str] = {
    LAST_HIDDEN_STATE: "tokens (B, T, D)",
    POOLER_OUTPUT: "pooled (B, D)",
    IMAGE_EMBEDS: "projected (B, P)",
}
"""The outputs a graph can have, by transformers' names, and what they are. All but the first hold
one vector a picture."""

Positions = Literal["learned", "interpolated", "rotary", "none"]
"""How a tower knows where a patch lies.

``learned``: a table for one size; transformers resizes it only where ``interpolate_pos_encoding``
is asked for. ``interpolated``: a table that transformers resizes by itself. ``rotary``: computed
for any size. ``none``: it is in the tower's convolutions.
"""

Pooler = Literal["first", "norm", "dense", "attention"]
"""What makes ``pooler_output`` of the tokens: the first token as it is, normed, through a dense
layer and tanh, or an attention pooling head (MAP)."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """One released vision tower: its names, its architecture and its processor.

    Attributes:
        hub_id: ``owner/name`` on the model hub.
        family: ``model_type`` of its vision tower.
        config: what its ``config.json`` says beyond the defaults of transformers' class.
        processor: its ``preprocessor_config.json``.
        aliases: other names it is looked up by.
        patch_size: height and width of a patch, pixels; of ConvNeXt, the stride.
        zero_qkv_bias: whether the released Q, K and V biases, where present, are all zeros.
    """

    hub_id: str
    family: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    patch_size: int
    aliases: tuple[str, ...] = ()
    zero_qkv_bias: bool = False

    @property
    def name(self) -> str:
        """Last component of the hub id, e.g. ``clip-vit-base-patch32``."""
        return self.hub_id.rpartition("/")[2]

    @property
    def image_size(self) -> int:
        """Height and width of the processor's pictures, pixels."""
        size = self.processor.get("crop_size") or self.processor["size"]
        return int(size.get("height") or size["shortest_edge"])

    @property
    def num_patches(self) -> int:
        """Patch tokens of one picture: (image_size / patch_size)²."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class GatedNames:
    """Weights of a SwiGLU: ``down(act(gate(x)) * up(x))``.

    ``fused`` holds gate and up in one matrix, one after the other, where a release of transformers
    has them so. ``activation`` is that of the gate; None for the config's.
    """

    flag: str
    gate: str
    up: str
    down: str
    fused: str | None = None
    activation: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Where one encoder layer keeps its weights, relative to the layer; modules without suffix.

    ``gated`` are those in place of ``up`` and ``down`` where the config's flag is set. ``scale1``
    and ``scale2`` are LayerScale.
    """

    norm1: str
    q: str
    k: str
    v: str
    o: str
    norm2: str
    up: str
    down: str
    gated: GatedNames | None = None
    scale1: str | None = None
    scale2: str | None = None


@dataclass(frozen=True, kw_only=True)
class VitNames:
    """Where a vision transformer keeps its weights, by the names of the released files.

    Attributes:
        prefix: what stands before every name in the released files, but for ``unprefixed``.
        spellings: (released, other): parts of names that a release of transformers writes
            otherwise.
        pooler: of the norm, the dense layer or the attention head, see `Pooler`.
        projection: of ``image_embeds``.
    """

    patch_embedding: str
    layers: str
    layer: LayerNames
    prefix: str = ""
    unprefixed: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    cls_token: str | None = None
    register_tokens: str | None = None
    position_embedding: str | None = None
    rotary_module: str | None = None
    norm_before: str | None = None
    norm_after: str | None = None
    pooler: str | None = None
    projection: str | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A transformers class that loads a checkpoint of the family, tried in the order given.

    ``needs`` are starts of the names of weights, without which the next one is tried. ``tower`` is
    the module whose output has ``pooler_output``, where that of the class has not.
    """

    hf_class: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    tower: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of vision towers.

    Attributes:
        model_type: ``model_type`` of the tower's config.
        config_class: transformers' class of that config.
        variants: the classes that compute the reference.
        accepts: model types of configs that hold such a tower as their ``vision_config``.
        config_defaults: what transformers takes where a ``config.json`` is silent.
        has_cls: whether the first token stands for the picture.
        has_registers: whether there can be register tokens behind it.
        stride: pixels of a patch's side where the config has no ``patch_size``.
        stem: pixels of a side of the first convolution, where that is not the patch's.
        width_key: of the config, the hidden size or a list that ends with it.
        pooler: what ``pooler_output`` is; None where there is none.
        positions: see `Positions`.
        has_text: whether it comes with a text tower, and so with a processor of both.
        auto_on_gpu: the precision ``auto`` takes on a GPU; None for fp32.
        refused_precisions: a precision the tower cannot be had in → the reason.
        weights: names of a vision transformer's weights; None where ``exporter`` knows them.
        exporter: a module that reads and writes such a tower, in place of the transformer's.
        backbones: the released towers.
    """

    model_type: str
    config_class: str
    variants: tuple[Variant, ...]
    config_defaults: Mapping[str, Any]
    positions: Positions
    accepts: tuple[str, ...] = ()
    has_cls: bool = True
    has_registers: bool = False
    stride: int | None = None
    stem: int | None = None
    width_key: str = "hidden_size"
    pooler: Pooler | None = "first"
    has_text: bool = False
    auto_on_gpu: GraphPrecision | None = None
    refused_precisions: Mapping[GraphPrecision, str] = field(default_factory=dict)
    weights: VitNames | None = None
    exporter: str | None = None
    backbones: tuple[Backbone, ...] = ()

    @property
    def hf_class(self) -> str:
        """The plain class of the tower."""
        return self.variants[-1].hf_class

    def hidden_size(self, config: Mapping[str, Any]) -> int:
        """Width of a token."""
        width = config[self.width_key]
        return int(width[-1] if isinstance(width, (list, tuple)) else width)

    def kernel(self, config: Mapping[str, Any], patch_size: int) -> tuple[int, int]:
        """Pixels of a side, and outputs, of the first product that the pixels enter."""
        width = config[self.width_key]
        first = width[0] if isinstance(width, (list, tuple)) else width
        return self.stem or patch_size, int(first)
