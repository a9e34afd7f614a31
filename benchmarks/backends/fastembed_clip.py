"""fastembed's CLIP image model over our random weights, from a local folder."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastembed import ImageEmbedding

from benchmarks.backends.base import Array, Backend


class FastEmbedClip(Backend):
    """Picture files in, one normalized projected embedding each out; it has no other verb."""

    embeds = "projected"
    model_only = False

    def settings(self) -> dict[str, Any]:
        """Version, threads and the model class's name."""
        return {
            "fastembed": importlib.metadata.version("fastembed"),
            "onnxruntime": importlib.metadata.version("onnxruntime"),
            "threads": self.context.threads,
            "model": "Qdrant/clip-ViT-B-32-vision, random weights from a local folder",
        }

    def open(self) -> None:
        """Open the folder as the published model of that name."""
        self.embedding = ImageEmbedding(
            "Qdrant/clip-ViT-B-32-vision",
            threads=self.context.threads,
            specific_model_path=str(self.context.projected),
        )

    def embed(self, files: Sequence[Path]) -> Array:
        """Its own verb, the whole list as one batch."""
        rows = self.embedding.embed([str(file) for file in files], batch_size=len(files))
        return np.stack(list(rows)).astype(np.float32, copy=False)
