"""Where CLS, register and patch tokens lie in ``last_hidden_state``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from vistower.families.record import LAST_HIDDEN_STATE

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TokenLayout:
    """The order of tokens along axis 1: CLS if there is one, then registers, then patches row by
    row.

    ``image_size`` is (height, width) in pixels, ``patch_size`` in pixels.
    """

    image_size: tuple[int, int]
    patch_size: int
    num_register_tokens: int
    hidden_size: int
    num_cls_tokens: int = 1

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers: the tokens before the first patch."""
        return self.num_cls_tokens + self.num_register_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one picture, N."""
        rows, columns = self.grid
        return rows * columns

    @property
    def num_tokens(self) -> int:
        """Length of the token axis, T."""
        return self.num_prefix_tokens + self.num_patches

    def shape(self, output: str) -> tuple[int, ...] | None:
        """Shape of an output without the batch, as far as it follows from the layout."""
        return (self.num_tokens, self.hidden_size) if output == LAST_HIDDEN_STATE else None

    def cls(self, last_hidden_state: Array) -> Array:
        """The CLS token, which there must be: a view (B, D) of (B, T, D)."""
        return last_hidden_state[:, 0]

    def registers(self, last_hidden_state: Array) -> Array:
        """The register tokens: a view (B, R, D) of (B, T, D)."""
        return last_hidden_state[:, self.num_cls_tokens : self.num_prefix_tokens]

    def patches(self, last_hidden_state: Array) -> Array:
        """The patch tokens: a view (B, N, D) of (B, T, D), row-major from the top left."""
        return last_hidden_state[:, self.num_prefix_tokens :]
