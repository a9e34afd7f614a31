"""``config.json`` and ``preprocessor_config.json`` of a bundle: checked, and compared with it.

Both are transformers' files and hold more than is read here, so their rules are open: a key that
is there must be right, and one that is missing is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from vistower.backbones import CONFIG_DEFAULTS, Family
from vistower.bundle.manifest import MANIFEST_FILE
from vistower.bundle.reading import read_json
from vistower.errors import BundleCorruptError, BundleUnsupportedError, ProcessorConfigError
from vistower.preprocess.processor import Preprocessor
from vistower.schema import Either, ListOf, Maybe, Record, Rule, SchemaError, Text, Whole
from vistower.tokens import TokenLayout

_SIDE = Whole(1, 1 << 14)
_SIDES = Either(_SIDE, ListOf(_SIDE, 2, 2))

_ONE_SIZE = ("clip_vision_model",)
"""Model types whose position embedding is learned for one size."""

_TOWER: Mapping[str, Rule] = {
    "model_type": Text(longest=64),
    "hidden_size": Whole(1, 1 << 16),
    "patch_size": _SIDES,
    "image_size": _SIDES,
    "num_register_tokens": Whole(0, 4096),
}

CONFIG = Record({**_TOWER, "vision_config": Maybe(Record(_TOWER, open=True))}, open=True)
"""What is read of ``config.json``."""


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json`` that keeps its rule.

    Raises:
        BundleCorruptError: it does not, or cannot be read.
    """
    config = read_json(path)
    try:
        CONFIG.check(config, "")
    except SchemaError as error:
        raise BundleCorruptError(
            f"{path}: {error}. Correct it, or export the bundle again."
        ) from error
    return config


def tower_part(config: dict[str, Any]) -> dict[str, Any]:
    """The vision tower's part of a ``config.json``, with the defaults it leaves out."""
    vision = config.get("vision_config")
    if isinstance(vision, dict):
        known = {"model_type": "clip_vision_model"} if config.get("model_type") == "clip" else {}
        config = known | vision
    return {**CONFIG_DEFAULTS.get(str(config.get("model_type")), {}), **config}


def layout_of(path: Path, config: Mapping[str, Any], image_size: tuple[int, int]) -> TokenLayout:
    """The token layout that a tower's config describes, for a bundle without a manifest.

    Raises:
        BundleUnsupportedError: of an unknown model type.
        BundleCorruptError: it contradicts the processor's picture size.
    """
    if config.get("model_type") not in get_args(Family):
        raise BundleUnsupportedError(
            f"{path} says model_type={config.get('model_type')!r}; without a {MANIFEST_FILE} only "
            f"{' and '.join(get_args(Family))} are understood."
        )
    height, width = sides(config["patch_size"])
    if height != width:
        raise BundleUnsupportedError(f"{path}: patches of {height}x{width} pixels are not known.")
    layout = TokenLayout(
        image_size=image_size,
        patch_size=height,
        num_register_tokens=config.get("num_register_tokens", 0),
        hidden_size=config["hidden_size"],
    )
    native = config.get("image_size", image_size)
    if config["model_type"] in _ONE_SIZE and sides(native) != image_size:
        raise BundleCorruptError(
            f"{path} says image_size={native!r}, but the processor beside it gives pictures of "
            f"{image_size[0]}x{image_size[1]}."
        )
    return layout


def check_config(
    path: Path, config: Mapping[str, Any], model_type: str, layout: TokenLayout
) -> None:
    """Compare a tower's config with a manifest.

    Raises:
        BundleCorruptError: naming what the two say.
    """
    manifest: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": layout.hidden_size,
        "patch_size": [layout.patch_size, layout.patch_size],
        "num_register_tokens": layout.num_register_tokens,
    }
    if model_type in _ONE_SIZE:
        manifest["image_size"] = list(layout.image_size)
    for key, value in manifest.items():
        said = config.get(key, value)
        if said != value and [said, said] != value:
            raise BundleCorruptError(
                f"{path} says {key}={said!r}, but {path.with_name(MANIFEST_FILE)} says {value!r}. "
                f"One of them was edited: export the bundle again."
            )


def check_processor(path: Path, preprocessor: Preprocessor, image_size: tuple[int, int]) -> None:
    """Compare the size of the processor's pictures with a manifest.

    Raises:
        BundleCorruptError: they differ, or the processor's depends on the picture.
    """
    try:
        size = preprocessor.output_size
    except ProcessorConfigError as error:
        raise BundleCorruptError(f"{path}: {error}") from error
    if size != image_size:
        raise BundleCorruptError(
            f"{path} gives pictures of {size[0]}x{size[1]} pixels, but "
            f"{path.with_name(MANIFEST_FILE)} says {image_size[0]}x{image_size[1]}. One of them "
            f"was edited: export the bundle again."
        )


def sides(value: int | list[int]) -> tuple[int, int]:
    """Height and width of what a config gives as one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
