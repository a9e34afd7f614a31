"""One ONNX Runtime session on one device, which is the device asked for or an error."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.bundle import BundleGraph
from vistower.errors import BatchMemoryError, BundleCorruptError, DeviceError, InferenceError
from vistower.execution.binding import BoundRunner, Wanted, Warmed
from vistower.execution.cuda_problems import (
    DeviceChoice,
    choose_device,
    essence,
    out_of_memory,
    require_device,
)
from vistower.execution.device import Device, DeviceLike, ProviderLike, parse_providers
from vistower.execution.loading import INPUT, Loading
from vistower.execution.memory import CudaMemory, HostMemory, Memory
from vistower.execution.ort import onnxruntime
from vistower.execution.providers import Providers, SessionOptions
from vistower.execution.workers import CallingThread, Worker, gpu_worker
from vistower.families.record import LAST_HIDDEN_STATE
from vistower.foreign import foreign_code
from vistower.forks import Process, kept_in_children, uncut
from vistower.output import DeviceArray
from vistower.threads import available_cpus

logger = logging.getLogger("vistower")

Array = npt.NDArray[np.float32]

TOKENS_PER_THREAD = 400
"""Tokens per thread from which on a batch is computed in parts on the CPU: enough rows for every
product to run at full speed, few enough that a layer's activations stay in the caches. Takes 3 to
8 % off a batch of 32 (CLIP B/32 and DINOv3 S/16 on 2 cores; 200 to 400 are equally good)."""


class Session:
    """A graph loaded on one device. Safe to share between threads; picklable: it loads again.

    ``device`` is where it really runs: this is read back from ONNX Runtime after the session
    exists, because ONNX Runtime itself falls back to the CPU with no more than a warning.
    ``reason`` says why this device, ``placement`` where its nodes went (None where ONNX Runtime
    cannot tell, or on the CPU).
    """

    def __init__(
        self,
        graph: Path | BundleGraph,
        device: DeviceLike | DeviceChoice = "auto",
        threads: int | None = None,
        *,
        providers: Sequence[ProviderLike] | None = None,
        options: SessionOptions | None = None,
    ) -> None:
        """Load a graph.

        Args:
            graph: an ONNX file with input ``pixel_values`` and named outputs, or
                the graph of a bundle, which is compared with what the bundle says of it.
            device: ``auto``, ``cpu``, ``openvino``, ``cuda[:N]``, ``tensorrt[:N]``, a
                ``torch.device``, or what `choose_device` made of one of them.
            threads: CPU threads inside one run; None for all this process may use.
            providers: execution providers as ONNX Runtime takes them, instead of ``device``; the
                first must be active, and their options win over ours.
            options: how to use the device.

        Raises:
            DeviceError: the device cannot be had, or both device and providers are given.
            BundleCorruptError: the graph cannot be loaded, has other inputs or outputs, or is not
                what its bundle says.
        """
        self._process = Process()
        # Its thread pool's end would wait for threads that a forked child does not have.
        kept_in_children(self)
        self._asked = providers
        if providers is None:
            choice = device if isinstance(device, DeviceChoice) else choose_device(device)
            self.device, self.reason = choice.device, choice.reason
            asked: Providers | None = None
        else:
            if device != "auto":
                raise DeviceError(
                    f"device={device!r} and providers={providers!r} were both given. Give one."
                )
            self.device, asked = parse_providers(providers)
            self.reason = "first of the providers"
            require_device(self.device)
        self._of = graph if isinstance(graph, BundleGraph) else None
        # Absolute: it may be unpickled in another working directory.
        path = graph.path if isinstance(graph, BundleGraph) else graph
        self.graph = Path(os.path.abspath(path))  # noqa: PTH100
        self.options = options or SessionOptions()
        self.threads = threads or available_cpus()
        self._worker: Worker | None = None
        if self.device.on_gpu:
            self._worker = gpu_worker(self.device.index)
        elif self.options.buckets:
            self._worker = CallingThread()
        loading = Loading(self.graph, self._of, self.device, self.options, self.threads, asked)
        with foreign_code, uncut:
            loaded = loading.load(self._worker)
        self._session, self.placement = loaded.session, loaded.placement
        self._source = loaded.source
        self._targets = {port.name: port for port in loaded.targets}
        if self._worker is not None:
            self._memory, self._bound = self._bind(self._worker)
        if self._of is not None and self._of.record is None:
            self._try()

    def __reduce__(self) -> tuple[Any, ...]:
        device = "auto" if self._asked is not None else str(self.device)
        graph = self._of or self.graph
        return _load, (graph, device, self.threads, self._asked, self.options)

    def _try(self) -> None:
        """Run a graph of another exporter once: it may leave open, or misstate, what it gives.

        Raises:
            BundleCorruptError: it cannot be run, or gives what its config does not say.
        """
        picture = np.zeros((1, *self._source.shape), self._source.dtype)
        try:
            self.compute(picture, dict.fromkeys(self._targets))
        except BatchMemoryError:
            raise
        except InferenceError as error:
            raise BundleCorruptError(f"{self.graph} was tried on one picture: {error}") from error

    @property
    def devices(self) -> tuple[Device, ...]:
        """The one device, where there could be several."""
        return (self.device,)

    @property
    def provider(self) -> str:
        """The active execution provider, e.g. ``CUDAExecutionProvider``."""
        return str(self._session.get_providers()[0])

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """What the graph takes: float32 ``pixel_values``, or uint8 before normalization."""
        return self._source.dtype

    def _bind(self, worker: Worker) -> tuple[Memory, BoundRunner]:
        memory: Memory = (
            CudaMemory(self.device.index, worker.run) if self.device.on_gpu else HostMemory()
        )
        bound = BoundRunner(
            onnxruntime(),
            self._session,
            memory,
            source=self._source,
            targets=tuple(self._targets.values()),
            options=self.options,
        )
        return memory, bound

    def empty(self, batch_size: int) -> npt.NDArray[Any]:
        """An uninitialized input array (B, 3, H, W) to make a batch in.

        On a GPU it lies in page-locked memory, from which the upload is fastest; any other array
        works too.
        """
        shape = (batch_size, *self._source.shape)
        if self._worker is None or not self._process.is_here:
            return np.empty(shape, self._source.dtype)
        return self._memory.empty(shape, self._source.dtype)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs it has, by the names of `vistower.families.record.OUTPUTS`."""
        return tuple(self._targets)

    def run(self, pixel_values: npt.NDArray[Any]) -> Array:
        """One forward pass: (B, 3, H, W) of `input_dtype` → ``last_hidden_state`` (B, T, D).

        Raises:
            BatchMemoryError, InferenceError: see `compute`.
        """
        return self.compute(pixel_values, {LAST_HIDDEN_STATE: None})[LAST_HIDDEN_STATE]

    def compute(self, pixel_values: npt.NDArray[Any], wanted: Wanted) -> dict[str, Array]:
        """One forward pass: (B, 3, H, W) of `input_dtype` → the outputs wanted, float32.

        Of ``last_hidden_state`` the first tokens alone can be wanted; then no more is copied.
        Where memory runs out, the batch is computed in two halves, once, with a warning.

        Raises:
            BatchMemoryError: memory ran out for half the batch too.
            InferenceError: ONNX Runtime failed, or the session was inherited through fork.
        """
        self._process.require("encoder")
        with foreign_code:
            try:
                found = self._forward(pixel_values, wanted)
            except Exception as error:
                if not out_of_memory(error) or len(pixel_values) < 2:
                    raise self._failed(pixel_values, error) from error
                found = self._halved(pixel_values, wanted, error)
        for name, values in found.items():
            self._check_shape(name, pixel_values, values.shape, wanted[name])
        return {name: values.astype(np.float32, copy=False) for name, values in found.items()}

    def _forward(
        self, pixel_values: npt.NDArray[Any], wanted: Wanted, *, shrink: bool = False
    ) -> dict[str, npt.NDArray[Any]]:
        if self._worker is None:
            return self._in_parts(pixel_values, wanted)
        batch = self._bindable(pixel_values)
        return self._worker.run(self._bound.run, batch, wanted, shrink=shrink)

    def _in_parts(
        self, pixel_values: npt.NDArray[Any], wanted: Wanted
    ) -> dict[str, npt.NDArray[Any]]:
        target = self._targets.get(LAST_HIDDEN_STATE)
        tokens = len(pixel_values) * (target.shape[0] if target is not None else 1)
        count = min(len(pixel_values), tokens // (TOKENS_PER_THREAD * self.threads))
        return _joined(
            [self._part(part, wanted) for part in np.array_split(pixel_values, max(1, count))]
        )

    def _part(self, pixel_values: npt.NDArray[Any], wanted: Wanted) -> dict[str, npt.NDArray[Any]]:
        values = self._session.run(list(wanted), {INPUT: pixel_values})
        return {
            # A copy, not a view: the tokens behind it must not be kept.
            name: value if wanted[name] is None else value[:, : wanted[name]].copy()
            for name, value in zip(wanted, values, strict=True)
        }

    def _halved(
        self, pixel_values: npt.NDArray[Any], wanted: Wanted, error: Exception
    ) -> dict[str, npt.NDArray[Any]]:
        middle = (len(pixel_values) + 1) // 2
        logger.warning(
            "%s ran out of memory for a batch of %d (%s); it is computed in halves of %d. Use a "
            "smaller batch_size.",
            self.device,
            len(pixel_values),
            essence(str(error)),
            middle,
        )
        try:
            return _joined(
                [
                    self._forward(part, wanted, shrink=True)
                    for part in (pixel_values[:middle], pixel_values[middle:])
                ]
            )
        except Exception as again:
            raise self._failed(pixel_values[:middle], again) from again

    def _failed(self, pixel_values: npt.NDArray[Any], error: Exception) -> InferenceError:
        if isinstance(error, InferenceError):
            return error
        text = (
            f"ONNX Runtime failed on {self.device} for pixel_values of shape "
            f"{pixel_values.shape}: {essence(str(error))}"
        )
        if out_of_memory(error):
            return BatchMemoryError(f"{text}. Use a smaller batch_size, or raise memory_limit.")
        return InferenceError(text)

    def run_on_device(
        self, pixel_values: npt.NDArray[Any], output: str = LAST_HIDDEN_STATE
    ) -> DeviceArray:
        """One output, left in the device's memory and handed out through DLPack.

        The work is finished when this returns: a consumer need not synchronize.

        Raises:
            InferenceError: ONNX Runtime failed, or the session was inherited through fork.
        """
        self._process.require("encoder")
        with foreign_code:
            return self._left_on_device(pixel_values, output)

    def _left_on_device(self, pixel_values: npt.NDArray[Any], output: str) -> DeviceArray:
        try:
            if self._worker is None:
                module = onnxruntime()
                feeds = {INPUT: module.OrtValue.ortvalue_from_numpy(pixel_values)}
                value = self._session.run_with_ort_values([output], feeds)[0]
                self._check_shape(output, pixel_values, tuple(value.shape()))
                return DeviceArray(value)
            batch = self._bindable(pixel_values)
            return DeviceArray(self._worker.run(self._bound.run_on_device, batch, output))
        except Exception as error:
            raise self._failed(pixel_values, error) from error

    def warmup(self, batch_sizes: Sequence[int] = ()) -> tuple[Warmed, ...]:
        """Pay the first-run costs now: allocation, kernel choice, TensorRT's engine, CUDA graphs.

        Call it while no other thread of the process uses CUDA where CUDA graphs are captured.

        Args:
            batch_sizes: to run; by default the buckets, else one picture.

        Returns:
            Each batch size's first and next run in seconds.

        Raises:
            InferenceError: ONNX Runtime failed.
        """
        self._process.require("encoder")
        report = []
        for size in batch_sizes or self.options.buckets or (1,):
            # Not zeros: a captured graph is compared with the plain run on it.
            noise = np.random.default_rng(0).integers(0, 255, (size, *self._source.shape))
            batch = (noise / 255 if self._source.dtype.kind == "f" else noise).astype(
                self._source.dtype
            )
            with foreign_code:
                warmed = self._warmed(batch)
            report.append(warmed)
            logger.info(
                "warmed up %s: batch %d, first %.0f ms, next %.1f ms%s",
                self.device,
                warmed.batch_size,
                warmed.first * 1e3,
                warmed.next * 1e3,
                ", CUDA graph" if warmed.graph else "",
            )
        return tuple(report)

    def _warmed(self, batch: npt.NDArray[Any]) -> Warmed:
        try:
            if self._worker is None:
                return Warmed(len(batch), self._timed(batch), self._timed(batch), graph=False)
            return self._worker.run_alone(self._bound.warm, batch)
        except Exception as error:
            raise self._failed(batch, error) from error

    def _timed(self, batch: npt.NDArray[Any]) -> float:
        start = time.perf_counter()
        self._forward(batch, dict.fromkeys(self._targets))
        return time.perf_counter() - start

    def _check_shape(
        self,
        output: str,
        pixel_values: npt.NDArray[Any],
        shape: tuple[int, ...],
        tokens: int | None = None,
    ) -> None:
        """A graph may leave its sizes open, and declare what it does not compute."""
        expected = (len(pixel_values), *self._targets[output].leading(tokens))
        if shape != expected:
            raise InferenceError(
                f"{self.graph} gave {output} of shape {shape} for {len(pixel_values)} pictures, "
                f"where its bundle says {expected}: it is the graph of another model. Export the "
                f"bundle again."
            )

    def _bindable(self, pixel_values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # By address nothing checks what ONNX Runtime's own run() checks.
        if pixel_values.dtype != self._source.dtype or pixel_values.shape[1:] != self._source.shape:
            raise InferenceError(
                f"The graph takes (B, {', '.join(map(str, self._source.shape))}) of "
                f"{self._source.dtype}, and got {pixel_values.shape} of {pixel_values.dtype}."
            )
        return np.ascontiguousarray(pixel_values)


def _joined(parts: Sequence[Mapping[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """The outputs of several batches as those of one."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _load(
    graph: Path | BundleGraph,
    device: str,
    threads: int,
    providers: Sequence[ProviderLike] | None,
    options: SessionOptions,
) -> Session:
    return Session(graph, device, threads, providers=providers, options=options)
