"""ONNX Runtime on torch's own export: what a user has without an exporter of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

from benchmarks.backends.base import Array, Context, HuggingFacePixels


class PlainOrt(HuggingFacePixels):
    """A default session (all graph optimizations, spinning workers) on the plain export."""

    def __init__(self, context: Context, precision: str = "fp32") -> None:
        """``precision`` only says whether CUDA may use TF32."""
        super().__init__(context)
        self.precision = precision

    def settings(self) -> dict[str, Any]:
        """Providers and threads."""
        return {
            "onnxruntime": onnxruntime.__version__,
            "providers": self.session.get_providers(),
            "threads": self.context.threads,
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "precision": self.precision,
        }

    def providers(self) -> list[Any]:
        """The execution providers, in order."""
        if self.context.device == "cpu":
            return ["CPUExecutionProvider"]
        tf32 = "1" if self.precision == "tf32" else "0"
        return [("CUDAExecutionProvider", {"use_tf32": tf32}), "CPUExecutionProvider"]

    def open(self) -> None:
        """Make the session; a provider that silently falls back to another is an error."""
        if self.context.device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.context.threads
        options.log_severity_level = 3
        providers = self.providers()
        self.session = onnxruntime.InferenceSession(
            str(self.context.plain), options, providers=providers
        )
        first = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if self.session.get_providers()[0] != first:
            raise RuntimeError(
                f"{first} was asked for; the session has {self.session.get_providers()}."
            )

    def run(self, inputs: Array) -> Any:
        """One run; on a GPU with IO binding, so that the tokens stay there."""
        if self.context.device == "cpu":
            return self.session.run(["last_hidden_state"], {"pixel_values": inputs})[0]
        binding = self.session.io_binding()
        binding.bind_cpu_input("pixel_values", inputs)
        binding.bind_output("last_hidden_state", "cuda")
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.get_outputs()[0]

    def get(self, outputs: Any) -> Array:
        """The tokens, copied from the GPU if they are there."""
        array = outputs if self.context.device == "cpu" else outputs.numpy()
        return np.asarray(array, dtype=np.float32)


class TensorRt(PlainOrt):
    """TensorRT through ONNX Runtime's provider, engines kept beside the graph."""

    def providers(self) -> list[Any]:
        """TensorRT, with what it cannot take on CUDA."""
        cache = self.context.plain.parent / "tensorrt"
        options = {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_builder_optimization_level": "5",
        }
        return [("TensorrtExecutionProvider", options), *super().providers()]
