"""Reads Protocol Buffers' wire format without trusting it, and without a library.

What a message holds is data: a `Message` maps field numbers to a name and a kind. Fields it does
not name are stepped over, so a tensor's gigabytes of raw data are never touched. Stricter than
Protocol Buffers where that leaves two readers to disagree: a field that comes once only must not
come twice, and a known field has its own wire type.

Format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOST_FIELDS = 2_000_000
"""Fields of a file, all levels together; a tower of 40 layers has some 10,000."""

DEEPEST = 64
"""Messages inside each other."""

LONGEST_TEXT = 1 << 16
"""Bytes of a name."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """Bytes that are no such message; never leaves `vistower.bundle`."""


@dataclass(frozen=True)
class Field:
    """A field worth reading: its name, whether it repeats, and its kind.

    ``kind`` is ``int``, ``text``, or the name of a message of the same table.
    """

    name: str
    kind: str
    repeated: bool = False


Message = Mapping[int, Field]


def parse(data: memoryview, messages: Mapping[str, Message], kind: str) -> dict[str, Any]:
    """A message as a dictionary: name → value, or list of values of a repeated field.

    Args:
        data: the bytes.
        messages: the table of messages.
        kind: the one that this is.

    Raises:
        WireError: it is none, or larger or deeper than the limits.
    """
    return _Parser(messages).message(data, kind, 0)


class _Parser:
    def __init__(self, messages: Mapping[str, Message]) -> None:
        self._messages = messages
        self._left = MOST_FIELDS

    def _spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise WireError(f"more than {MOST_FIELDS} fields")

    def message(self, data: memoryview, kind: str, depth: int) -> dict[str, Any]:
        if depth > DEEPEST:
            raise WireError(f"messages nested deeper than {DEEPEST}")
        known = self._messages[kind]
        found: dict[str, Any] = {field.name: [] for field in known.values() if field.repeated}
        for number, wire, value in fields(data):
            self._spend()
            field = known.get(number)
            if field is None:
                continue
            if field.kind == "int" and field.repeated and not isinstance(value, int):
                if wire != _LENGTH:
                    raise WireError(f"{field.name} has wire type {wire}")
                found[field.name] += self._packed(value)
                continue
            one = self._value(field, wire, value, depth)
            if field.repeated:
                found[field.name].append(one)
            elif field.name in found:
                raise WireError(f"{field.name} comes twice in one {kind}")
            else:
                found[field.name] = one
        return found

    def _value(self, field: Field, wire: int, value: int | memoryview, depth: int) -> Any:
        if isinstance(value, int):
            if field.kind == "int" and wire == _VARINT:
                return _signed(value)
        elif wire == _LENGTH and field.kind == "text":
            if len(value) > LONGEST_TEXT:
                raise WireError(f"{field.name} of {len(value)} bytes")
            text = str(value, "utf-8")
            # Whoever runs the file will show such a name in messages and logs of its own.
            if not text.isprintable():
                raise WireError(f"{field.name} {text!r}, which is not printable")
            return text
        elif wire == _LENGTH and field.kind != "int":
            return self.message(value, field.kind, depth + 1)
        raise WireError(f"{field.name} has wire type {wire}")

    def _packed(self, data: memoryview) -> Iterator[int]:
        position = 0
        while position < len(data):
            self._spend()
            value, position = _varint(data, position)
            yield _signed(value)


def fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Field number, wire type and value of each field of a message, in their order.

    A value is a whole number (unsigned), or the bytes of a field of that kind.

    Raises:
        WireError: a field that is cut off, or of an unknown wire type.
    """
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise WireError(f"field number {number}")
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, wire, value
            continue
        if wire == _LENGTH:
            size, position = _varint(data, position)
        elif wire == _FIXED64:
            size = 8
        elif wire == _FIXED32:
            size = 4
        else:
            raise WireError(f"wire type {wire}")
        if size > end - position:
            raise WireError("cut off in the middle of a field")
        yield number, wire, data[position : position + size]
        position += size


def edited(data: memoryview, path: tuple[int, ...], change: Callable[[memoryview], bytes]) -> bytes:
    """The message with every sub-message at a path of field numbers changed, all else as it is.

    Raises:
        WireError: see `fields`.
    """
    if not path:
        return change(data)
    parts: list[bytes | memoryview] = []
    for number, wire, value in fields(data):
        if number == path[0] and wire == _LENGTH and not isinstance(value, int):
            value = memoryview(edited(value, path[1:], change))
        parts += field_bytes(number, wire, value)
    return b"".join(parts)


def field_bytes(
    number: int, wire: int, value: int | bytes | memoryview
) -> list[bytes | memoryview]:
    """A field as it is written: its key, for bytes of any length that length, its value."""
    key = _encoded(number << 3 | wire)
    if isinstance(value, int):
        return [key, _encoded(value)]
    return [key, _encoded(len(value)), value] if wire == _LENGTH else [key, value]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise WireError("cut off in the middle of a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 63:
            raise WireError("a number of more than ten bytes")
    if value >= 1 << 64:
        raise WireError("a number of more than 64 bits")
    return value, position


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
