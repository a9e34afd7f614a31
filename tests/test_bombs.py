"""Pictures made to exhaust memory or time: bounded by their pixels, and still the reference's."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional

from test_preprocess import REFERENCES, configured, refused_for_its_height
from vistower.preprocess import native, pillow_arithmetic

RNG = np.random.default_rng(7)


@contextmanager
def computed_by(engine: str) -> Iterator[None]:
    """With the native library where it is installed, or with NumPy alone."""
    with pytest.MonkeyPatch.context() as patch:
        if engine == "numpy":
            patch.setattr(native, "library", lambda: None)
        yield


COLOUR = (200, 40, 90)

# Extreme, and small enough for the references, which resize the whole picture.
SHAPES = [(20_000, 1), (1, 20_000), (3, 30_000), (30_000, 3), (65_535, 2)]


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Levels at random, half of them black or white."""
    levels = RNG.integers(-200, 456, (size[1], size[0], 3)).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8)).convert(mode)


def grey_png(width: int, height: int) -> bytes:
    """A PNG of one grey, a thousandth of its pixels in bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + check

    packer = zlib.compressobj(9)
    line = b"\0" + b"\x4d" * width
    lines = max(1, 10_000_000 // len(line))
    packed = [packer.compress(line * min(lines, height - at)) for at in range(0, height, lines)]
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + bytes([8, 0, 0, 0, 0]))
        + chunk(b"IDAT", b"".join(packed) + packer.flush())
        + chunk(b"IEND", b"")
    )


def saved(size: tuple[int, int], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, 77).save(buffer, kind)
    return buffer.getvalue()


BOMBS = {
    "2000000x1.png": grey_png(2_000_000, 1),
    "1x2000000.png": grey_png(1, 2_000_000),
    "500000x9.png": grey_png(500_000, 9),
    "3x700000.png": grey_png(3, 700_000),
    "65535x1.gif": saved((65_535, 1), "GIF"),
    "1x65535.gif": saved((1, 65_535), "GIF"),
    "500000x1.tif": saved((500_000, 1), "TIFF"),
}


PRINT_PEAK = r"print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])"


def run_limited(code: str, *arguments: str, megabytes: int, seconds: float = 240) -> str:
    """Run code in a process of its own; it must end in time, its memory never above the limit.

    Returns what it printed.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"import re, sys\n{code}\n{PRINT_PEAK}", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    *printed, peak = done.stdout.strip().splitlines()
    assert int(peak) < megabytes * 1024
    return "\n".join(printed)


PREPARE = """
import numpy as np
from vistower.preprocess import native
from vistower.preprocess.processor import Preprocessor
name, backend, engine, stretched, *paths = sys.argv[1:]
if engine == "numpy":
    native.library = lambda: None
processor = Preprocessor.from_config({"image_processor_type": name}, backend=backend)
if stretched:
    processor = processor.resized((224, 224))
grey = processor(np.full((9, 9, 3), 77, np.uint8))
for path in paths:
    assert np.abs(processor(path) - grey).max() < 1e-4, path
"""


@pytest.mark.parametrize("stretched", ["", "stretched"])
@pytest.mark.parametrize(
    ("name", "backend", "engine"),
    [
        ("CLIPImageProcessor", "torchvision", "native"),
        ("CLIPImageProcessor", "torchvision", "numpy"),
        ("CLIPImageProcessor", "pil", "native"),
        ("DINOv3ViTImageProcessor", "torchvision", "native"),
    ],
)
def test_a_stripe_costs_its_own_pixels(
    name: str, backend: str, engine: str, stretched: str, tmp_path: Path
) -> None:
    """They took up to 160 s and 13.7 GB; a resize to 224 x 448,000,000 is in no memory."""
    paths = []
    for file, data in BOMBS.items():
        (tmp_path / file).write_bytes(data)
        paths.append(str(tmp_path / file))
    run_limited(PREPARE, name, backend, engine, stretched, *paths, megabytes=250)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("edge", [16, 224], ids=["16", "224"])
def test_a_stripe_is_stretched_as_the_reference_does(
    name: str, size: tuple[int, int], edge: int
) -> None:
    change = {"size": {"height": edge, "width": edge}, "do_center_crop": False}
    agrees(name, size, change)


