"""Files that are cut off: an error, or all the same the whole picture. Never another one."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vistower.errors import ImageDecodeError
from vistower.preprocess.encoded import open_image
from vistower.preprocess.images import loaded

Image.init()
RNG = np.random.default_rng(11)
WIDTH, HEIGHT = 27, 20
NOISE = Image.fromarray(RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
RAMP = Image.fromarray(
    np.stack([np.add.outer(9 * np.arange(HEIGHT), k * np.arange(WIDTH)) for k in (2, 3, 5)], -1)
    .astype(np.uint8)
)  # fmt: skip


def saved(kind: str, mode: str = "RGB", **options: Any) -> Callable[[Image.Image], bytes]:
    def save(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.convert(mode).save(file, kind, **options)
        return file.getvalue()

    return save


def text(magic: str, maxval: int, ending: str = "\n") -> Callable[[Image.Image], bytes]:
    """An ASCII bitmap, grey map or colour map."""

    def save(image: Image.Image) -> bytes:
        levels = np.asarray(image if magic == "P3" else image.convert("L")).astype(int)
        numbers = (levels * maxval // 255).ravel()
        head = f"{magic}\n# made by hand\n{WIDTH} {HEIGHT}\n"
        head += "" if magic == "P1" else f"{maxval}\n"
        lines = [" ".join(map(str, numbers[at : at + 17])) for at in range(0, len(numbers), 17)]
        return (head + "\n".join(lines) + ending).encode()

    return save


def dcx(image: Image.Image) -> bytes:
    return struct.pack("<III", 0x3ADE68B1, 12, 0) + saved("PCX", "P")(image)


def frames(kind: str) -> Callable[[Image.Image], bytes]:
    return saved(kind, save_all=True, append_images=[RAMP, NOISE])


FORMATS: dict[str, Callable[[Image.Image], bytes]] = {
    **{f"{kind} {mode}": saved(kind, mode) for kind in ("BMP", "TIFF", "PNG", "PPM", "TGA")
       for mode in ("RGB", "L", "1")},
    **{f"{kind} P": saved(kind, "P") for kind in ("BMP", "TIFF", "PNG", "GIF", "TGA", "PCX")},
    **{kind: saved(kind) for kind in ("PCX", "SGI", "DDS", "QOI", "ICO", "WEBP", "JPEG")},
    "PCX L": saved("PCX", "L"),
    "PCX 1": saved("PCX", "1"),
    "DCX P": dcx,
    "MSP": saved("MSP", "1"),
    "XBM": saved("XBM", "1"),
    "SPIDER": saved("SPIDER", "F"),
    "JPEG progressive": saved("JPEG", progressive=True),
    "JPEG with restarts": saved("JPEG", restart_marker_rows=1),
    "TGA rle": saved("TGA", compression="tga_rle"),
    "TIFF lzw": saved("TIFF", compression="tiff_lzw"),
    "TIFF packbits": saved("TIFF", compression="packbits"),
    "TIFF deflate": saved("TIFF", compression="tiff_adobe_deflate"),
    "WEBP lossless": saved("WEBP", lossless=True),
    "JPEG 2000": saved("JPEG2000"),
    "JPEG 2000 codestream": saved("JPEG2000", no_jp2=True, tile_size=(16, 16), num_resolutions=2),
    "JPEG 2000 layers": saved(
        "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[20, 5, 2]
    ),
    "P1": text("P1", 1),
    "P2": text("P2", 255),
    "P2, 16 bits": text("P2", 65_535),
    "P2, no line break at the end": text("P2", 255, " # the end"),
    "P3": text("P3", 255),
    "P3, odd maxval": text("P3", 99),
    "P3, zeros": text("P3", 1),
    **{f"{kind} frames": frames(kind) for kind in ("GIF", "PNG", "TIFF", "WEBP")},
}  # fmt: skip
if "AVIF" in Image.SAVE:
    FORMATS["AVIF"] = saved("AVIF")


def by_bytes(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data))


def by_image(data: bytes) -> np.ndarray:
    """As a PIL image that its owner has opened and not decoded."""
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:
        raise ImageDecodeError("Pillow does not open it.") from error
    return np.asarray(loaded(image).convert("RGB"))


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("source", [NOISE, RAMP], ids=["noise", "ramp"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_off_is_never_another_picture(kind: str, source: Image.Image) -> None:
    data = FORMATS[kind](source)
    for pixels in (by_bytes, by_image):
        whole = pixels(data)
        lengths = {*range(1, len(data), max(1, len(data) // 150)), *range(len(data))[-150:]}
        refused = 0
        for length in sorted(lengths - {0}):
            try:
                got = pixels(data[:length])
            except ImageDecodeError:
                refused += 1
            else:
                assert np.array_equal(got, whole), (length, len(data))
        assert refused > 10


@pytest.mark.parametrize("last", ["255", "26", "200"])
def test_a_number_that_cannot_go_on_may_end_a_file(last: str) -> None:
    data = f"P2 2 1 255\n7 {last}".encode()
    assert np.array_equal(by_bytes(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    "data", [b"P2 2 1 255\n7 2", b"P3 1 1 65535 1 1 6553", b"P2 1 1 255 # a\n0"]
)
def test_one_that_can_is_refused(data: bytes) -> None:
    with pytest.raises(ImageDecodeError, match="its last number may go on"):
        by_bytes(data)
    assert len(by_bytes(data + b"\n"))
    assert len(by_bytes(data + b"#\n"))


def test_numbers_after_the_picture_do_not_matter() -> None:
    assert by_bytes(b"P2 2 1 255\n7 2 1").tolist() == [[[7] * 3, [2] * 3]]


def test_a_grey_pcx_may_have_no_palette() -> None:
    data = bytearray(saved("PCX", "L")(NOISE))[:-769]
    with pytest.raises(ImageDecodeError, match="no palette"):
        by_bytes(bytes(data))
    data[68:70] = 2, 0
    assert np.array_equal(by_bytes(bytes(data)), np.asarray(NOISE.convert("L").convert("RGB")))


def test_zeros_after_a_codestream_do_not_matter() -> None:
    data = FORMATS["JPEG 2000 codestream"](NOISE)
    assert np.array_equal(by_bytes(data + bytes(2_000_000)), by_bytes(data))
