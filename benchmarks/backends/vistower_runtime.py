"""Ours: a bundle's graph through VisionEncoder, from the installed package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.backends.base import Array, Backend, Context
from vistower import VisionEncoder
from vistower.session import onnxruntime


class Vistower(Backend):
    """A graph of the bundle, with the public verbs and their defaults."""

    def __init__(self, context: Context, graph: str) -> None:
        """Choose the graph; nothing is loaded."""
        super().__init__(context)
        self.graph = graph

    def settings(self) -> dict[str, Any]:
        """Provider, threads and graph."""
        return {
            "vistower": importlib.metadata.version("vistower"),
            "onnxruntime": onnxruntime().__version__,
            "provider": self.encoder.session.provider,
            "threads": self.encoder.session.threads,
            "graph": self.graph,
        }

    def open(self) -> None:
        """Open the bundle."""
        self.encoder = VisionEncoder.open(
            self.context.bundle,
            device=self.context.device,
            graph=self.graph,
            threads=self.context.threads,
        )

    def run(self, inputs: Array) -> Array:
        """Its own forward."""
        return self.encoder.forward(inputs)

    def open_files(self) -> None:
        """The preprocessing came with the bundle."""

    def pixels(self, files: Sequence[Path]) -> Array:
        """Its own preprocessing."""
        return self.encoder.preprocess(files)
