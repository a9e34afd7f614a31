"""What a processor does by the release of transformers: a bundle follows the one it agrees with.

Read in the sources of 4.57.6, 5.0 to 5.4, 5.12, 5.16 to 5.24.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vistower.errors import ProcessorConfigError


@dataclass(frozen=True, order=True)
class Release:
    """A release of transformers, (major, minor)."""

    major: int
    minor: int

    @classmethod
    def of(cls, version: str) -> Release:
        """The release of a version such as ``4.57.6``.

        Raises:
            ProcessorConfigError: it is no version.
        """
        numbers = re.match(r"(\d{1,4})\.(\d{1,4})", version, re.ASCII)
        if numbers is None:
            raise ProcessorConfigError(f"{version!r} is no version of transformers.")
        return cls(int(numbers[1]), int(numbers[2]))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def has_own_pil_classes(self) -> bool:
        """Whether the PIL classes are not the torchvision ones with another backend.

        They read fewer options, and guess the axis of channels of a PIL image too.
        """
        return self < UNIFIED

    @property
    def normalizes_in_place(self) -> bool:
        """Whether one channel of levels cannot be normalized to three."""
        return self >= Release(5, 18)

    @property
    def converts_arrays(self) -> bool:
        """Whether arrays become RGB too, and may have four channels; alpha is blended on white."""
        return self >= Release(5, 21)


UNIFIED = Release(5, 4)
"""One implementation for both backends, ``image_processing_backends.py``."""

NEWEST = Release(5, 24)
"""What a bundle without a record of it is taken for."""
