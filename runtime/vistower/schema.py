"""Rules that a parsed JSON file must keep, as data: types, ranges, lengths, patterns, known keys.

A rule is a small record; rules are nested as the file is. ``rule.check(value, where)`` raises
`SchemaError`, which names the place and the value. Nothing is converted: ``true`` is no number,
``16.0`` no whole one, and text holds printable characters only (see `vistower.printable`).
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

LONGEST_TEXT = 4096
"""Characters of a text where its rule names no other number: a path, a calibration's label."""


class SchemaError(ValueError):
    """A value breaks its rule; always caught where a file is read."""


class Rule(Protocol):
    """What a value must be."""

    def check(self, value: Any, where: str) -> None:
        """Raise `SchemaError` where the value is not so; ``where`` is its place in the file."""


def _broken(where: str, value: Any, wanted: str) -> SchemaError:
    return SchemaError(f"{where} is {reprlib.repr(value)}; it must be {wanted}")


@dataclass(frozen=True)
class Whole:
    """A whole number of a range."""

    low: int
    high: int

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        number = isinstance(value, int) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:
            raise _broken(where, value, f"a whole number from {self.low} to {self.high}")


@dataclass(frozen=True)
class Real:
    """A finite number of a range."""

    low: float = -math.inf
    high: float = math.inf

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not self.low <= value <= self.high:
            raise _broken(where, value, f"a finite number from {self.low:g} to {self.high:g}")


@dataclass(frozen=True)
class Flag:
    """``true`` or ``false``."""

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        if type(value) is not bool:
            raise _broken(where, value, "true or false")


@dataclass(frozen=True)
class Text:
    """Printable text that a regular expression matches whole; ``wanted`` says it in words."""

    pattern: str = ".*"
    wanted: str = "text"
    longest: int = LONGEST_TEXT

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        if not isinstance(value, str) or len(value) > self.longest or not value.isprintable():
            raise _broken(
                where, value, f"{self.wanted}, printable, of at most {self.longest} characters"
            )
        if re.fullmatch(self.pattern, value) is None:
            raise _broken(where, value, self.wanted)


@dataclass(frozen=True)
class Choice:
    """One of some texts."""

    values: Collection[str]

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        if not isinstance(value, str) or value not in self.values:
            raise _broken(where, value, f"one of {', '.join(self.values)}")


@dataclass(frozen=True)
class Maybe:
    """``null``, or what the rule says."""

    rule: Rule

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        if value is not None:
            self.rule.check(value, where)


@dataclass(frozen=True)
class ListOf:
    """An array of so many items."""

    item: Rule
    shortest: int
    longest: int

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        if not isinstance(value, (list, tuple)) or not self.shortest <= len(value) <= self.longest:
            raise _broken(where, value, f"an array of {self.shortest} to {self.longest} items")
        for index, item in enumerate(value):
            self.item.check(item, f"{where}[{index}]")


@dataclass(frozen=True)
class MapOf:
    """An object with keys of one rule and values of another."""

    key: Rule
    value: Rule
    fewest: int
    most: int

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        if not isinstance(value, dict) or not self.fewest <= len(value) <= self.most:
            raise _broken(where, value, f"an object of {self.fewest} to {self.most} entries")
        for key, item in value.items():
            self.key.check(key, f"a key of {where}")
            self.value.check(item, f"{where}.{key}")


@dataclass(frozen=True)
class Record:
    """An object with these keys, all there. Of an ``open`` one any may be missing, and others
    may be there too: a file that is not ours alone."""

    fields: Mapping[str, Rule]
    open: bool = False

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        if not isinstance(value, dict):
            raise _broken(where, value, "an object")
        inside = f"{where}." if where else ""
        if not self.open:
            if missing := self.fields.keys() - value.keys():
                raise SchemaError(f"{inside}{min(missing)} is missing")
            if unknown := value.keys() - self.fields.keys():
                raise SchemaError(f"{inside}{reprlib.repr(min(unknown))} is not a known key")
        for key, rule in self.fields.items():
            if key in value:
                rule.check(value[key], f"{inside}{key}")


@dataclass(frozen=True)
class Either:
    """What one of two rules says."""

    first: Rule
    second: Rule

    def check(self, value: Any, where: str) -> None:
        """See `Rule`."""
        try:
            self.first.check(value, where)
        except SchemaError as error:
            try:
                self.second.check(value, where)
            except SchemaError as other:
                raise SchemaError(f"{error}; or: {other}") from other
