"""Arrays and torch tensors as pictures: what the processors of transformers make of them, or raise.

What is refused here although transformers makes something of it is listed in `refused_here`, and in
docs/preprocessing.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from processors import EVERY, error_allowed, expected, reference, reproduced
from vistower.errors import ImageFormatError

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
