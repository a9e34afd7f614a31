"""Statistics of a tower's activations over calibration pictures, for `vistower_export.quantize`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vistower.ort import onnxruntime
from vistower_export.quantize import Statistics

Array = npt.NDArray[np.float32]


class _Running:
    """Smallest, largest, sum and sum of squares by channel, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.low: npt.NDArray[np.float64] = np.array(np.inf)
        self.high: npt.NDArray[np.float64] = np.array(-np.inf)
        self.sum: npt.NDArray[np.float64] = np.array(0.0)
        self.squares: npt.NDArray[np.float64] = np.array(0.0)

    def add(self, value: Array) -> None:
        rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
        self.rows += len(rows)
        self.low = np.minimum(self.low, rows.min(axis=0))
        self.high = np.maximum(self.high, rows.max(axis=0))
        self.sum = self.sum + rows.sum(axis=0)
        self.squares = self.squares + (rows**2).sum(axis=0)

    def statistics(self) -> Statistics:
        mean = self.sum / self.rows
        return Statistics(
            low=self.low.astype(np.float32),
            high=self.high.astype(np.float32),
            mean=mean.astype(np.float32),
            variance=np.maximum(self.squares / self.rows - mean**2, 0).astype(np.float32),
        )


def observe(runs: Iterable[tuple[Path, Iterable[Array]]]) -> dict[str, Statistics]:
    """Run graphs on the CPU and gather what enters their products.

    Args:
        runs: a graph written with ``observe=True``, and ``pixel_values`` (1, 3, H, W) for it;
            one pair per resolution.

    Returns:
        Statistics by value name, over all runs.
    """
    running: dict[str, _Running] = {}
    for graph, pixel_values in runs:
        session = onnxruntime().InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()][1:]
        for value in pixel_values:
            for name, seen in zip(names, session.run(names, {"pixel_values": value}), strict=True):
                running.setdefault(name, _Running()).add(seen)
    return {name: seen.statistics() for name, seen in running.items()}
