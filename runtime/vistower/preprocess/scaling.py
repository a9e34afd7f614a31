"""Rescaling and normalization, as the numbers of a config say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
Triple: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class Scaling:
    """``(level * factor - mean) / std`` by channel; ``mean`` and ``std`` are None without it."""

    factor: float
    mean: Triple | None
    std: Triple | None

    @property
    def scale_and_offset(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The same as ``level * scale + offset``, by channel."""
        mean, std = self.mean or (0.0, 0.0, 0.0), self.std or (1.0, 1.0, 1.0)
        scale = tuple(self.factor / s for s in std)
        return scale, tuple(-m / s for m, s in zip(mean, std, strict=True))