@pytest.mark.parametrize("name", ["clip-torchvision", "clip-pil"])
@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("resample", [1, 2, 3])
def test_the_middle_of_a_stripe_is_the_reference_s(
    name: str, size: tuple[int, int], resample: int
) -> None:
    square = {"height": 24, "width": 24}
    change = {"size": {"shortest_edge": 24}, "crop_size": square, "resample": resample}
    agrees(name, size, change)


@pytest.mark.parametrize("resample", [0, 4, 5])
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)], ids=str)
def test_the_middle_of_a_stripe_in_pillow_s_other_filters(
    size: tuple[int, int], resample: int
) -> None:
    square = {"height": 32, "width": 32}
    change = {"size": {"shortest_edge": 32}, "crop_size": square, "resample": resample}
    agrees("clip-pil", size, change)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *itertools.product(("clip-torchvision", "clip-pil"), [(400_000, 1), (1, 300_000)]),
        *itertools.product(("dinov3",), [(600_000, 1), (1, 600_000)]),
    ],
)
def test_an_axis_too_long_to_keep_its_weights(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pillow_arithmetic, "_SMALL", 0)
    edge = 16 if name == "dinov3" else 224
    agrees(name, size, {"size": {"height": edge, "width": edge}, "do_center_crop": False})


def agrees(name: str, size: tuple[int, int], change: dict[str, Any]) -> None:
    """To the bit; DINOv3 to 1e-5 and the reference's own error, which grows with a stripe."""
    if refused_for_its_height(name, size[1]):
        return
    processor, ours = configured(name, change)
    image = noise(size)
    try:
        want = processor(images=image, return_tensors="pt")["pixel_values"][0].numpy()
    except RuntimeError as error:
        # torch's kernel for uint8 fails on some pictures one pixel wide.
        assert "report a bug to PyTorch" in str(error)  # noqa: PT017
        return
    allowed = 0.0
    if name == "dinov3":
        allowed = 1e-5 + np.abs(want - in_float64(image, processor)).max()
    for engine in ("native", "numpy") if name == "clip-torchvision" else ("native",):
        with computed_by(engine):
            assert np.abs(ours(image) - want).max() <= allowed
            # transformers may take an array of so few rows for one of as many channels.
            if size[1] > 4:
                assert np.abs(ours(np.asarray(image)) - want).max() <= allowed


def in_float64(image: Image.Image, processor: Any) -> Any:
    """What DINOv3's processor does, with torchvision's own functions in float64."""
    levels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float64))
    size = [processor.size["height"], processor.size["width"]]
    resized = functional.resize(levels * processor.rescale_factor, size, antialias=True)
    return functional.normalize(resized, processor.image_mean, processor.image_std).numpy()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_window_of_any_stripe(data: st.DataObject) -> None:
    """Pillow's own arithmetic, however cheap Pillow itself would be."""
    name = data.draw(st.sampled_from(["clip-torchvision", "clip-pil"]))
    sides = st.floats(0, 16).map(lambda power: int(2**power))
    width = data.draw(sides)
    height = min(data.draw(sides), max(1, 200_000 // width))
    size = {side: data.draw(st.integers(1, 150)) for side in ("height", "width")}
    change: dict[str, Any] = {"size": size, "crop_size": size}
    if data.draw(st.booleans()):
        edge = min(size.values())
        change = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
        height = min(height, 500 * width)
        width = min(width, 500 * height)
    change["resample"] = data.draw(st.sampled_from([1, 2, 3]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pillow_arithmetic, "_SMALL", 0)
        agrees(name, (width, height), change)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
def test_modes_of_stripes_without_conversion(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pillow_arithmetic, "_SMALL", 0)
    square = {"height": 24, "width": 24}
    change = {"size": {"shortest_edge": 24}, "crop_size": square, "do_convert_rgb": False}
    _, ours = configured("clip-pil", change)
    for size in ((900, 3), (3, 900)):
        image = noise(size, mode)
        resized = image.resize((24 * size[0] // 3, 24 * size[1] // 3), Image.Resampling.BICUBIC)
        left, top = (resized.width - 24) // 2, (resized.height - 24) // 2
        want = np.asarray(resized.crop((left, top, left + 24, top + 24)))
        levels = ours.as_levels()(image)
        planes = want[None] if want.ndim == 2 else want.transpose(2, 0, 1)
        assert np.array_equal(levels, np.broadcast_to(planes, levels.shape))
