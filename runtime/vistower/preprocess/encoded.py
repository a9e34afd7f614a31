"""Encoded pictures: paths, bytes, file objects and data URIs to RGB.

As ``transformers.image_utils.load_image`` reads them; nothing is ever downloaded.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
import warnings
from collections.abc import Callable
from typing import IO, Any, TypeAlias, TypeGuard, TypeVar

from PIL import Image, ImageOps

from vistower.errors import ImageDecodeError, ImageFormatError
from vistower.forks import uncut
from vistower.preprocess.cut import require_whole

Bytes: TypeAlias = bytes | bytearray | memoryview
Encoded: TypeAlias = str | os.PathLike[str] | Bytes | IO[bytes]

T = TypeVar("T")

_DATA = "data:"
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_LONGEST_NAME = 200
_MOST_WARNINGS = 32
"""Kinds of warnings that one picture may give."""


def is_encoded(source: object) -> TypeGuard[Encoded]:
    """Whether it is something `open_image` decodes: a path, bytes, or a file object."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or is_file(source)


def is_file(source: object) -> TypeGuard[IO[bytes]]:
    """Whether it is a file object."""
    return callable(getattr(source, "read", None))


def open_image(
    source: Encoded, draft: int | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Read an encoded picture: fully decoded, EXIF orientation applied, converted to RGB.

    Transparency is dropped, as ``load_image`` does; pass a PIL image to have it handled by the
    processor.

    Args:
        source: a path, a ``data:`` URI (a ``str``), the bytes of a picture, or a binary file
            object, which is read from its start where it can go back there.
        draft: decode a JPEG at 1/2, 1/4 or 1/8 of its size where both sides keep this many
            pixels. Its levels then differ from those of the whole picture, scaled down.
        max_pixels: width x height of its header at most; None for Pillow's own limit alone.

    Raises:
        ImageDecodeError: the file cannot be had, or holds no picture Pillow can read to its end.
        ImageFormatError: it has more pixels than ``max_pixels``.
    """
    file: str | bytes
    if isinstance(source, str) and source[: len(_DATA)].lower() == _DATA:
        file = _from_data_uri(source)
        name = f"The picture of a data URI ({len(file)} bytes)"
    elif isinstance(source, (str, os.PathLike)):
        file = _checked_path(source)
        name = shortened(file)
    else:
        file = bytes(source) if isinstance(source, Bytes) else read_file(source)
        name = f"The picture in memory ({len(file)} bytes)"
    if not file:
        raise ImageDecodeError(f"{name} is empty.")
    try:
        return tolerating_warnings(lambda: _decoded(file, name, draft, max_pixels))
    except ImageFormatError:
        raise
    except Image.DecompressionBombError as error:
        own = "" if max_pixels is None else f", whose limit max_pixels={max_pixels} leaves as it is"
        raise ImageDecodeError(
            f"{name} has more pixels than Pillow takes ({error}){own}. Scale it down, or raise "
            f"PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageDecodeError(f"{name} cannot be read ({error.strerror}).") from error
        raise ImageDecodeError(
            f"{name} cannot be read as a picture ({error}). It is damaged, cut off, or no picture."
        ) from error


def _decoded(
    file: str | bytes, name: str, draft: int | None, max_pixels: int | None
) -> Image.Image:
    # Pillow leaves a path's file open where reading it fails.
    binary = io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")  # noqa: PTH123, SIM115
    with binary, _opened(binary) as image:
        require_few_pixels(name, image.size, max_pixels)
        require_whole(image, binary)
        if draft is not None:
            image.draft(None, (draft, draft))
        with uncut:
            ImageOps.exif_transpose(image, in_place=True)
        image.load()
        # An icon's directory may say something else than the picture in it.
        require_few_pixels(name, image.size, max_pixels)
        if image.mode == "RGB":
            return image
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            # The same pixels, but Pillow warns of the direct way.
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


def require_few_pixels(name: str, size: tuple[int, int], limit: int | None) -> None:
    """Refuse a picture of (width, height) pixels that has more than a limit.

    Raises:
        ImageFormatError: see there.
    """
    width, height = size
    if limit is not None and width * height > limit:
        raise ImageFormatError(
            f"{name} has {width} x {height} = {width * height} pixels, and max_pixels={limit} was "
            f"asked for. Scale it down, or raise the limit."
        )


@uncut
def _opened(binary: IO[bytes]) -> Image.Image:
    # Imports what formats need, as reading EXIF does.
    return Image.open(binary)


def tolerating_warnings(decode: Callable[[], T]) -> T:
    """What a function of Pillow's returns, if it only warns, even where warnings are errors.

    Pillow warns of odd metadata, and of pictures with very many pixels. What becomes of a warning
    is for the filters of the process to say, which are shared by all threads and so are left alone:
    where they make one an exception, it is noted as given, at its place in Pillow and with its
    text, and the function is called again. A filter for ``DecompressionBombWarning`` itself, as
    Pillow advises, is a wish about pictures, and granted; one for every warning is not.
    """
    for _ in range(_MOST_WARNINGS):
        try:
            return decode()
        except Image.DecompressionBombWarning as warning:
            if _is_refused_by_name(Image.DecompressionBombWarning):
                raise
            _note_as_given(warning)
        except Warning as warning:
            _note_as_given(warning)
    return decode()


def _is_refused_by_name(category: type[Warning]) -> bool:
    """Whether the filter that acts on a category of warnings names it, and no wider one."""
    acting = next((one for one in warnings.filters if issubclass(category, one[2])), None)
    return acting is not None and acting[2] is category


def _note_as_given(warning: Warning) -> None:
    place = warning.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    # What the warnings module keeps in each module that has warned.
    given = place and place.tb_frame.f_globals.get("__warningregistry__")
    if place is None or not isinstance(given, dict):
        raise warning
    given[str(warning), type(warning), place.tb_lineno] = True


def shortened(name: str) -> str:
    """A path or URI of any length, for a message."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{name[:half]}…{name[-half:]} ({len(name)} characters)"


def _checked_path(source: str | os.PathLike[str]) -> str:
    name = type(source).__name__
    try:
        path = os.fsdecode(source)
        name = shortened(path)
        status = os.stat(path)  # noqa: PTH116
    except Exception as error:
        # A file system has many errors, and an object of a caller's own class any.
        if isinstance(source, str) and _URL.match(source):
            raise ImageDecodeError(
                f"{name} is a URL, and nothing is downloaded here: pass the path of a file, or "
                f"the picture's bytes."
            ) from error
        if isinstance(error, FileNotFoundError):
            what = f"{name} is missing. Give the path of a picture file."
        else:
            what = f"{name} cannot be opened ({getattr(error, 'strerror', None) or error})."
        raise ImageDecodeError(what) from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageDecodeError(f"{name} is a directory. Give the path of a picture file.")
    if not stat.S_ISREG(status.st_mode):
        raise ImageDecodeError(
            f"{name} is a pipe, a socket or a device. Give the path of a picture file, or open it "
            f"and pass the file object."
        )
    if status.st_size == 0:
        raise ImageDecodeError(f"{name} is empty (0 bytes). Copy the picture again.")
    return path


def _from_data_uri(uri: str) -> bytes:
    """The bytes of a data URI (RFC 2397), its base64 read as browsers do (WHATWG Infra)."""
    from urllib.parse import unquote_to_bytes  # Rarely needed.

    header, comma, payload = uri[len(_DATA) :].partition(",")
    try:
        data = unquote_to_bytes(payload)
        if header.rpartition(";")[2].strip().lower() == "base64":
            data = b"".join(data.split())
            if len(data) % 4 == 0:
                data = re.sub(rb"==?$", b"", data)
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise ImageDecodeError(
            f"The data URI {shortened(uri)} cannot be decoded ({error})."
        ) from error
    if not comma or not data:
        raise ImageDecodeError(
            f"The data URI {shortened(uri)} holds no data: data:image/png;base64,... is one."
        )
    return data


def read_file(file: IO[bytes]) -> bytes:
    """All bytes of a file object, from its start where it can go back there.

    Raises:
        ImageDecodeError: it cannot be read, or gives something else.
    """
    name: Any = type(file).__name__
    try:
        name = getattr(file, "name", None) or name
        _rewind(file)
        data: Any = file.read()
        if isinstance(data, Bytes):
            data = _read_on(file, bytes(data))
    # A closed file raises ValueError, an OS or archive reader its own exceptions.
    except Exception as error:
        raise ImageDecodeError(f"The file object {name!r} cannot be read ({error}).") from error
    if isinstance(data, bytes):
        return data
    kind = type(data).__name__
    if kind == "coroutine":
        data.close()
        raise ImageDecodeError(
            f"The file object {name!r} is asynchronous: pass what its read() gives, or its .file."
        )
    raise ImageDecodeError(
        f"The file object {name!r} gives {kind}, not bytes: open it with 'rb', to block."
    )


def _rewind(file: IO[bytes]) -> None:
    """To the start, where the file can: uploads, maps and archives may lack ``seekable``."""
    # One that says it can and then fails is broken.
    missing = AttributeError, NotImplementedError
    known = False
    try:
        known = file.seekable()
        if not known:
            return
    except missing:
        pass
    try:
        file.seek(0)
    except (*missing, io.UnsupportedOperation):
        if known:
            raise


def _read_on(file: IO[bytes], data: bytes) -> bytes:
    """What follows ``data`` in a file whose ``read()`` may stop early."""
    parts = [data]
    if not isinstance(file, io.BufferedIOBase):
        while part := file.read():
            # An object that gives the same again has no position, and no end.
            if part == parts[-1]:
                break
            parts.append(bytes(part))
    return b"".join(parts)
