"""optimum's ORTModelForFeatureExtraction, in its own environment (it needs transformers < 4.58)."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction

from benchmarks.backends.base import Array, HuggingFacePixels


class OptimumOrt(HuggingFacePixels):
    """CLIP as optimum exports it; DINOv3, which it does not know, from our portable graph."""

    tensors = "pt"

    def settings(self) -> dict[str, Any]:
        """Versions, threads and where the graph came from."""
        return {
            "optimum-onnx": importlib.metadata.version("optimum-onnx"),
            "onnxruntime": onnxruntime.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "threads": self.context.threads,
            "graph": "its own export" if self.context.family == "clip" else "our portable graph",
        }

    def open(self) -> None:
        """Open the graph with every core."""
        torch.set_num_threads(self.context.threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.context.threads
        options.log_severity_level = 3
        if self.context.family == "clip":
            directory, subfolder = self.context.artifacts / "optimum" / self.context.model, ""
        else:
            directory, subfolder = self.context.bundle, "onnx"
        self.model = ORTModelForFeatureExtraction.from_pretrained(
            directory,
            file_name="model.onnx",
            subfolder=subfolder,
            session_options=options,
            local_files_only=True,
        )

    def put(self, pixel_values: Array) -> torch.Tensor:
        """A tensor that shares the array's memory."""
        return torch.from_numpy(pixel_values)

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        """Its own forward."""
        state: torch.Tensor = self.model(pixel_values=inputs).last_hidden_state
        return state

    def get(self, outputs: torch.Tensor) -> Array:
        """Without a copy."""
        return np.asarray(outputs.numpy(), dtype=np.float32)
