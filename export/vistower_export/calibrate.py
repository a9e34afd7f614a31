"""From calibration pictures to the int8 form of a tower.

The float32 graphs run over the pictures, and what enters their products is watched. Then every
product is quantized, and the int8 graph is compared with the float32 one. Where it is off by more
than int8 may be, the products that lose most are left in float32, as few as it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vistower.execution.ort import onnxruntime
from vistower.families.record import OUTPUTS
from vistower.preprocess.images import ImageInput
from vistower.tolerance import TOLERANCES
from vistower_export.forms import INT8, ORT
from vistower_export.graph import write_graph
from vistower_export.parity import compare, passes
from vistower_export.quantize import (
    Quantization,
    Statistics,
    quantize,
    relative_noise,
)
from vistower_export.towers import exporter
from vistower_export.weights import LEVELS_SITE, PIXELS_SITE, Arranged, Product
from vistower_export.write import Calibrated, Graphs, run

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
        names = [x.name for x in session.get_outputs() if x.name not in OUTPUTS]
        for value in pixel_values:
            for name, seen in zip(names, session.run(names, {"pixel_values": value}), strict=True):
                running.setdefault(name, _Running()).add(seen)
    return {name: seen.statistics() for name, seen in running.items()}


def calibrate(
    graphs: Graphs,
    towers: Sequence[Arranged],
    folded: Sequence[Arranged],
    pictures: Sequence[ImageInput],
    label: str,
    gate: Mapping[str, Array],
) -> Calibrated:
    """Choose the int8 form of a tower's products.

    The ``pictures`` decide the ranges. Those and the gate's, given as ``pixel_values`` by name,
    decide how many products stay in float32. Where pixels are made of uint8 levels, the ``folded``
    towers take those: nothing is lost in them.
    """
    runs = []
    for index, (view, tower) in enumerate(zip(graphs.views, towers, strict=True)):
        graph = write_graph(tower, ORT, observe=True)
        path = graphs.save(ORT, graph, f"observed_{index}.onnx")
        runs.append((path, [view.preprocessor(picture)[None] for picture in pictures]))
    statistics = observe(runs)
    for path, _ in runs:
        path.unlink()
    levels = folded[0].levels
    if levels is not None and PIXELS_SITE in statistics:
        scale, offset = levels.rows(folded[0].config.patch_size)
        statistics[LEVELS_SITE] = statistics[PIXELS_SITE].shifted(-offset).divided(scale)
    how = exporter(folded[0].config.family)
    smoothed = [how.smooth(tower, statistics) for tower in folded]
    tower, even = smoothed[0]
    products = write_graph(tower, ORT).products
    everything = quantize(products, even)
    sample = {str(index): value for index, value in enumerate(runs[0][1])} | dict(gate)
    chosen = _within_tolerance(graphs, tower, products, even, everything, sample)
    return Calibrated(
        towers=tuple(tower for tower, _ in smoothed),
        quantization=chosen,
        float_products=tuple(name for name in products if name not in chosen.linears),
        pictures=label,
    )


def _within_tolerance(
    graphs: Graphs,
    tower: Arranged,
    products: Mapping[str, Product],
    statistics: Mapping[str, Statistics],
    everything: Quantization,
    pixel_values: Mapping[str, Array],
) -> Quantization:
    """The quantization of the first choice of `_kept` that the tolerance allows.

    If there is none, the whole quantization goes on to the gate.
    """
    exact_graph = next(graph.path for graph in graphs.written if graph.form is ORT)
    exact = run(exact_graph, pixel_values)
    for kept in _kept(relative_noise(products, statistics, everything)):
        candidate = everything.without(kept)
        graph = write_graph(tower, INT8, quantization=candidate)
        tokens = run(graphs.trial("candidate", graph), pixel_values)
        if passes(compare(exact, tokens, graphs.views[0].layout), TOLERANCES["int8"]):
            return candidate
    return everything


def _kept(noise: Mapping[str, float]) -> Iterator[list[str]]:
    """Products to keep in float32: none, the noisiest up to half of them, those of one place.

    Noise is an average over tokens. Where one token is far off, its error may come from products
    of no more noise than others: then it is those of one place in all layers, ``up`` say.
    """
    noisiest = sorted(noise, key=lambda name: -noise[name])
    count = 0
    while count <= len(noisiest) // 2:
        yield noisiest[:count]
        count = 2 * count or 1
    places: dict[str, list[str]] = {}
    for name in noisiest:
        places.setdefault(name.rpartition(".")[2], []).append(name)
    yield from places.values()
