"""docs/preprocessing.md: every cell of its tables against transformers, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from processors import EVERY, OWN_PIL, RELEASE, error_allowed, expected, reference, reproduced
from vistower.errors import ImageFormatError
from vistower.preprocess.classes import CLASSES
from vistower_export.pictures import SAMPLES

# Pillow says so wherever such a picture becomes RGB.
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")

PAGE = (Path(__file__).parents[1] / "docs" / "preprocessing.md").read_text(encoding="utf-8")
CONVERT = ("CLIPImageProcessor", "BitImageProcessor", *["SiglipImageProcessor"] * (not OWN_PIL))
CONVERTING = [which for which in EVERY if which[0] in CONVERT]
CLIP = ("CLIPImageProcessor", "torchvision")
CLIP_PIL = ("CLIPImageProcessor", "pil")
DINOV3 = ("DINOv3ViTImageProcessor", "torchvision")
REFERENCES = {which: reference(*which) for which in EVERY}
OURS = {which: reproduced(processor) for which, processor in REFERENCES.items()}


def table(first: str) -> list[dict[str, str]]:
    """The rows of the page's table whose first column is called so."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


# A smooth picture: a resize neither over- nor undershoots, and each channel is another one.
ROWS, COLUMNS = np.mgrid[0:90, 0:120]
SMOOTH = np.stack([ROWS * 2 + 20, COLUMNS + 60, 250 - ROWS - COLUMNS], axis=-1).astype(np.uint8)
ALPHA = (COLUMNS * 2).astype(np.uint8)


def in_mode(mode: str) -> Image.Image:
    image = Image.fromarray(SMOOTH)
    if mode in ("RGBA", "LA"):
        image = image.convert("L") if mode == "LA" else image
        image.putalpha(Image.fromarray(ALPHA))
    elif mode.endswith("-transparent"):
        image = image.convert(mode.removesuffix("-transparent"))
        image.info["transparency"] = image.getpixel((60, 45))
    elif mode == "I;16":
        image = Image.fromarray(SMOOTH[:, :, 0].astype(np.uint16) * 200)
    elif mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.tobytes())
    else:
        image = image.convert(mode)
    return image


def on_white(image: Image.Image) -> Image.Image:
    blended = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255))
    return Image.alpha_composite(white, blended).convert("RGB")


MEANS: Mapping[str, Callable[[Image.Image], Any]] = {
    "colours": lambda image: image.convert("RGB"),
    "converted": lambda image: image.convert("RGB"),
    "alpha dropped": lambda image: image.convert("RGB"),
    "on white": on_white,
    "one channel": lambda image: np.stack([np.asarray(image)] * 3, axis=-1),
    "three channels": np.asarray,
}
"""A word of the first table → the plain picture that the processor makes of the image."""

MODES = table("mode")


def agree(which: tuple[str, str], image: Any, given: Any = None) -> None:
    want = expected(REFERENCES[which], image)
    have = OURS[which](image if given is None else given)
    assert np.abs(have - want).max() <= 5 * error_allowed(want, exact=False)


@pytest.mark.parametrize("row", MODES, ids=lambda row: row["mode"])
def test_what_becomes_of_a_pil_image(row: dict[str, str]) -> None:
    image = in_mode(row["mode"])
    column = "PIL image, CLIP" if RELEASE.converts_arrays else "PIL image, CLIP, to 5.20"
    words = dict.fromkeys(CONVERTING, row[column]) | {DINOV3: row["PIL image, DINOv3"]}
    for which, word in words.items():
        if word == "refused":
            with pytest.raises((RuntimeError, ValueError)):
                expected(REFERENCES[which], image)
            with pytest.raises(ImageFormatError, match=r"convert\('RGB'\)"):
                OURS[which](image)
            continue
        want = expected(REFERENCES[which], image)
        assert np.abs(want - expected(REFERENCES[which], MEANS[word](image))).max() <= 1e-3
        agree(which, image)


@pytest.mark.parametrize("row", MODES, ids=lambda row: row["mode"])
def test_what_becomes_of_a_file(row: dict[str, str], tmp_path: Path) -> None:
    image = in_mode(row["mode"])
    if row["file"] == "–":
        assert row["mode"] == "HSV"
        return
    kind = "tiff" if row["mode"] in ("CMYK", "YCbCr", "LAB", "I", "F") else "png"
    path = tmp_path / f"a.{kind}"
    image.save(path)
    with Image.open(path) as opened:
        assert opened.mode == image.mode
        opened.load()
        plain = MEANS[row["file"]](opened)
    assert np.array_equal(np.asarray(load_image(str(path))), np.asarray(plain))
    for which in (CLIP, CLIP_PIL, DINOV3):
        agree(which, plain, given=path)


def test_the_exif_orientation_is_that_of_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SMOOTH).save(path, exif=exif, quality=100)
    with Image.open(path) as image:
        for which in (CLIP, CLIP_PIL, DINOV3):
            agree(which, image)
            agree(which, load_image(str(path)), given=path)
            assert np.abs(OURS[which](image) - OURS[which](path)).max() > 0.1


def test_a_palette_file_and_the_image_in_it_are_two_pictures_for_dinov3(tmp_path: Path) -> None:
    in_mode("P").save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.abs(OURS[DINOV3](image) - OURS[DINOV3](tmp_path / "a.png")).max() > 1
        assert np.array_equal(OURS[CLIP](image), OURS[CLIP](tmp_path / "a.png"))


