"""Arrays and torch tensors as pictures: what the processors of transformers make of them, or raise.

What is refused here although transformers makes something of it is listed in `refused_here`, and in
docs/preprocessing.md.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from processors import EVERY, RELEASE, error_allowed, expected, reference, reproduced
from vistower.encoder import VisionEncoder
from vistower.errors import ImageFormatError
from vistower.preprocess import convert
from vistower_export.reference import load_processor

REFERENCES = {which: reference(*which) for which in EVERY}
OURS = {which: reproduced(processor) for which, processor in REFERENCES.items()}
CLIP = ("CLIPImageProcessor", "torchvision")
CLIP_PIL = ("CLIPImageProcessor", "pil")
DINOV3 = ("DINOv3ViTImageProcessor", "torchvision")

DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "i8", "?", "f2", "f4", "f8")
RANGES = ("levels", "unit", "fractions", "negative", "beyond")
LAYOUTS = ("plain", "tensor", "strided", "columns", "frozen", "reversed", "swapped")


def refused_here(which: tuple[str, str], dtype: np.dtype[Any]) -> bool:
    """A dtype whose exact result is torch's rounding of it, and not reproduced."""
    if which == DINOV3:
        return dtype == np.float16
    return which[1] == "torchvision" and dtype not in (np.uint8, np.float32, np.float64)


def taken_here(which: tuple[str, str], layout: str) -> bool:
    """Memory that torch refuses, with values like any other."""
    return which[1] == "torchvision" and layout in ("reversed", "swapped")


def values(shape: tuple[int, ...], dtype: str, kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, shape)
    if dtype == "?":
        return levels > 100
    if dtype.startswith("f"):
        numbers: Any = {
            "levels": levels,
            "unit": levels / 255,
            "fractions": levels * 0.99,
            "negative": levels - 100.5,
            "beyond": levels * 3.0,
        }[kind]
    else:
        numbers = {"negative": levels - 100, "beyond": levels * 3}.get(kind, levels)
    with np.errstate(all="ignore"):
        return np.asarray(numbers).astype(dtype)


def laid_out(array: np.ndarray, layout: str) -> Any:
    if layout == "tensor":
        return torch.from_numpy(array)
    if layout == "strided":
        wide = np.zeros((array.shape[0], 2 * array.shape[1], array.shape[2]), array.dtype)
        wide[:, ::2] = array
        return wide[:, ::2]
    if layout == "columns":
        return np.asfortranarray(array)
    if layout == "reversed":
        return np.ascontiguousarray(array[:, ::-1])[:, ::-1]
    if layout == "swapped":
        return array.astype(array.dtype.newbyteorder(">"))
    if layout == "frozen":
        array.flags.writeable = False
    return array


def both(which: tuple[str, str], image: Any) -> tuple[Any, Any]:
    """What theirs and ours make of it; an exception where they raise."""
    try:
        want: Any = expected(REFERENCES[which], image)
    # Whatever a processor raises.
    except Exception as error:
        want = error
    try:
        have: Any = OURS[which](image)
    except ImageFormatError as error:
        have = error
    return want, have


def agree(which: tuple[str, str], want: Any, have: Any) -> None:
    assert isinstance(want, np.ndarray), f"theirs raises {want!r}, ours gives {have.shape}"
    assert isinstance(have, np.ndarray), f"theirs gives {want.shape}, ours raises {have!r}"
    assert have.shape == want.shape
    # Of float64, torch resizes in float64; ours is float32 in any case.
    assert np.abs(have - want).max() <= 5 * error_allowed(want, exact=False)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    which=st.sampled_from(EVERY),
    height=st.one_of(st.integers(1, 5), st.integers(1, 90)),
    width=st.one_of(st.integers(1, 5), st.integers(1, 90)),
    channels=st.sampled_from([1, 2, 3, 3, 3, 3, 4, 5]),
    first=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(RANGES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_any_array(
    which: tuple[str, str],
    height: int,
    width: int,
    channels: int,
    first: bool,
    dtype: str,
    kind: str,
    layout: str,
    seed: int,
) -> None:
    shape = (channels, height, width) if first else (height, width, channels)
    array = values(shape, dtype, kind, seed)
    want, have = both(which, laid_out(array, layout))
    if refused_here(which, array.dtype):
        assert isinstance(have, ImageFormatError)
    elif isinstance(want, np.ndarray):
        agree(which, want, have)
    elif taken_here(which, layout):
        plain, _ = both(which, array)
        if isinstance(plain, np.ndarray):
            agree(which, plain, have)
    else:
        assert isinstance(have, ImageFormatError), f"theirs raises {want!r}"


PICTURE = values((40, 60, 3), "u1", "levels", 1)
OTHER = values((33, 20, 3), "u1", "levels", 2)


@dataclass(frozen=True)
class Batch:
    """Something that holds several pictures."""

    name: str
    images: Any = field(repr=False)


BATCHES = [
    Batch("an array with four axes", np.stack([PICTURE, 255 - PICTURE])),
    Batch("channels first", np.stack([PICTURE, 255 - PICTURE]).transpose(0, 3, 1, 2)),
    Batch("a tensor with four axes", torch.from_numpy(np.stack([PICTURE, 255 - PICTURE]))),
    Batch("one in an array with four axes", PICTURE[None]),
    Batch("a list of arrays", [PICTURE, OTHER]),
    Batch("a list of tensors", [torch.from_numpy(PICTURE), torch.from_numpy(OTHER)]),
    Batch("lists in a list", [[PICTURE], [OTHER, PICTURE]]),
    Batch("arrays with four axes in a list", [PICTURE[None], PICTURE[None]]),
]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.name)
@pytest.mark.parametrize("family", ["clip", "dinov3"])
def test_batches(family: str, batch: Batch, request: pytest.FixtureRequest) -> None:
    processor = load_processor(request.getfixturevalue(f"{family}_checkpoint"))
    encoder = VisionEncoder.open(request.getfixturevalue(f"{family}_bundle"))
    want = processor(images=batch.images, return_tensors="pt")["pixel_values"].numpy()
    have = encoder.preprocess(batch.images)
    assert have.shape == want.shape
    assert np.abs(have - want).max() <= 1e-5
    one_by_one = [encoder.encode(picture).cls[0] for picture in unfolded(batch)]
    assert np.abs(encoder.encode(batch.images).cls - one_by_one).max() <= 1e-4


