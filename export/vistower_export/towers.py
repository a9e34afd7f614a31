"""One checkpoint's architecture, read from its ``config.json`` by the record of its family."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vistower.errors import UnsupportedArchitectureError
from vistower.families import GROUP, Family, find_family, known_types
from vistower.families.record import VitNames
from vistower.tokens import TokenLayout

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
"""``hidden_act`` of a config → the activation the graph writer emits."""


@dataclass(frozen=True)
class TowerConfig:
    """The architecture of a vision transformer.

    ``image_size`` is (height, width) in pixels, ``patch_size`` in pixels.
    """

    family: Family
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
    def names(self) -> VitNames:
        """Where the weights are."""
        assert self.family.weights is not None  # noqa: S101  (`tower_config` has looked)
        return self.family.weights

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
            num_cls_tokens=int(self.family.has_cls),
        )

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and register tokens that come before the patch tokens."""
        return self.layout.num_prefix_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        return self.layout.grid


def exporter(family: Family) -> Any:
    """The module that reads, arranges and writes the towers of a family."""
    return importlib.import_module(family.exporter or "vistower_export.vit")


def pair(value: Any, name: str) -> tuple[int, int]:
    """Height and width of what a config gives as one number or two.

    Raises:
        UnsupportedArchitectureError: it is neither.
    """
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return int(value[0]), int(value[1])
    raise UnsupportedArchitectureError(
        f"config.json says {name}={value!r}; an integer or a pair of integers was expected."
    )


def family_of(config: Mapping[str, Any]) -> Family:
    """Find the family of a parsed ``config.json``.

    Raises:
        UnsupportedArchitectureError: its ``model_type`` belongs to no family.
        BundleUnsupportedError: the distribution that brings its family is broken.
    """
    model_type = config.get("model_type")
    family = find_family(str(model_type))
    if family is not None:
        return family
    raise UnsupportedArchitectureError(
        f"The checkpoint's config.json says model_type={model_type!r}, which has no tower here. "
        f"Known: {', '.join(known_types())}. Another family is one record, see docs/families.md; a "
        f"distribution brings one by an entry point {model_type!r} in the group {GROUP}."
    )


def native_size(family: Family, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) in pixels that the position embedding was learned for; None without one."""
    if family.positions not in ("learned", "interpolated"):
        return None
    return pair(config["image_size"], "image_size")


def square_patch(family: Family, config: Mapping[str, Any], image_size: tuple[int, int]) -> int:
    """Pixels of a patch's side.

    Patches tile the pictures, but for the size a tower was made for: there transformers leaves
    what is over at the right and at the bottom out.

    Raises:
        UnsupportedArchitectureError: they do not, are not square, or the pictures are not RGB.
    """
    height, width = pair(family.stride or config["patch_size"], "patch_size")
    if height != width:
        raise UnsupportedArchitectureError(
            f"config.json says patch_size={config['patch_size']!r}; only square patches are known."
        )
    tiled = not (image_size[0] % height or image_size[1] % width)
    made_for = min(image_size) >= height and native_size(family, config) == image_size
    if min(image_size) <= 0 or not (tiled or made_for):
        raise UnsupportedArchitectureError(
            f"Pictures of {image_size[0]}x{image_size[1]} pixels were asked for (by --resolution "
            f"or the processor), which is no multiple of the patch size {height}."
        )
    if config.get("num_channels", 3) != 3:
        raise UnsupportedArchitectureError(
            f"config.json says num_channels={config['num_channels']}; only 3 (RGB) is known."
        )
    return height


def activation(name: Any) -> Activation:
    """The activation of a config's ``hidden_act``.

    Raises:
        UnsupportedArchitectureError: it is not reproduced.
    """
    found = ACTIVATIONS.get(name)
    if found is None:
        raise UnsupportedArchitectureError(
            f"config.json says hidden_act={name!r}; known: {', '.join(ACTIVATIONS)}."
        )
    return found


def tower_config(
    family: Family, config: Mapping[str, Any], image_size: tuple[int, int]
) -> TowerConfig:
    """Read the architecture off a vision ``config.json`` (of the vision tower itself).

    Args:
        family: of the tower, a vision transformer.
        config: the vision config with every default filled in (``PretrainedConfig.to_dict()``).
        image_size: (height, width) in pixels of the graphs to be written.

    Raises:
        UnsupportedArchitectureError: an option that changes the numbers is not reproduced.
    """
    if family.weights is None:
        raise UnsupportedArchitectureError(
            f"The family {family.model_type} names no weights of a vision transformer."
        )
    gated = family.weights.layer.gated
    is_gated = gated is not None and bool(config.get(gated.flag, False))
    own = gated.activation if gated is not None and is_gated else None
    if family.pooler == "dense" and config.get("pooler_act", "tanh") != "tanh":
        raise UnsupportedArchitectureError(
            f"config.json says pooler_act={config['pooler_act']!r}; only tanh is known."
        )
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UnsupportedArchitectureError(
            f"config.json says hidden_size={config['hidden_size']} and "
            f"num_attention_heads={config['num_attention_heads']}; heads of one width are known."
        )
    return TowerConfig(
        family=family,
        image_size=image_size,
        patch_size=square_patch(family, config, image_size),
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_register_tokens=config.get("num_register_tokens", 0) if family.has_registers else 0,
        layer_norm_eps=config["layer_norm_eps"],
        activation=activation(own or config["hidden_act"]),
        gated_mlp=is_gated,
    )
