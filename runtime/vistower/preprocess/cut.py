"""Files that are cut off where Pillow does not notice: found by their ends.

Every format that Pillow opens was cut at every length, see docs/limits.md: these are all that gave
a picture, and another one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import IO, Any

from PIL import Image

_CHUNK = 1 << 20
_PALETTE = 1 + 3 * 256
_RUN = 0xC0
_SHADES_OF_GREY = 2
_START_OF_CODESTREAM = b"\xff\x4f\xff\x51"
_END_OF_CODESTREAM = b"\xff\xd9"
_COMMENT = re.compile(rb"#[^\r\n]*")


def require_whole(image: Image.Image, file: Any) -> None:
    """Look at the end of a file that Pillow has opened and not yet decoded.

    Args:
        image: what Pillow made of it.
        file: the file, seekable; its position stays as it is.

    Raises:
        OSError: the picture's data are cut off.
    """
    check = _CHECKS.get(image.format or "")
    if check is None:
        return
    position = file.tell()
    try:
        missing = check(image, file)
    finally:
        file.seek(position)
    if missing:
        raise OSError(f"image file is truncated: {missing}")


def _of_text(image: Image.Image, file: IO[bytes]) -> str | None:
    """ASCII grey and colour maps (P2, P3): the last number could have had another digit."""
    file.seek(0)
    if file.read(2) not in (b"P2", b"P3"):
        return None
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if not file.read(1).isdigit():
        return None
    file.seek(0)
    text = file.read()
    if b"#" in re.split(rb"[\r\n]", text)[-1]:
        return None
    magic_and_sizes, samples = 4, image.width * image.height * len(image.getbands())
    words = _COMMENT.sub(b"", text).split()
    # Pillow takes maxval for granted, and refuses larger numbers.
    if len(words) == magic_and_sizes + samples and 10 * int(words[-1]) <= int(words[3]):
        return "its last number may go on"
    return None


def _of_pcx(image: Image.Image, file: IO[bytes]) -> str | None:
    """Eight bits a pixel: the palette is at the end, and without it they count as grey."""
    start = 0
    if image.format == "DCX":
        file.seek(4)
        start = int.from_bytes(file.read(4), "little")
    file.seek(start)
    header = file.read(128)
    if (header[3], header[65]) != (8, 1):
        return None
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _PALETTE))
    if file.read(1) != b"\x0c":
        grey = int.from_bytes(header[68:70], "little") == _SHADES_OF_GREY
        return None if grey else "it has no palette"
    stride = image.width
    if int.from_bytes(header[66:68], "little") != stride:
        stride += stride % 2
    file.seek(start + 128)
    left, run = stride * image.height, None
    for at, byte in enumerate(file.read()):
        if run is not None:
            left, run = left - run, None
        elif byte >= _RUN:
            run = byte - _RUN
        else:
            left -= 1
        if left <= 0 and run is None:
            return None if start + 128 + at < size - _PALETTE else "its palette is incomplete"
    return "it has too few pixels"


def _of_jpeg2000(image: Image.Image, file: IO[bytes]) -> str | None:
    """The codestream's last marker; no two bytes of its packets are the same."""
    file.seek(0)
    start = max(0, file.read(_CHUNK).find(_START_OF_CODESTREAM))
    at = file.seek(0, os.SEEK_END)
    after = b""
    while at > start:
        size = min(_CHUNK, at - start)
        at -= size
        file.seek(at)
        part = file.read(size)
        if _END_OF_CODESTREAM in part + after:
            return None
        after = part[:1]
    return "it has no end of codestream"


_CHECKS: Mapping[str, Callable[[Image.Image, IO[bytes]], str | None]] = {
    "PPM": _of_text,
    "PCX": _of_pcx,
    "DCX": _of_pcx,
    "JPEG2000": _of_jpeg2000,
}
"""Pillow's names of formats → what is missing, if something is."""
