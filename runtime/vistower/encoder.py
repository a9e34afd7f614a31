"""`VisionEncoder`: pictures in, embeddings out."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import replace
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from vistower.arguments import height_and_width, whole_number
from vistower.bundle import Bundle, BundleGraph, find_bundle
from vistower.embeddings import PARTS, Embeddings, Request, absent_parts, request
from vistower.errors import (
    BundleCorruptError,
    BundleNotFoundError,
    DeviceError,
    ImageFormatError,
    NoSuchOutputError,
    OptionError,
    PrecisionError,
)
from vistower.execution.binding import Wanted, Warmed
from vistower.execution.cuda_machine import compute_capability
from vistower.execution.cuda_problems import DeviceChoice, choose_device
from vistower.execution.device import Device, DeviceLike, ProviderLike, parse_providers
from vistower.execution.finite import FiniteGuard
from vistower.execution.providers import SessionOptions
from vistower.execution.replicas import Replicas
from vistower.execution.session import Session
from vistower.families.record import LAST_HIDDEN_STATE
from vistower.forks import uncut
from vistower.output import DeviceArray
from vistower.precision import REDUCED, choose_precision
from vistower.preprocess.images import ImageInput
from vistower.preprocess.processor import Decode, Preprocessor
from vistower.preprocess.several import pictures, streamed
from vistower.stream import OnError, Pipeline, StreamOptions, StreamResult, astream, stream
from vistower.threads import available_cpus, preparing_workers
from vistower.tokens import TokenLayout

logger = logging.getLogger("vistower")

Array = npt.NDArray[np.float32]
_Arguments = ParamSpec("_Arguments")
_Opened = TypeVar("_Opened")


def _once_more(opens: Callable[_Arguments, _Opened]) -> Callable[_Arguments, _Opened]:
    """Try again what failed on a bundle: it may just have been replaced, between two of its files.

    One that is damaged is so again.
    """

    @wraps(opens)
    def open_twice(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Opened:
        with contextlib.suppress(BundleCorruptError, BundleNotFoundError):
            return opens(*arguments, **options)
        return opens(*arguments, **options)

    return open_twice


class VisionEncoder:
    """A vision tower ready to run. Thread-safe; picklable (it reopens its bundle)."""

    def __init__(
        self,
        bundle: Bundle,
        graph: BundleGraph,
        session: Session | Replicas,
        guard: FiniteGuard | None = None,
    ) -> None:
        """Join a bundle, one of its graphs, that graph's session and the guard of its numbers.

        `open` is the usual way.
        """
        self.bundle = bundle
        self.graph = graph
        self.session = session
        self._guard = guard
        self.layout: TokenLayout = bundle.layout_at(graph.resolution)
        self.processor: Preprocessor = bundle.preprocessor_at(graph.resolution, graph.pixels)

    @classmethod
    @uncut
    @_once_more
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        device: DeviceLike = "auto",
        devices: Sequence[DeviceLike] | None = None,
        providers: Sequence[ProviderLike] | None = None,
        precision: str = "auto",
        resolution: Sequence[int] | None = None,
        graph: str | None = None,
        threads: int | None = None,
        options: SessionOptions | None = None,
        decode: Decode = "exact",
        max_pixels: int | None = None,
    ) -> VisionEncoder:
        """Open a bundle.

        Args:
            bundle: a bundle's directory, or a hub id or checkpoint directory whose bundle is in
                the cache. Nothing is downloaded or exported.
            device: ``auto``, ``cpu``, ``openvino``, ``cuda[:N]``, ``tensorrt[:N]``, a
                ``torch.device``, or the index of a CUDA device. Only ``auto`` chooses; the others
                are had or refused.
            devices: several of them, e.g. ``["cuda:0", "cuda:1"]``: each batch is shared out.
            providers: execution providers as ONNX Runtime takes them; the first must be active.
                Give one of ``device``, ``devices`` and ``providers``.
            precision: ``auto``, ``fp32``, ``tf32``, ``fp16``, ``bf16`` or ``int8``, as far as
                device and bundle have it: the table is in `vistower.precision`.
            resolution: (height, width) in pixels of the preprocessed pictures, one of
                ``Bundle.resolutions``; None for the bundle's default.
            graph: a graph by its name in the bundle, whatever it is and wherever it runs; None
                for the fastest of that precision and resolution (TensorRT and OpenVINO
                take ``portable``).
            threads: CPU threads inside one run; None for all this process may use.
            options: how to use the device: memory, batch buckets, CUDA graphs and more.
            decode: ``draft`` decodes large JPEGs scaled down: faster, and only nearly the same
                pixels; see `vistower.preprocess.processor.Preprocessor`.
            max_pixels: pixels of a picture at most, width x height; one with more is refused
                before it is decoded. None for Pillow's own limit: docs/limits.md.

        Raises:
            BundleNotFoundError, BundleCorruptError, BundleUnsupportedError: see `find_bundle`.
            DeviceError: the device cannot be had; its subclass and message say why.
            OptionError: no devices, or a resolution, a number of threads or a limit that is none.
        """
        if devices is not None and (isinstance(devices, str) or not len(devices)):
            raise OptionError(
                f"devices={devices!r} was asked for; it is a list of at least one device, e.g. "
                f"['cuda:0', 'cuda:1']."
            )
        size = None if resolution is None else height_and_width("resolution", resolution)
        if threads is not None:
            threads = whole_number("threads", threads, 1)
        if max_pixels is not None:
            max_pixels = whole_number("max_pixels", max_pixels, 1)
        found = find_bundle(bundle)
        if sum((device != "auto", devices is not None, providers is not None)) > 1:
            raise DeviceError("Give one of device, devices and providers.")
        chosen: list[DeviceChoice] = []
        if providers is None:
            chosen = [choose_device(one) for one in ([device] if devices is None else devices)]
        on = [one.device for one in chosen] or [parse_providers(providers or ())[0]]
        why = f"; auto: {chosen[0].reason}" if chosen and device == "auto" and not devices else ""
        if graph is not None:
            taken = found.graph(graph)
        else:
            taken, options, reason = _choose(found, on, precision, size, options)
            if on[0].on_gpu and precision == "auto":
                why += f"; {taken.precision}: {reason}"
        session: Session | Replicas
        if devices is not None:
            share = max(1, (threads or available_cpus()) // max(1, len(chosen)))
            session = Replicas([Session(taken, one, share, options=options) for one in chosen])
        else:
            one = chosen[0] if chosen else "auto"
            session = Session(taken, one, threads, providers=providers, options=options)
        encoder = cls(found, taken, session, _guard(found, taken, session, options))
        encoder.processor = replace(encoder.processor, decode=decode, max_pixels=max_pixels)
        weights = "random-weight " if found.manifest and found.manifest.source.random_weight else ""
        logger.info(
            "%s%s, graph %s, on %s (%s)%s",
            weights,
            found.name,
            taken.name,
            encoder.device,
            encoder.session.provider,
            why,
        )
        return encoder

    def __reduce__(self) -> tuple[Any, ...]:
        how = {"decode": self.processor.decode, "max_pixels": self.processor.max_pixels}
        return _reopen, (self.bundle.directory, self.graph, self.session, self._guard, how)

    def __repr__(self) -> str:
        return f"VisionEncoder({self.bundle.name!r}, device={self.device!r})"

    @property
    def device(self) -> str:
        """Where it runs: ``cpu``, ``cuda:N``, or several joined by commas."""
        return ",".join(map(str, self.session.devices))

    def warmup(self, batch_sizes: Sequence[int] = ()) -> tuple[Warmed, ...]:
        """Pay first-run costs now, and capture CUDA graphs, as `Session.warmup` does.

        Args:
            batch_sizes: to run; by default the buckets of the options, else one picture.
        """
        return self.session.warmup(batch_sizes)

    def preprocess(self, images: ImageInput | Iterable[ImageInput]) -> Array:
        """Pictures → ``pixel_values`` (B, 3, H, W) float32, as the Hugging Face processor's.

        For a graph that takes uint8, the levels before rescaling and normalization.

        Args:
            images: one picture or several, of one kind or mixed. A picture is a PIL image of any
                mode the processor takes, an array or torch tensor H×W×3 or 3×H×W (with four axes:
                several), or an encoded picture (its EXIF orientation is applied): a path, its
                bytes, or a binary file object; docs/preprocessing.md has the modes and dtypes, and
                what counts as several: lists, iterators, arrays of paths, Series, Arrow columns.

        Raises:
            EmptyInputError: no picture.
            ImageDecodeError, ImageFormatError: a picture cannot be used.
        """
        batches = list(self._prepared(images))
        return batches[0] if len(batches) == 1 else np.concatenate(batches)

    def _empty(self, batch_size: int) -> Array:
        if self.session.input_dtype == self._dtype:
            return self.session.empty(batch_size)
        return np.empty((batch_size, 3, *self.layout.image_size), dtype=self._dtype)

    def _preprocess(self, images: list[ImageInput]) -> Array:
        pixel_values = self._empty(len(images))
        for image, out in zip(images, pixel_values, strict=True):
            self.processor(image, out=out)
        return pixel_values

    def _prepared(
        self, images: ImageInput | Iterable[ImageInput], batch_size: int = sys.maxsize
    ) -> Iterator[Array]:
        """The ``pixel_values`` of up to ``batch_size`` pictures at a time."""
        given = pictures(images)
        if isinstance(given, list):
            for start in range(0, len(given), batch_size):
                yield self._preprocess(given[start : start + batch_size])
            return
        while rows := [self.processor(image) for image in islice(given, batch_size)]:
            yield np.stack(rows, out=self._empty(len(rows)))

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.graph.pixels)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The parts of an embedding that it can give, of cls, patches, registers, pooled,
        projected."""
        absent = absent_parts(
            self.bundle.family, self.layout, self.session.outputs, self.bundle.name
        )
        return tuple(name for name in PARTS if name not in absent)

    def request(
        self, outputs: Sequence[str] | str | None = None, normalize: bool = False
    ) -> Request:
        """What to ask of the graph for these parts of an embedding, see `encode`.

        Raises:
            OptionError: no part, or an unknown one.
            NoSuchOutputError: a part that there cannot be.
        """
        return request(
            outputs,
            normalize,
            self.bundle.family,
            self.layout,
            self.session.outputs,
            self.bundle.name,
        )

    def encode(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 32,
        outputs: Sequence[str] | str | None = None,
        normalize: bool = False,
    ) -> Embeddings:
        """Embed one picture or several; one forward pass per batch gives every part asked for.

        Args:
            images: as for `preprocess`.
            batch_size: pictures per forward pass; bounds memory, not the number of pictures.
            outputs: the parts wanted, of ``cls``, ``patches``, ``registers``, ``pooled`` and
                ``projected``; None for all there are. Where ``patches`` is not among them, no
                patch token is copied or kept.
            normalize: divide every vector and token by its L2 norm.

        Raises:
            EmptyInputError: no picture.
            ImageDecodeError, ImageFormatError: a picture cannot be used.
            InferenceError: ONNX Runtime failed.
            NoSuchOutputError: one of ``outputs`` that this tower has not.
            OptionError: a batch size that is no integer from 1, or no such output at all.
        """
        batch_size = whole_number("batch_size", batch_size, 1)
        wanted = self.request(outputs, normalize)
        return Embeddings.joined(
            [self.embed(batch, wanted) for batch in self._prepared(images, batch_size)]
        )

    def embed(self, pixel_values: Array, wanted: Request) -> Embeddings:
        """``pixel_values`` (B, 3, H, W) → what `request` asks for.

        Raises:
            ImageFormatError, InferenceError, NonFiniteError: see `forward`.
        """
        return wanted.embeddings(self.compute(pixel_values, wanted.wanted))

    def encode_stream(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 32,
        workers: int | None = None,
        prefetch: int = 2,
        on_error: OnError = "raise",
        outputs: Sequence[str] | str | None = None,
        normalize: bool = False,
    ) -> Generator[StreamResult, None, None]:
        """Embed any number of pictures, one result each, in order, in bounded memory.

        Decoding and preprocessing run in ``workers`` threads while the graph runs in another. The
        source is pulled by the thread that asks for results, at most ``batch_size * (1 +
        prefetch)`` pictures past the last one given out, so it may be endless. Closing the
        iterator, or dropping it, ends the threads. A file object is read, and an animation's frame
        copied, when it is pulled; another PIL image or an array must stay as it is until its
        result has come.

        Args:
            images: pictures as for `preprocess`, mixed as they come.
            batch_size: pictures per forward pass.
            workers: threads that decode and preprocess; None for a number that leaves a CPU tower
                its cores and keeps a GPU fed.
            prefetch: batches prepared beyond the one being given out.
            on_error: a picture that cannot be used is raised in its place (``raise``), left out
                (``skip``), or comes as a result that holds the error (``record``).
            outputs: the parts wanted, as for `encode`.
            normalize: as for `encode`.

        Raises:
            NoSuchOutputError, OptionError: at the call.
            ImageFormatError: at the call, if one picture is passed instead of several.
            ImageDecodeError, ImageFormatError: in a picture's place, under ``raise``.
            InferenceError: ONNX Runtime failed; in the place of the batch's first picture.
        """
        source = streamed(images, awaited=False)
        wanted = self.request(outputs, normalize)
        start = self._pipeline(batch_size, workers, prefetch, on_error, wanted)
        return stream(source, start)

    def aencode_stream(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        batch_size: int = 32,
        workers: int | None = None,
        prefetch: int = 2,
        on_error: OnError = "raise",
        outputs: Sequence[str] | str | None = None,
        normalize: bool = False,
    ) -> AsyncGenerator[StreamResult, None]:
        """`encode_stream` for asyncio: ``async for result in encoder.aencode_stream(...)``.

        The event loop pulls the source; give an asynchronous one where the next picture is waited
        for. ``aclose()`` ends the threads; wrap it in ``contextlib.aclosing`` where a loop over it
        may be left early or cancelled, as any asynchronous generator.
        """
        source = streamed(images, awaited=True)
        wanted = self.request(outputs, normalize)
        start = self._pipeline(batch_size, workers, prefetch, on_error, wanted)
        return astream(source, start)

    def _pipeline(
        self,
        batch_size: int,
        workers: int | None,
        prefetch: int,
        on_error: OnError,
        wanted: Request,
    ) -> Callable[[], Pipeline]:
        """Check the arguments now, start the threads later."""
        if workers is None:
            workers = self.preparing_workers
        options = StreamOptions(batch_size, workers, prefetch, on_error)
        return lambda: Pipeline(
            self._empty, self.processor, lambda batch: self.embed(batch, wanted), options
        )

    @property
    def preparing_workers(self) -> int:
        """Threads that decode and preprocess beside the tower, where a caller names no number."""
        return preparing_workers(on_cpu=not any(device.on_gpu for device in self.session.devices))

    def forward(self, pixel_values: Array) -> Array:
        """``pixel_values`` (B, 3, H, W) float32 → ``last_hidden_state`` (B, T, D) float32.

        Raises:
            ImageFormatError: another shape or dtype.
            InferenceError: ONNX Runtime failed.
            NonFiniteError: NaN or infinity in the tokens.
        """
        return self.compute(pixel_values, {LAST_HIDDEN_STATE: None})[LAST_HIDDEN_STATE]

    def compute(self, pixel_values: Array, wanted: Wanted) -> dict[str, Array]:
        """``pixel_values`` (B, 3, H, W) → outputs of the graph by name, float32.

        Args:
            pixel_values: as for `forward`.
            wanted: name of an output → how many of its first tokens; None for all there is.

        Raises:
            ImageFormatError: another shape or dtype.
            InferenceError: ONNX Runtime failed.
            NonFiniteError: NaN or infinity in what is wanted.
            NoSuchOutputError: the graph has not what is wanted.
        """
        batch = self._checked(pixel_values)
        for output in wanted:
            self._require(output)
        found = self.session.compute(batch, wanted)
        return found if self._guard is None else self._guard.checked(found, wanted, batch)

    def forward_on_device(
        self, pixel_values: Array, output: str = LAST_HIDDEN_STATE
    ) -> DeviceArray:
        """One output of the graph, left where it was computed and shared through DLPack.

        ``torch.from_dlpack(...)`` and ``cupy.from_dlpack(...)`` take it without a copy; the work is
        finished. Nothing checks it for NaN or infinity.

        Raises:
            ImageFormatError: another shape or dtype.
            NoSuchOutputError: the graph has no such output.
            DeviceError: the encoder has several devices.
            InferenceError: ONNX Runtime failed.
        """
        if isinstance(self.session, Replicas):
            raise DeviceError(
                f"The tokens would lie on {self.device}: open one encoder per device for this."
            )
        self._require(output)
        return self.session.run_on_device(self._checked(pixel_values), output)

    def _require(self, output: str) -> None:
        if output not in self.session.outputs:
            raise NoSuchOutputError(
                f"The graph {self.graph.name} of {self.bundle.name} has no output {output!r}; it "
                f"has {', '.join(self.session.outputs)}."
            )

    def _checked(self, pixel_values: Array) -> Array:
        expected = (3, *self.layout.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected or not len(pixel_values):
            raise ImageFormatError(
                f"pixel_values has shape {pixel_values.shape}; this tower takes (B, "
                f"{', '.join(map(str, expected))}) with B ≥ 1, as preprocess() returns it."
            )
        if pixel_values.dtype != self._dtype:
            raise ImageFormatError(
                f"pixel_values is {pixel_values.dtype}, and the graph takes {self._dtype}: pass "
                f".astype(numpy.{self._dtype}), or what preprocess() returns."
            )
        return np.ascontiguousarray(pixel_values)


def _choose(
    bundle: Bundle,
    on: Sequence[Device],
    precision: str,
    resolution: tuple[int, int] | None,
    options: SessionOptions | None,
) -> tuple[BundleGraph, SessionOptions | None, str]:
    """The one graph for all devices, the options it runs with, and why this precision."""
    portable = any(device.standard_operators for device in on)
    candidates = bundle.graphs_at(resolution, portable=portable)
    choices = [
        choose_precision(
            precision,
            device,
            family=bundle.family,
            available=tuple(candidates),
            compute_capability=compute_capability(device),
        )
        for device in on
    ]
    # Devices that auto would treat differently have fp32 in common.
    choice = next((one for one in choices if one.precision == "fp32"), choices[0])
    if choice.graph not in candidates:
        held = ", ".join(f"{name} ({graph.name})" for name, graph in candidates.items()) or "none"
        raise PrecisionError(
            f"{choice.reason}, but {bundle.directory} has no {choice.graph} graph that "
            f"{', '.join(map(str, on))} takes (it has {held}). Take one by its name, "
            f"graph=..., or export the checkpoint again."
        )
    if choice.tf32:
        options = replace(options or SessionOptions(), tf32=True)
    return candidates[choice.graph], options, choice.reason


def _guard(
    bundle: Bundle, graph: BundleGraph, session: Session | Replicas, options: SessionOptions | None
) -> FiniteGuard | None:
    """The guard of a graph's outputs; only reduced precision has anything to fall back to."""
    policy = (options or SessionOptions()).non_finite
    if policy == "ignore":
        return None
    what = f"{bundle.name} in {graph.precision} on {session.device}"
    if graph.precision not in REDUCED:
        return FiniteGuard(what, None, session.device, reduced=False)
    full = bundle.graphs_at(graph.resolution, pixels=graph.pixels).get("fp32")
    fallback = full if policy == "fp32" else None
    return FiniteGuard(what, fallback, session.device, reduced=True)


def _reopen(
    directory: Path,
    graph: BundleGraph,
    session: Session | Replicas,
    guard: FiniteGuard | None,
    how: dict[str, Any],
) -> VisionEncoder:
    encoder = VisionEncoder(Bundle.load(directory), graph, session, guard)
    encoder.processor = replace(encoder.processor, **how)
    return encoder
