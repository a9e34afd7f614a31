"""What every backend can do: the same verbs, whatever library is behind them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Context:
    """What a backend gets: the files of one model, and the machine it may use.

    ``artifacts`` is the folder `benchmarks.artifacts` filled; ``threads`` the CPU cores every
    backend gets; ``device`` ``cpu`` or ``cuda``.
    """

    artifacts: Path
    model: str
    family: str
    threads: int
    device: str

    @property
    def checkpoint(self) -> Path:
        """The Hugging Face checkpoint, with its processor."""
        return self.artifacts / "checkpoints" / self.model

    @property
    def bundle(self) -> Path:
        """Our export of it."""
        return self.artifacts / "bundles" / self.model

    @property
    def plain(self) -> Path:
        """torch's own export of it (``dynamo=True``), with no fusion by us."""
        return self.artifacts / "plain" / self.model / "model.onnx"

    @property
    def projected(self) -> Path:
        """A folder as fastembed wants it: torch's export with CLIP's projection on top."""
        return self.artifacts / "projected" / self.model


class Backend(ABC):
    """One backend in its process.

    ``embeds`` names what `embed` gives: ``tokens`` is last_hidden_state (B, T, D), ``features``
    its CLS and patch tokens (B, 1 + N, D), ``projected`` the normalized projection of CLIP's
    pooled CLS token (B, 512). `run` gives tokens; where ``model_only`` is off there is no `run`.
    """

    embeds = "tokens"
    model_only = True

    def __init__(self, context: Context) -> None:
        """Remember the context; load nothing."""
        self.context = context

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings that matter for speed, as the library was told them."""

    @abstractmethod
    def open(self) -> None:
        """Load the model, ready to run."""

    def prepare(self, batch: int) -> None:  # noqa: B027
        """Get ready for one batch size, untimed: compile, reshape or capture for it."""

    def put(self, pixel_values: Array) -> Any:
        """Hand over (B, 3, H, W) float32 in the form `run` likes best, in host memory; untimed."""
        return pixel_values

    def run(self, inputs: Any) -> Any:
        """One forward pass, finished when it returns, tokens left on the device; timed.

        On a GPU it starts with the upload of the pixels.
        """
        raise NotImplementedError(f"{type(self).__name__} embeds files only.")

    def get(self, outputs: Any) -> Array:
        """The outputs of `run` as float32 (B, T, D) in host memory; untimed."""
        return np.asarray(outputs, dtype=np.float32)

    def open_files(self) -> None:  # noqa: B027
        """Load what turns picture files into pixels, where `open` has not."""

    @abstractmethod
    def embed(self, files: Sequence[Path]) -> Array:
        """Picture files → what ``embeds`` names, as a NumPy array; timed."""


class HuggingFacePixels(Backend):
    """A backend without preprocessing of its own: it borrows the Hugging Face processor."""

    tensors = "np"

    def open_files(self) -> None:
        """Load the checkpoint's own processor; under transformers 4.57 the fast one, as 5 does."""
        import transformers

        old = int(transformers.__version__.split(".")[0]) < 5
        self.processor = transformers.AutoImageProcessor.from_pretrained(
            self.context.checkpoint, local_files_only=True, **({"use_fast": True} if old else {})
        )

    def pixels(self, files: Sequence[Path]) -> Any:
        """Decode with Pillow, then the processor, as its documentation shows."""
        from PIL import Image

        images = []
        for file in files:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        return self.processor(images=images, return_tensors=self.tensors)["pixel_values"]

    def embed(self, files: Sequence[Path]) -> Array:
        """Pixels, one forward pass, tokens."""
        return self.get(self.run(self.pixels(files)))
