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

_folder = Path(tempfile.mkdtemp(prefix="vistower-fuzz-"))


def remove_folder() -> None:
    """Delete what the targets wrote; atheris ends the process without running exit handlers."""
    shutil.rmtree(_folder, ignore_errors=True)


def picture(data: bytes) -> None:
    """An encoded picture, through every arithmetic."""
    try:
        image = open_image(data)
    except VistowerError:
        return
    for processor in PROCESSORS:
        pixel_values = processor(image)
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
    """A ``preprocessor_config.json`` and a ``config.json`` of a bundle without a manifest."""
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
    bundle = _folder / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "model.onnx").write_bytes(b"")
    for changed, kept in (
        ("preprocessor_config.json", "config.json"),
        ("config.json", "preprocessor_config.json"),
    ):
        (bundle / changed).write_bytes(data)
        (bundle / kept).write_text(json.dumps(_KEPT[kept]), encoding="utf-8")
        try:
            loaded = Bundle.load(bundle)
            loaded.layout, loaded.preprocessor, loaded.resolutions  # noqa: B018
        except VistowerError:
            continue


_KEPT: dict[str, Any] = {
    "config.json": {"model_type": "dinov3_vit", "patch_size": 16, "hidden_size": 64},
    "preprocessor_config.json": DINOV3,
}

TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "picture": picture,
    "manifest": manifest,
    "config": config,
}