@dataclass(frozen=True)
class Kind:
    """An array of the second table: ``factor * levels + shift`` of a picture of uint8 levels."""

    array: Any
    levels: np.ndarray
    factor: float = 1.0
    shift: float = 0.0


GREY = np.stack([SMOOTH[:, :, 0]] * 3, axis=-1)
WITH_ALPHA = np.dstack([SMOOTH, ALPHA])
WHITE = np.asarray(on_white(Image.fromarray(WITH_ALPHA)))
BINARY = (SMOOTH > 100).astype(np.uint8)


def with_nan() -> np.ndarray:
    array = SMOOTH.astype(np.float32)
    array[3, 4, 1] = np.nan
    return array


KINDS = {
    "H×W×3 uint8": Kind(SMOOTH, SMOOTH),
    "3×H×W uint8": Kind(SMOOTH.transpose(2, 0, 1), SMOOTH),
    "tensor 3×H×W uint8": Kind(torch.from_numpy(SMOOTH).permute(2, 0, 1), SMOOTH),
    "H×W uint8": Kind(SMOOTH[:, :, 0], GREY),
    "H×W×1 uint8": Kind(SMOOTH[:, :, :1], GREY),
    "H×W×2 uint8": Kind(SMOOTH[:, :, :2], SMOOTH),
    "H×W×4 uint8": Kind(WITH_ALPHA, WHITE),
    "H×W×4 float32 in 0..1": Kind((WITH_ALPHA / 255).astype(np.float32), WHITE, 1 / 255),
    "H×W×3 float32 in 0..255, whole": Kind(SMOOTH.astype(np.float32), SMOOTH),
    "H×W×3 float32 in 0..255, fractions": Kind(
        SMOOTH.astype(np.float32) * 0.9 + 0.3, SMOOTH, 0.9, 0.3
    ),
    "H×W×3 float32 in 0..1": Kind((SMOOTH / 255).astype(np.float32), SMOOTH, 1 / 255),
    "H×W×3 float32, negative": Kind(SMOOTH.astype(np.float32) - 300, SMOOTH, 1, -300),
    "H×W×3 float64 in 0..1": Kind(SMOOTH / 255, SMOOTH, 1 / 255),
    "H×W×3 int64 in 0..255": Kind(SMOOTH.astype(np.int64), SMOOTH),
    "H×W×3 uint16, 16 bits": Kind(SMOOTH.astype(np.uint16) * 257, SMOOTH, 257),
    "H×W×3 bool": Kind(BINARY.astype(bool), BINARY),
    "H×W×3 float16 in 0..1": Kind((SMOOTH / 255).astype(np.float16), SMOOTH, 1 / 255),
    "H×W×3 float32 with NaN": Kind(with_nan(), SMOOTH),
    "H×W×3 uint8, no pixels": Kind(SMOOTH[:0], SMOOTH),
}
ARRAYS = table("array")


def scaled(which: tuple[str, str], kind: Kind) -> np.ndarray:
    """What the reference makes of the levels, as if each had been multiplied and shifted."""
    processor = REFERENCES[which]
    mean, std = (np.array(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    unit = expected(processor, Image.fromarray(kind.levels)) * std + mean
    return ((unit * kind.factor + kind.shift / 255) - mean) / std


@pytest.mark.parametrize("row", ARRAYS, ids=lambda row: row["array"])
def test_what_becomes_of_an_array(row: dict[str, str]) -> None:
    kind = KINDS[row["array"]]
    since = "" if RELEASE.converts_arrays else ", to 5.20"
    words = {
        CLIP: row[f"CLIP, torchvision{since}"],
        CLIP_PIL: row[f"CLIP, PIL{since}"],
        DINOV3: row["DINOv3"],
    }
    for which, word in words.items():
        if word.endswith(", before 5.18"):
            word = "refused" if RELEASE.normalizes_in_place else "one channel"
        if word.startswith("refused"):
            with pytest.raises(ImageFormatError):
                OURS[which](kind.array)
        if word == "refused":
            with pytest.raises((RuntimeError, ValueError, ZeroDivisionError)):
                expected(REFERENCES[which], kind.array)
            continue
        want = expected(REFERENCES[which], kind.array)
        if word == "refused here":
            continue
        # Levels are rounded to one of 255, and cut to one when they are made of floats.
        allowed = 0.05 * kind.factor + 1e-5
        assert np.abs(want - scaled(which, kind)).max() <= allowed
        assert word.endswith("/ 255") == (kind.factor == 1 / 255 and word != "floats")
        agree(which, kind.array)


def test_the_tables_are_whole() -> None:
    assert {row["array"] for row in ARRAYS} == set(KINDS)
    assert {row["class"].strip("`") for row in table("class")} == set(CLASSES)
    for row in table("class"):
        assert tuple(row["backends"].split(", ")) == CLASSES[row["class"].strip("`")].backends


def test_what_the_two_backends_differ_by() -> None:
    """By one level in less than one value in two hundred, and else by float32's rounding."""
    torchvision, pillow = REFERENCES[CLIP], REFERENCES[CLIP_PIL]
    level = 1 / 255 / min(torchvision.image_std)
    for path in SAMPLES:
        image = load_image(str(path))
        difference = np.abs(expected(torchvision, image) - expected(pillow, image))
        other = difference > 1e-6
        assert 0.0005 < other.mean() < 0.005
        assert difference.max() <= level * 1.001
        assert (difference[other] > 0.9 / 255 / max(torchvision.image_std)).all()
        assert np.abs(OURS[CLIP](image) - OURS[CLIP_PIL](image)).max() == difference.max()
