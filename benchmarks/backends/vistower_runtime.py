"""Ours: a bundle's graph through VisionEncoder, from the installed package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.backends.base import Array, Backend, Context
from vistower import VisionEncoder
from vistower.execution.ort import onnxruntime
from vistower.execution.providers import SessionOptions


class Vistower(Backend):
    """A graph of the bundle, with the public verbs and their defaults."""

    embeds = "features"

    def __init__(
        self,
        context: Context,
        graph: str,
        *,
        tf32: bool = False,
        cuda_graphs: Sequence[int] = (),
        device: str | None = None,
    ) -> None:
        """Choose graph and options; nothing is loaded. ``cuda_graphs`` are batch sizes."""
        super().__init__(context)
        self.graph = graph
        self.device = device or context.device
        self.options = SessionOptions(
            tf32=tf32, buckets=tuple(cuda_graphs), cuda_graphs=bool(cuda_graphs)
        )

    def settings(self) -> dict[str, Any]:
        """Provider, threads, graph and options."""
        return {
            "vistower": importlib.metadata.version("vistower"),
            "onnxruntime": onnxruntime().__version__,
            "provider": self.encoder.session.provider,
            "threads": self.context.threads,
            "graph": self.graph,
            "options": str(self.options),
        }

    def open(self) -> None:
        """Open the bundle, and capture CUDA graphs where they are asked for."""
        self.encoder = VisionEncoder.open(
            self.context.bundle,
            device=self.device,
            graph=self.graph,
            threads=self.context.threads,
            options=self.options,
        )
        if self.options.cuda_graphs:
            self.encoder.warmup()

    def put(self, pixel_values: Array) -> Array:
        """For a GPU in the session's page-locked memory."""
        if self.context.device == "cpu":
            return pixel_values
        batch: Array = self.encoder.session.empty(len(pixel_values))
        batch[:] = pixel_values
        return batch

    def run(self, inputs: Array) -> Any:
        """Its own forward; on a GPU the tokens stay there."""
        if self.context.device == "cpu":
            return self.encoder.forward(inputs)
        return self.encoder.forward_on_device(inputs)

    def get(self, outputs: Any) -> Array:
        """The tokens, copied from the GPU if they are there."""
        array = outputs if isinstance(outputs, np.ndarray) else outputs.numpy()
        return np.asarray(array, dtype=np.float32)

    def embed(self, files: Sequence[Path]) -> Array:
        """Its own verb, the whole list as one batch."""
        embeddings = self.encoder.encode(files, batch_size=len(files))
        return np.concatenate([embeddings.cls[:, None], embeddings.patches], axis=1)
