"""Graphs of a tower in the staging directory: every form, at every resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.execution.session import Session
from vistower.preprocess.processor import Preprocessor
from vistower.tokens import TokenLayout
from vistower.tolerance import GraphPrecision
from vistower_export.forms import HALVES, ORT, GraphForm
from vistower_export.graph import WrittenGraph, write_graph
from vistower_export.parity import ON_CPU
from vistower_export.quantize import Quantization
from vistower_export.store import WeightStore
from vistower_export.weights import Arranged

GRAPH_DIRECTORY = "onnx"
TRIAL_DIRECTORY = "trial"
"""Where graphs lie that are run and thrown away: stand-ins, and candidates for int8."""

Array = npt.NDArray[np.float32]
Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class View:
    """A tower at one input size: where its tokens lie, and the runtime's processor for it."""

    layout: TokenLayout
    preprocessor: Preprocessor

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.layout.image_size


@dataclass(frozen=True)
class Written:
    """A graph in the staging directory.

    ``emulated`` is a stand-in that the CPU can run, where it cannot run the graph itself.
    """

    name: str
    form: GraphForm
    view: View
    path: Path
    nodes: int
    domains: tuple[str, ...]
    float_products: tuple[str, ...] = ()
    calibration: str | None = None
    emulated: Path | None = None

    @property
    def method(self) -> str:
        """What the parity gate runs in its place, for the certificate."""
        if self.emulated is None:
            return ON_CPU
        return (
            f"emulated in float32 on the CPU: weights and every operator's result rounded to "
            f"{self.form.precision}, the inside of an operator not. Confirm it on the device with "
            f"`vistower verify --device cuda`"
        )


@dataclass(frozen=True)
class Calibrated:
    """Smoothed towers, one a view, what of them is quantized, and by which pictures."""

    towers: tuple[Arranged, ...]
    quantization: Quantization
    float_products: tuple[str, ...]
    pictures: str


class Graphs:
    """Writes graphs of any form and view to the staging directory, one weight file a precision."""

    def __init__(self, staging: Path, views: Sequence[View]) -> None:
        """Graphs for these views, the default one first."""
        self.directory = staging / GRAPH_DIRECTORY
        self.directory.mkdir()
        self.views = views
        self.written: list[Written] = []
        self._stores: dict[str, WeightStore] = {}

    def trial(self, name: str, graph: WrittenGraph) -> Path:
        """Save a graph that is run and thrown away, with its own weight file."""
        path = self.directory.with_name(TRIAL_DIRECTORY) / f"{name}.onnx"
        path.parent.mkdir(exist_ok=True)
        weights = path.with_suffix(".data")
        weights.unlink(missing_ok=True)
        WeightStore(weights).save(graph.model, path)
        return path

    def save(self, form: GraphForm, graph: WrittenGraph, file: str) -> Path:
        """Write a graph file whose matrices go to the weight file of its form."""
        store = self._stores.setdefault(form.weights, WeightStore(self.directory / form.weights))
        path = self.directory / file
        store.save(graph.model, path)
        return path

    def write(
        self, form: GraphForm, towers: Sequence[Arranged], calibrated: Calibrated | None = None
    ) -> None:
        """Write a form for every view; ``towers`` are one a view."""
        for view, tower in zip(self.views, towers, strict=True):
            extra = "" if view is self.views[0] else f"{view.size[0]}x{view.size[1]}"
            graph = write_graph(
                tower, form, quantization=calibrated.quantization if calibrated else None
            )
            path = self.save(form, graph, f"{form.file}{extra and '_' + extra}.onnx")
            emulated = None
            if form.precision in HALVES:
                stand_in = write_graph(tower, form, emulate=True)
                emulated = self.trial(f"{form.name}{extra}", stand_in)
            self.written.append(
                Written(
                    name=f"{form.name}{extra and '@' + extra}",
                    form=form,
                    view=view,
                    path=path,
                    nodes=len(graph.model.graph),
                    domains=tuple(sorted(graph.model.opset_imports)),
                    float_products=calibrated.float_products if calibrated else (),
                    calibration=calibrated.pictures if calibrated else None,
                    emulated=emulated,
                )
            )

    @property
    def weight_bytes(self) -> int:
        """Size of the float32 matrices."""
        return self._stores[ORT.weights].nbytes


def least_bytes(config: Mapping[str, Any], precisions: Sequence[GraphPrecision]) -> int:
    """Bytes that the matrices of a bundle take on the disk; 0 where ``config.json`` leaves it open.

    A full disk is found before the work, as far as this tells: biases, graphs and golden vectors
    come on top.
    """
    vision = config.get("vision_config")
    tower = vision if isinstance(vision, Mapping) else config
    try:
        hidden, inner = int(tower["hidden_size"]), int(tower["intermediate_size"])
        layers, patch = int(tower["num_hidden_layers"]), int(tower["patch_size"])
    except (KeyError, TypeError, ValueError):
        return 0
    products = 3 if tower.get("use_gated_mlp") else 2
    numbers = layers * (4 * hidden**2 + products * hidden * inner) + 3 * patch**2 * hidden
    return numbers * (4 + sum({"int8": 1}.get(precision, 2) for precision in precisions))


def run(graph: Path, pixel_values: Mapping[str, npt.NDArray[Any]]) -> dict[str, dict[str, Array]]:
    """Every output of every picture; the session ends here: no two are in memory at once."""
    session = Session(graph, "cpu")
    found: dict[str, dict[str, Array]] = {name: {} for name in session.outputs}
    for picture, value in pixel_values.items():
        for name, values in session.compute(value, dict.fromkeys(session.outputs)).items():
            found[name][picture] = values
    return found
