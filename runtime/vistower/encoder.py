"""`VisionEncoder`: pictures in, CLS and patch tokens out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.bundle import Bundle, find_bundle
from vistower.errors import EmptyInputError, ImageFormatError
from vistower.images import ImageInput
from vistower.preprocess import Preprocessor
from vistower.session import DeviceLike, Session
from vistower.tokens import TokenLayout

logger = logging.getLogger("vistower")

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Embeddings:
    """What one forward pass says of a batch of B pictures.

    ``cls`` (B, D) and ``patches`` (B, N, D), float32, patches row-major from the top left; both
    are the rows of ``last_hidden_state`` as the Hugging Face class returns it (CLIP: raw encoder
    output; DINOv3: after the final norm), neither projected nor normalized.
    """

    cls: Array
    patches: Array

    def __len__(self) -> int:
        return len(self.cls)


class VisionEncoder:
    """A vision tower ready to run. Thread-safe; picklable (it reopens its bundle)."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        """Join a bundle and a session; `open` is the usual way."""
        self.bundle = bundle
        self.session = session
        self.layout: TokenLayout = bundle.layout
        self.processor: Preprocessor = bundle.preprocessor

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        device: DeviceLike = "auto",
        graph: str | None = None,
        threads: int | None = None,
    ) -> VisionEncoder:
        """Open a bundle.

        Args:
            bundle: a bundle's directory, or a hub id or checkpoint directory whose bundle is in
                the cache. Nothing is downloaded or exported.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or a ``torch.device``. Only ``auto``
                chooses; the others are had or refused.
            graph: ``portable`` or ``ort``; None for the fastest the bundle has.
            threads: CPU threads inside one run; None for all this process may use.

        Raises:
            BundleNotFoundError, BundleCorruptError, BundleUnsupportedError: see `find_bundle`.
            DeviceError: the device cannot be had.
        """
        found = find_bundle(bundle)
        encoder = cls(found, Session(found.graph(graph), device, threads))
        weights = "random-weight " if found.manifest and found.manifest.source.random_weight else ""
        logger.info(
            "%s%s on %s (%s)",
            weights,
            found.name,
            encoder.device,
            encoder.session.provider,
        )
        return encoder

    def __reduce__(self) -> tuple[Any, ...]:
        session = self.session
        return _reopen, (self.bundle.directory, str(session.device), session.graph, session.threads)

    def __repr__(self) -> str:
        return f"VisionEncoder({self.bundle.name!r}, device={self.device!r})"

    @property
    def device(self) -> str:
        """Where it runs: ``cpu`` or ``cuda:N``."""
        return str(self.session.device)

    def preprocess(self, images: ImageInput | Iterable[ImageInput]) -> Array:
        """Pictures → ``pixel_values`` (B, 3, H, W) float32, as the Hugging Face processor's.

        Args:
            images: one picture or several. A picture is a PIL image of any mode the processor
                takes, an H×W×3 uint8 array, or a path (opened with its EXIF orientation applied).

        Raises:
            EmptyInputError: no picture.
            ImageDecodeError, ImageFormatError: a picture cannot be used.
        """
        return self._preprocess(_as_list(images))

    def _preprocess(self, images: list[ImageInput]) -> Array:
        height, width = self.layout.image_size
        pixel_values = np.empty((len(images), 3, height, width), dtype=np.float32)
        for image, out in zip(images, pixel_values, strict=True):
            self.processor(image, out=out)
        return pixel_values

    def encode(
        self, images: ImageInput | Iterable[ImageInput], *, batch_size: int = 32
    ) -> Embeddings:
        """Embed one picture or several; one forward pass per batch gives CLS and patches.

        Args:
            images: as for `preprocess`.
            batch_size: pictures per forward pass; bounds memory, not the number of pictures.

        Raises:
            EmptyInputError: no picture.
            ImageDecodeError, ImageFormatError: a picture cannot be used.
            InferenceError: ONNX Runtime failed.
        """
        if batch_size < 1:
            raise EmptyInputError(f"batch_size={batch_size} was asked for; it must be at least 1.")
        pictures = _as_list(images)
        states = [
            self.forward(self._preprocess(pictures[start : start + batch_size]))
            for start in range(0, len(pictures), batch_size)
        ]
        state = states[0] if len(states) == 1 else np.concatenate(states)
        return Embeddings(cls=self.layout.cls(state), patches=self.layout.patches(state))

    def forward(self, pixel_values: Array) -> Array:
        """``pixel_values`` (B, 3, H, W) float32 → ``last_hidden_state`` (B, T, D) float32.

        Raises:
            ImageFormatError: another shape or dtype.
            InferenceError: ONNX Runtime failed.
        """
        expected = (3, *self.layout.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected or not len(pixel_values):
            raise ImageFormatError(
                f"pixel_values has shape {pixel_values.shape}; this tower takes (B, "
                f"{', '.join(map(str, expected))}) with B ≥ 1, as preprocess() returns it."
            )
        if pixel_values.dtype != np.float32:
            raise ImageFormatError(
                f"pixel_values is {pixel_values.dtype}; pass .astype(numpy.float32)."
            )
        return self.session.run(np.ascontiguousarray(pixel_values))


def _reopen(directory: Path, device: str, graph: Path, threads: int) -> VisionEncoder:
    return VisionEncoder(Bundle.load(directory), Session(graph, device, threads))


def _as_list(images: ImageInput | Iterable[ImageInput]) -> list[ImageInput]:
    if isinstance(images, (Image.Image, str, os.PathLike)):
        return [cast("ImageInput", images)]
    if isinstance(images, np.ndarray):
        if images.ndim == 4:
            images = list(images)
        else:
            return [images]
    if not isinstance(images, Iterable):
        raise ImageFormatError(
            f"{type(images).__name__} is no picture. Pass a PIL image, an H×W×3 uint8 array, a "
            f"path, or several of them."
        )
    pictures = list(images)
    if not pictures:
        raise EmptyInputError("There is no picture to embed: the batch is empty.")
    return pictures
