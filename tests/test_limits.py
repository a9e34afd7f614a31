"""`max_pixels`: a picture with more is refused by its header, however it comes."""

from __future__ import annotations

import asyncio
import copy
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vistower import CLIPMixin, DynamicBatcher, VisionEncoder
from vistower.errors import ImageDecodeError, ImageFormatError, OptionError

LIMIT = 60 * 50


def picture(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def header_of_a_png(width: int, height: int) -> bytes:
    """All of a PNG but its pixels: what is decoded of it is an error."""
    body = b"IHDR" + struct.pack(">II", width, height) + bytes([8, 2, 0, 0, 0])
    check = struct.pack(">I", zlib.crc32(body))
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return start + body + check + struct.pack(">I", 9_999) + b"IDAT" + zlib.compress(b"")


KINDS: dict[str, Callable[[Image.Image, Path], Any]] = {
    "image": lambda image, folder: image,
    "lazy image": lambda image, folder: Image.open(io.BytesIO(encoded(image, "PNG"))),
    "array": lambda image, folder: np.asarray(image),
    "array, channels first": lambda image, folder: np.asarray(image).transpose(2, 0, 1),
    "tensor": lambda image, folder: torch.tensor(np.asarray(image)),
    "path": lambda image, folder: save(image, folder / "a.png"),
    "bytes": lambda image, folder: encoded(image, "PNG"),
    "file": lambda image, folder: io.BytesIO(encoded(image, "BMP")),
    "turned JPEG": lambda image, folder: encoded(image, "JPEG", exif=turned()),
}


def save(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture(scope="module", params=["clip_bundle", "dinov3_bundle"])
def encoder(request: pytest.FixtureRequest) -> VisionEncoder:
    return VisionEncoder.open(
        request.getfixturevalue(request.param), device="cpu", max_pixels=LIMIT
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_past_the_limit_is_its_own_error(
    kind: str, encoder: VisionEncoder, tmp_path: Path
) -> None:
    make = KINDS[kind]
    for size in ((60, 50), (LIMIT // 5, 5), (50, 60)):
        assert len(encoder.encode(make(picture(*size), tmp_path))) == 1
    for width, height in ((61, 50), (60, 51), (51, 60), (601, 5)):
        says = rf"{width} x {height} = {width * height} pixels, and max_pixels={LIMIT} "
        for use in (encoder.encode, encoder.preprocess, encoder.processor):
            with pytest.raises(ImageFormatError, match=says):
                use(make(picture(width, height), tmp_path))
    small = picture(40, 40)
    given = [small, make(picture(61, 50), tmp_path), small]
    results = list(encoder.encode_stream(given, on_error="record"))
    assert [isinstance(result.error, ImageFormatError) for result in results] == [
        False,
        True,
        False,
    ]
    assert [result.index for result in encoder.encode_stream(given, on_error="skip")] == [0, 2]

    async def alone() -> list[int]:
        stream = encoder.aencode_stream(given, on_error="skip")
        return [result.index async for result in stream]

    assert asyncio.run(alone()) == [0, 2]
    with DynamicBatcher(encoder) as batcher:
        for answer in (batcher.encode, lambda image: batcher.submit(image).result()):
            with pytest.raises(ImageFormatError, match=f"max_pixels={LIMIT}"):
                answer(make(picture(61, 50), tmp_path))


def test_arrays_with_four_axes_have_a_limit_for_each_picture(encoder: VisionEncoder) -> None:
    assert len(encoder.encode(np.zeros((9, 50, 60, 3), np.uint8))) == 9
    with pytest.raises(ImageFormatError, match="61 x 50 = 3050"):
        encoder.encode(np.zeros((2, 50, 61, 3), np.uint8))


def test_only_the_header_is_read(encoder: VisionEncoder, clip_bundle: Path) -> None:
    data = header_of_a_png(9_000, 9_000)
    with pytest.raises(ImageFormatError, match="9000 x 9000 = 81000000"):
        encoder.preprocess(data)
    with Image.open(io.BytesIO(data)) as image, pytest.raises(ImageFormatError, match="81000000"):
        encoder.preprocess(image)
    with pytest.raises(ImageDecodeError, match="cut off"):
        VisionEncoder.open(clip_bundle, device="cpu").preprocess(data)


def test_past_pillow_s_limit_both_are_named(encoder: VisionEncoder) -> None:
    with pytest.raises(ImageDecodeError, match=rf"\(400000000 pixels\).* max_pixels={LIMIT} "):
        encoder.preprocess(header_of_a_png(20_000, 20_000))


def test_an_icon_that_is_larger_than_its_directory_says(encoder: VisionEncoder) -> None:
    icon = bytearray(encoded(picture(256, 256), "ICO", sizes=[(256, 256)]))
    icon[6:8] = 16, 16
    with pytest.raises(ImageFormatError, match=f"256 x 256 = 65536 pixels, and max_pixels={LIMIT}"):
        encoder.preprocess(bytes(icon))


def test_the_draft_of_a_jpeg_counts_as_a_whole(clip_bundle: Path) -> None:
    encoder = VisionEncoder.open(clip_bundle, device="cpu", decode="draft", max_pixels=900 * 900)
    assert encoder.preprocess(encoded(picture(900, 900), "JPEG")).shape == (1, 3, 224, 224)
    with pytest.raises(ImageFormatError, match="901 x 900"):
        encoder.preprocess(encoded(picture(901, 900), "JPEG"))


def test_a_copy_has_the_limit_too(encoder: VisionEncoder) -> None:
    for other in (pickle.loads(pickle.dumps(encoder)), copy.copy(encoder)):
        assert other.processor.max_pixels == LIMIT
        with pytest.raises(ImageFormatError, match=f"max_pixels={LIMIT}"):
            other.encode(picture(61, 50))


def test_none_is_no_limit(clip_bundle: Path) -> None:
    encoder = VisionEncoder.open(clip_bundle, device="cpu", max_pixels=None)
    assert len(encoder.encode(picture(400, 300))) == 1


@pytest.mark.parametrize("limit", [0, -1, 2.5, "many", True])
def test_a_limit_is_a_whole_number(limit: Any, clip_bundle: Path) -> None:
    with pytest.raises(OptionError, match="max_pixels="):
        VisionEncoder.open(clip_bundle, max_pixels=limit)


def test_the_limit_of_a_mixin(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISTOWER_MAX_PIXELS", str(LIMIT))
    mixin = CLIPMixin(model_path=clip_bundle, device="cpu")
    assert mixin.get_features(picture(60, 50)).shape == (49, 64)
    for use in (mixin.get_features, mixin.get_cls_feature, lambda x: mixin.processor(images=x)):
        with pytest.raises(ImageFormatError, match=f"61 x 50 = 3050 .*max_pixels={LIMIT}"):
            use([picture(60, 50), picture(61, 50)])
    for text, says in (("many", "not a number of pixels"), ("-3", "not"), ("0", "max_pixels=0")):
        monkeypatch.setenv("VISTOWER_MAX_PIXELS", text)
        with pytest.raises(OptionError, match=says):
            CLIPMixin(model_path=clip_bundle, device="cpu")
    monkeypatch.delenv("VISTOWER_MAX_PIXELS")
    mixin = CLIPMixin(model_path=clip_bundle, device="cpu")
    assert mixin.get_features(picture(61, 50)).shape == (49, 64)


EMBED = """
import sys
from PIL import Image
# From half of this limit on Pillow warns.
Image.MAX_IMAGE_PIXELS = 2000
from vistower.cli import main
main(sys.argv[1:])
"""


def embed(bundle: Path, folder: Path, *options: str, flags: tuple[str, ...] = ()) -> Any:
    arguments = ["embed", str(bundle), str(folder), "--output", str(folder / "out.npz"), *options]
    return subprocess.run(
        [sys.executable, *flags, "-c", EMBED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": ""},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures that Pillow takes, warns of under that limit, and refuses."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    picture(40, 40).save(pictures / "a.png")
    picture(60, 50).save(pictures / "b.png")
    return pictures


@pytest.mark.parametrize(
    "flags", [(), ("-W", "error"), ("-W", "always"), ("-W", "ignore")], ids=str
)
def test_embed_gives_the_same_whatever_the_filter_of_warnings(
    flags: tuple[str, ...], clip_bundle: Path, folder: Path
) -> None:
    want = VisionEncoder.open(clip_bundle, device="cpu").encode(sorted(folder.iterdir())).cls
    done = embed(clip_bundle, folder, flags=flags)
    assert done.stderr == ""
    assert done.returncode == 0
    with np.load(folder / "out.npz") as found:
        assert np.abs(found["cls"] - want).max() <= 1e-4


def test_embed_has_the_limit(clip_bundle: Path, folder: Path) -> None:
    done = embed(clip_bundle, folder, "--max-pixels", "2999")
    assert done.returncode == 2
    assert "b.png has 60 x 50 = 3000 pixels, and max_pixels=2999" in done.stderr
    assert not (folder / "out.npz").exists()
    done = embed(clip_bundle, folder, "--max-pixels", "2999", "--skip-errors")
    assert done.returncode == 0
    assert "skipped: " in done.stderr
    with np.load(folder / "out.npz") as found:
        assert [Path(name).name for name in found["names"]] == ["a.png"]
    assert embed(clip_bundle, folder, "--max-pixels", "0").returncode == 2


def test_a_library_user_is_warned_as_by_pillow(
    clip_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    encoder, data = VisionEncoder.open(clip_bundle, device="cpu"), encoded(picture(60, 50), "PNG")
    with pytest.warns(Image.DecompressionBombWarning, match="3000 pixels"):
        want = encoder.preprocess(data)
    # All warnings are errors here, and the results are the same.
    assert np.array_equal(encoder.preprocess(data), want)
    with pytest.raises(ImageDecodeError, match="more pixels than Pillow takes"):
        encoder.preprocess(encoded(picture(80, 51), "PNG"))