def unfolded(batch: Batch) -> Any:
    """The pictures of a batch one by one."""
    for entry in batch.images:
        several = isinstance(entry, (list, tuple)) or getattr(entry, "ndim", 3) == 4
        yield from entry if several else [entry]


def test_a_tensor_is_one_picture_and_needs_no_detaching() -> None:
    floats = torch.from_numpy(PICTURE.astype(np.float32)).permute(2, 0, 1).requires_grad_()
    for which in (CLIP, DINOV3):
        want = expected(REFERENCES[which], floats.detach())
        agree(which, want, OURS[which](floats))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (PICTURE[:, :, 0], "three axes"),
        (torch.from_numpy(PICTURE[:, :, 0]), "three axes"),
        (PICTURE[None], "encode"),
        (PICTURE[:, :, :2], "1 or 3"),
        (np.zeros((9, 9, 5), np.uint8), "channels"),
        (PICTURE[:0], "no pixels"),
        (PICTURE.astype(complex), "complex128"),
        (PICTURE.astype(object), "object"),
        (PICTURE.astype(str), "<U"),
        (torch.from_numpy(PICTURE).bfloat16(), "bfloat16"),
        (np.full((9, 9, 3), np.nan, np.float32), "not finite"),
        (np.full((9, 9, 3), np.inf), "not finite"),
        (PICTURE.tolist(), "list is no picture"),
        (np.float32(3), "no picture"),
        (None, "NoneType is no picture"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("which", [CLIP, CLIP_PIL, DINOV3], ids="-".join)
def test_what_is_no_picture_is_refused(which: tuple[str, str], image: Any, says: str) -> None:
    with pytest.raises(ImageFormatError, match=says):
        OURS[which](image)


@pytest.mark.parametrize("images", [PICTURE[None, None], [[[PICTURE]]], [3], PICTURE.tolist()])
def test_no_batch_is_refused(images: Any, clip_bundle: Path) -> None:
    with pytest.raises(ImageFormatError):
        VisionEncoder.open(clip_bundle).preprocess(images)


@pytest.mark.parametrize("dtype", ["i8", "u2", "?", "f2"])
def test_rounding_of_torch_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(ImageFormatError, match=f"{np.dtype(dtype)} are not reproduced"):
        OURS[CLIP](PICTURE.astype(dtype))


def test_floats_in_0_to_1_are_rescaled_again_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scaled = (PICTURE / 255).astype(np.float32)
    convert._warn_of_scaled.cache_clear()
    for which in (CLIP, CLIP_PIL, DINOV3):
        agree(which, expected(REFERENCES[which], scaled), OURS[which](scaled))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "almost black" in caplog.text


def test_levels_are_made_of_uint8_only() -> None:
    for which in (CLIP, CLIP_PIL):
        levels = OURS[which].as_levels()
        assert levels(PICTURE).dtype == np.uint8
        with pytest.raises(ImageFormatError, match="uint8"):
            levels(PICTURE.astype(np.float32))


def test_a_row_of_channels_is_no_picture_of_four_rows() -> None:
    """An array 3 pixels high, and in transformers 5 one of 4, is read with its channels first."""
    for rows in (3, 4):
        narrow = PICTURE[:rows]
        want = expected(REFERENCES[CLIP], narrow)
        agree(CLIP, want, OURS[CLIP](narrow))
        as_image = OURS[CLIP](Image.fromarray(narrow))
        assert (np.abs(as_image - want).max() > 0.1) == (rows == 3 or RELEASE.converts_arrays)
