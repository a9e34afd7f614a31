"""``config.json`` and ``preprocessor_config.json`` of a bundle: checked, and compared with it.

Both are transformers' files and hold more than is read here, so their rules are open: a key that
is there must be right, and one that is missing is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vistower.bundle.manifest import MANIFEST_FILE
from vistower.bundle.reading import read_json
from vistower.errors import BundleCorruptError, BundleUnsupportedError, ProcessorConfigError
from vistower.families import GROUP, Family, find_family, known_types
from vistower.preprocess.processor import Preprocessor
from vistower.schema import Either, ListOf, Maybe, Record, Rule, SchemaError, Text, Whole
from vistower.tokens import TokenLayout

_SIDE = Whole(1, 1 << 14)
_SIDES = Either(_SIDE, ListOf(_SIDE, 2, 2))

_TOWER: Mapping[str, Rule] = {
    "model_type": Text(longest=64),
    "hidden_size": Whole(1, 1 << 16),
    "hidden_sizes": ListOf(Whole(1, 1 << 16), 1, 64),
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
    """The vision tower's part of a ``config.json``, with the defaults it leaves out.

    Raises:
        BundleUnsupportedError: see `find_family`.
    """
    vision = config.get("vision_config")
    if isinstance(vision, dict):
        whole = find_family(str(config.get("model_type")))
        config = ({} if whole is None else {"model_type": whole.model_type}) | vision
    family = find_family(str(config.get("model_type")))
    return {**(family.config_defaults if family is not None else {}), **config}


def family_of(path: Path, model_type: object) -> Family:
    """The family that a file says its tower is of.

    Raises:
        BundleUnsupportedError: there is none here; the message says what is missing.
    """
    family = find_family(str(model_type))
    if family is None or family.model_type != model_type:
        raise BundleUnsupportedError(
            f"{path} is of model type {model_type!r}, and no family of that name is installed. "
            f"This vistower has {', '.join(known_types())}; others come with distributions that "
            f"have an entry point {model_type!r} in the group {GROUP}. Install the one that the "
            f"bundle was made with, or the vistower that wrote it."
        )
    return family


def layout_of(
    path: Path, config: Mapping[str, Any], family: Family, image_size: tuple[int, int]
) -> TokenLayout:
    """The token layout that a tower's config describes, for a bundle without a manifest.

    Raises:
        BundleUnsupportedError: patches that are not square.
        BundleCorruptError: it contradicts the processor's picture size.
    """
    height, width = sides(family.stride or config["patch_size"])
    if height != width:
        raise BundleUnsupportedError(f"{path}: patches of {height}x{width} pixels are not known.")
    layout = TokenLayout(
        image_size=image_size,
        patch_size=height,
        num_register_tokens=config.get("num_register_tokens", 0) if family.has_registers else 0,
        hidden_size=family.hidden_size(config),
        num_cls_tokens=int(family.has_cls),
    )
    native = config.get("image_size", image_size)
    if family.positions == "learned" and sides(native) != image_size:
        raise BundleCorruptError(
            f"{path} says image_size={native!r}, but the processor beside it gives pictures of "
            f"{image_size[0]}x{image_size[1]}."
        )
    return layout


def check_config(
    path: Path,
    config: Mapping[str, Any],
    family: Family,
    layout: TokenLayout,
    native_size: tuple[int, int] | None,
) -> None:
    """Compare a tower's config with a manifest.

    Raises:
        BundleCorruptError: naming what the two say.
    """
    size = layout.hidden_size
    manifest: dict[str, tuple[Any, Any]] = {
        "model_type": (config.get("model_type", family.model_type), family.model_type),
        family.width_key: (family.hidden_size(config), size),
    }
    if family.stride is None:
        patch = (layout.patch_size, layout.patch_size)
        manifest["patch_size"] = sides(config.get("patch_size", patch)), patch
    tokens = layout.num_cls_tokens, layout.num_register_tokens if family.has_registers else 0
    if tokens != (int(family.has_cls), layout.num_register_tokens):
        raise BundleCorruptError(
            f"{path.with_name(MANIFEST_FILE)} says {layout.num_cls_tokens} CLS and "
            f"{layout.num_register_tokens} register tokens, which a {family.model_type} has not. "
            f"It was edited: export the bundle again."
        )
    if family.has_registers:
        registers = layout.num_register_tokens
        manifest["num_register_tokens"] = config.get("num_register_tokens", registers), registers
    if native_size is not None:
        manifest["image_size"] = sides(config.get("image_size", native_size)), native_size
    for key, (said, value) in manifest.items():
        if said != value:
            raise BundleCorruptError(
                f"{path} says {key}={config.get(key)!r}, but {path.with_name(MANIFEST_FILE)} says "
                f"{value!r}. One of them was edited: export the bundle again."
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


def sides(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Height and width of what a config gives as one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
