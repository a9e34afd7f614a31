"""Hugging Face image processors of the installed transformers, and ours read from their configs."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torchvision
import transformers
from PIL import Image

from vistower.preprocess import native
from vistower.preprocess.classes import CLASSES
from vistower.preprocess.processor import Preprocessor
from vistower.preprocess.release import Release
from vistower_export.reference import processor_backend, processor_config, transparency

RELEASE = Release.of(transformers.__version__)

OWN_PIL = importlib.util.find_spec("transformers.image_processing_backends") is None
"""Whether the PIL classes are implementations of their own: before 5.4."""

HAS_LANCZOS = tuple(map(int, torchvision.__version__.split(".")[:2])) >= (0, 29)
"""Before, torchvision had no lanczos for tensors and transformers took bicubic instead."""

EVERY = [(name, backend) for name, record in CLASSES.items() for backend in record.backends]
"""(class, backend) of all that are reproduced."""

# transformers warns of ambiguous shapes, and of much else.
transformers.logging.set_verbosity_error()


def reference(name: str, backend: str = "torchvision", **options: Any) -> Any:
    """An image processor of transformers, by the class's name in 5."""
    if OWN_PIL:
        ending = "Fast" if backend == "torchvision" else ""
    else:
        ending = "Pil" if backend == "pil" else ""
    return getattr(transformers, name + ending)(**options)


def reproduced(processor: Any) -> Preprocessor:
    """Ours, as the exporter reads it."""
    return Preprocessor.from_config(
        processor_config(processor),
        backend=processor_backend(processor),
        transparency=transparency(processor),
        transformers=transformers.__version__,
    )


def expected(processor: Any, image: Any) -> np.ndarray:
    """What the reference makes of one picture: (C, H, W)."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        made = processor(images=image, return_tensors="pt")["pixel_values"]
    return made[0].float().numpy()


def error_allowed(want: np.ndarray, *, exact: bool) -> float:
    """Nothing where levels are computed; a few steps of float32 otherwise."""
    return 0.0 if exact else 1e-5 * max(1.0, float(np.abs(want).max()) / 4)


def random_image(size: tuple[int, int], seed: int = 11) -> Image.Image:
    """A picture of noise, (width, height) pixels."""
    rng = np.random.default_rng([seed, *size])
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def megapixel(width: int, height: int) -> tuple[int, int]:
    """At most a megapixel in, and no stripe that the reference blows up to gigabytes."""
    height = max(1, min(height, 1_000_000 // width, width * 40))
    return min(width, height * 40), height


@contextmanager
def computed_by(engine: str) -> Iterator[None]:
    """With the native library where it is installed, or with NumPy alone."""
    with pytest.MonkeyPatch.context() as patch:
        if engine == "numpy":
            patch.setattr(native, "library", lambda: None)
        yield


MODES = (
    *("RGB", "L", "LA", "RGBA", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"),
    *("I;16", "1", "P-transparent", "L-transparent", "RGB-transparent"),
)
"""Modes of PIL images; ``-transparent`` has one transparent level, index or colour."""


def in_mode(mode: str, size: tuple[int, int] = (97, 61), seed: int = 5) -> Image.Image:
    """A picture of noise in a mode, with noise for its alpha channel."""
    image = random_image(size, seed)
    rng = np.random.default_rng(seed)
    alpha = Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8))
    if mode.endswith("-transparent"):
        image = image.convert(mode.removesuffix("-transparent"))
        clear = image.getpixel((0, 0))
        image.info["transparency"] = clear
    elif mode in ("RGBA", "RGBa", "PA"):
        image.putalpha(alpha)
        image = image if mode == "RGBA" else image.convert(mode)
    elif mode == "LA":
        image = image.convert("L")
        image.putalpha(alpha)
    elif mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16))
    elif mode == "LAB":
        image = Image.frombytes("LAB", size, image.tobytes())
    else:
        image = image.convert(mode)
    return image
