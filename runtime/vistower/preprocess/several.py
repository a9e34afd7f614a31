"""One picture or several: what callers pass to the encoder, its streams, a batcher and the mixins.

Several pictures are a list or tuple, an array with four axes, a NumPy array of strings, bytes or
objects, and whatever else Python can iterate over, or index from 0. Of pandas and pyarrow nothing
is imported: a Series is an iterable like any other, and an Arrow value tells its own Python object.
What iterates over something else than its pictures (a mapping, a table), or in no order (a set), is
refused by name.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from vistower.errors import EmptyInputError, ImageDecodeError, ImageFormatError
from vistower.preprocess.arrays import is_array
from vistower.preprocess.encoded import is_encoded, is_file, read_file
from vistower.preprocess.images import frame_held, is_animated

_NAMED = 5
"""Keys or columns that a message names."""


def plain(value: Any) -> Any:
    """The Python object of an Arrow value or of a NumPy array without axes; others as they are.

    Raises:
        ImageDecodeError: the value cannot be read.
    """
    if callable(getattr(type(value), "as_py", None)):
        try:
            return value.as_py()
        # Text that is no UTF-8, a class of the caller's own.
        except Exception as error:
            raise ImageDecodeError(
                f"A {type(value).__name__} cannot be read as a Python object ({error})."
            ) from error
    if _holds_objects(value) and value.ndim == 0:
        return next(iter(_values(value)))
    return value


def several(images: Any) -> Iterable[Any] | None:
    """The pictures of what holds several, to iterate over; None of what is to be one.

    Raises:
        ImageFormatError: it is a mapping, a table or a set.
    """
    if isinstance(images, Image.Image) or is_encoded(images):
        return None
    if _holds_objects(images) and images.ndim in (1, 2):
        return _values(images)
    if is_array(images):
        return images if images.ndim == 4 else None
    if _is_misleading(images):
        raise no_picture(images)
    # Another library's array.
    if getattr(images, "ndim", 1) in (2, 3):
        return None
    if isinstance(images, Iterable):
        return images
    return _indexed(images) if hasattr(type(images), "__getitem__") else None


def pictures(images: Any) -> list[Any] | Iterator[Any]:
    """One picture or several, lists in a list unfolded.

    A list where all are there already; else an iterator, whose every picture is to be used before
    the next one is pulled: a source may give the same object again, changed.

    Raises:
        EmptyInputError: there is none.
        ImageFormatError: see `several`.
    """
    images = plain(images)
    source = several(images)
    if source is None:
        return [images]
    found = _filled(_unfolded(source))
    return list(found) if isinstance(images, (list, tuple)) or is_array(images) else found


def streamed(images: Any, *, awaited: bool) -> Any:
    """The iterable of a stream's pictures; an asynchronous one where it is ``awaited``.

    Raises:
        ImageFormatError: it is one picture, or none.
    """
    if awaited and isinstance(images, AsyncIterable):
        return images
    images = plain(images)
    source = several(images)
    if source is None:
        awaits = isinstance(images, AsyncIterable)
        use = "aencode_stream() for this one" if awaits else "encode() for one picture"
        raise ImageFormatError(
            f"A stream takes an iterable of pictures, not a {type(images).__name__}: pass a list "
            f"or a generator, or use {use}."
        )
    return source


def detached(image: Any) -> Any:
    """A picture that does not change where its owner goes on: closes its file, or seeks in it.

    A file object is replaced by its bytes, and an animated image by a copy of its frame.

    Raises:
        ImageDecodeError: it cannot be read.
    """
    image = plain(image)
    if isinstance(image, Image.Image):
        return frame_held(image)
    return read_file(image) if is_file(image) and not isinstance(image, os.PathLike) else image


class Repeats:
    """Finds the frames of an animation that were put in a list, where all are its last one."""

    def __init__(self) -> None:
        """Nothing was seen."""
        self._last: Image.Image | None = None
        self._frame = -1

    def check(self, image: Any) -> None:
        """Take the next picture.

        Raises:
            ImageFormatError: it is the animated image given before, at the same frame.
        """
        if not isinstance(image, Image.Image):
            return
        frame = image.tell()
        if image is self._last and frame == self._frame and is_animated(image):
            raise ImageFormatError(
                f"The same animated image comes twice in a row, at frame {frame}: all frames of "
                f"one are one object, so a list of them holds the last one many times. Pass the "
                f"iterator itself, or frame.copy() of each."
            )
        self._last, self._frame = image, frame


def no_picture(value: Any) -> ImageFormatError:
    """The refusal of what is no picture."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return ImageFormatError(
            f"{kind} is no picture, and its keys ({_named(value)}) are none: pass its values, or "
            f"one of them."
        )
    if _is_table(value):
        columns = getattr(value, "column_names", None)
        names = _named(value.columns if columns is None else columns)
        return ImageFormatError(
            f"{kind} is a table and no picture: pass the column that holds them (it has {names})."
        )
    if isinstance(value, (set, frozenset)):
        return ImageFormatError(
            f"{kind} is no picture, and several in it would have no order: pass a list, as "
            f"sorted() gives of paths."
        )
    return ImageFormatError(
        f"{kind} is no picture. Pass a PIL image, an array or torch tensor (H x W x 3 or 3 x H x "
        f"W), a path, an encoded picture's bytes or a binary file object; encode() and streams "
        f"take several of them."
    )


def _named(names: Iterable[Any]) -> str:
    texts = [repr(name) for name in names]
    return ", ".join(texts[:_NAMED]) + (", …" if len(texts) > _NAMED else "")


def _is_misleading(value: Any) -> bool:
    """Whether iterating gives something else than pictures, or in no order."""
    return isinstance(value, (Mapping, set, frozenset)) or _is_table(value)


def _is_table(value: Any) -> bool:
    # Of the class: an object may answer for the labels of its rows too.
    return hasattr(type(value), "columns") or hasattr(type(value), "column_names")


def _holds_objects(value: Any) -> bool:
    """Whether it is a NumPy array of objects, strings or bytes."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "OUST"


def _values(array: Any) -> Iterator[Any]:
    """The entries of an array of objects, strings or bytes, row by row."""
    flat = array.reshape(-1)
    if array.dtype.kind != "S":
        yield from flat
        return
    # NumPy would cut zero bytes off the end of a picture; those that it adds do no harm.
    for at in range(len(flat)):
        yield flat[at : at + 1].tobytes()


def _indexed(images: Any) -> Iterator[Any]:
    """The entries of a sequence that Python cannot iterate over but by their numbers."""
    if hasattr(type(images), "__len__"):
        for index in range(len(images)):
            yield images[index]
    else:
        yield from iter(images)


def _unfolded(source: Iterable[Any]) -> Iterator[Any]:
    """Each picture; transformers' ``make_flat_list_of_images`` unfolds the same lists."""
    repeats = Repeats()
    for given in source:
        given = plain(given)
        inside = isinstance(given, (list, tuple)) or is_array(given)
        parts = several(given) if inside else None
        for picture in [given] if parts is None else parts:
            picture = plain(picture)
            repeats.check(picture)
            yield picture


def _filled(source: Iterator[Any]) -> Iterator[Any]:
    empty = True
    for picture in source:
        empty = False
        yield picture
    if empty:
        raise EmptyInputError("There is no picture to embed: the batch is empty.")
