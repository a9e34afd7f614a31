"""torch + transformers: eager with SDPA attention, and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from benchmarks.backends.base import Array, Context, HuggingFacePixels

_CLASSES = {"clip": "CLIPVisionModel", "dinov3": "DINOv3ViTModel"}
_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class TorchEager(HuggingFacePixels):
    """The reference: the Hugging Face class in inference mode."""

    tensors = "pt"

    def __init__(self, context: Context, precision: str = "fp32") -> None:
        """Choose dtype and TF32; nothing is loaded."""
        super().__init__(context)
        self.precision = precision
        self.dtype = _DTYPES[precision]

    def settings(self) -> dict[str, Any]:
        """Threads, attention and precision."""
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "attention": "sdpa",
            "precision": self.precision,
        }

    def open(self) -> None:
        """Load the checkpoint."""
        torch.set_num_threads(self.context.threads)
        if self.context.device == "cuda":
            torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        model_class = getattr(transformers, _CLASSES[self.context.family])
        self.model = model_class.from_pretrained(
            self.context.checkpoint,
            dtype=self.dtype,
            attn_implementation="sdpa",
            local_files_only=True,
        )
        self.model.eval().requires_grad_(False).to(self.context.device)
        self.forward = self.model

    def put(self, pixel_values: Array) -> torch.Tensor:
        """A tensor that shares the array's memory; for a GPU in page-locked memory."""
        tensor = torch.from_numpy(pixel_values)
        return tensor.pin_memory() if self.context.device == "cuda" else tensor

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        """Upload where there is a GPU, forward, and wait for it."""
        inputs = inputs.to(self.context.device, non_blocking=True).to(self.dtype)
        with torch.inference_mode():
            state: torch.Tensor = self.forward(pixel_values=inputs).last_hidden_state
        if self.context.device == "cuda":
            torch.cuda.synchronize()
        return state

    def get(self, outputs: torch.Tensor) -> Array:
        """To the host, float32."""
        array: Array = outputs.float().cpu().numpy()
        return array


class TorchCompile(TorchEager):
    """torch.compile, one specialized program per batch size.

    On the CPU Inductor with frozen weights, its documented setting for CPU inference; on the GPU
    ``max-autotune``, which includes CUDA graphs.
    """

    def settings(self) -> dict[str, Any]:
        """Those of eager, and the compiler's."""
        mode = "max-autotune" if self.context.device == "cuda" else "default, freezing"
        return super().settings() | {"mode": mode}

    def open(self) -> None:
        """Load the checkpoint and wrap it; compilation happens at the first run of a shape."""
        import torch._inductor.config

        super().open()
        torch._inductor.config.freezing = True
        mode = "max-autotune" if self.context.device == "cuda" else None
        self.forward = torch.compile(self.model, dynamic=False, mode=mode)

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        """As eager; what CUDA graphs return is overwritten by the next run, so it is copied."""
        state = super().run(inputs)
        return state.clone() if self.context.device == "cuda" else state
