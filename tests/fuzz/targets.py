"""What is fuzzed: each target takes any bytes, and only a `VistowerError` may come out of it.

Used by tests/fuzz/run.py (coverage-guided, by atheris) and by tests/test_fuzz.py (the committed
corpus, without atheris).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vistower.bundle import Bundle
from vistower.bundle.golden_file import GoldenFile
from vistower.bundle.manifest import Manifest
from vistower.errors import VistowerError
from vistower.preprocess.encoded import open_image
from vistower.preprocess.processor import Preprocessor

CLIP = {"image_processor_type": "CLIPImageProcessor"}
DINOV3 = {"image_processor_type": "DINOv3ViTImageProcessor"}
CONFIGURED = ((CLIP, "torchvision"), (CLIP, "pil"), (DINOV3, "torchvision"))
PROCESSORS = tuple(
    Preprocessor.from_config(config, backend=backend).resized((32, 32))
    for config, backend in CONFIGURED
)

_memory = Path("/dev/shm")
_folder = Path(tempfile.mkdtemp(prefix="vistower-fuzz-", dir=_memory if _memory.is_dir() else None))


def remove_folder() -> None:
    """Delete what the targets wrote; atheris ends the process without running exit handlers."""
    shutil.rmtree(_folder, ignore_errors=True)


def picture(data: bytes) -> None:
    """An encoded picture, through the arithmetic that its number of bytes chooses."""
    try:
        image = open_image(data)
    except VistowerError:
        return
    pixel_values = PROCESSORS[len(data) % len(PROCESSORS)](image)
    if pixel_values.shape != (3, 32, 32) or not np.isfinite(pixel_values).all():
        raise AssertionError(f"{pixel_values.shape} pixels, or not finite")


def manifest(data: bytes) -> None:
    """A bundle's ``vistower.json``."""
    path = _folder / "vistower.json"
    path.write_bytes(data)
    try:
        text = Manifest.read(path).to_json()
    except VistowerError:
        return
    path.write_text(text, encoding="utf-8")
    if Manifest.read(path).to_json() != text:
        raise AssertionError("a manifest that was read is not read back as it was written")


def config(data: bytes) -> None:
    """A ``preprocessor_config.json``, then a ``config.json``, of a bundle without a manifest."""
    try:
        parsed: Any = json.loads(data)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        for backend in ("torchvision", "pil", None):
            try:
                Preprocessor.from_config(parsed, backend=backend).output_size  # noqa: B018
            except VistowerError:
                continue
    for name in _KEPT:
        bundle = _bundle_but(name)
        (bundle / name).write_bytes(data)
        try:
            loaded = Bundle.load(bundle)
            loaded.layout, loaded.preprocessor, loaded.resolutions  # noqa: B018
        except VistowerError:
            continue


def golden(data: bytes) -> None:
    """A bundle's golden vectors."""
    path = _folder / "golden.npz"
    path.write_bytes(data)
    try:
        with GoldenFile(path, GOLDEN_SHAPES) as file:
            for one in file.pictures:
                wanted = GOLDEN_SHAPES[one.resolution]
                shapes = {name: file.output(one, name).shape for name in wanted}
                if shapes != wanted or file.pixel_values(one).shape != (3, *one.resolution):
                    raise AssertionError(f"{one.name} has shapes {shapes}")
    except VistowerError:
        return


GOLDEN_SHAPES = {
    (height, width): {
        "last_hidden_state": (2 + height * width // 4, 2),
        "pooler_output": (2,),
    }
    for height, width in ((4, 4), (2, 4))
}

_KEPT: dict[str, Any] = {
    "preprocessor_config.json": DINOV3,
    "config.json": {"model_type": "dinov3_vit", "patch_size": 16, "hidden_size": 64},
}


def _bundle_but(name: str) -> Path:
    """A bundle without a manifest and without one of its two configurations."""
    bundle = _folder / name.partition(".")[0]
    if not bundle.exists():
        bundle.mkdir()
        (bundle / "model.onnx").write_bytes(b"")
        for kept in _KEPT.keys() - {name}:
            (bundle / kept).write_text(json.dumps(_KEPT[kept]), encoding="utf-8")
    return bundle


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "picture": picture,
    "manifest": manifest,
    "config": config,
    "golden": golden,
}
