"""One ONNX Runtime session on one device, which is the device asked for or an error."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from vistower.binding import BoundRunner, Port, Warmed
from vistower.cuda_machine import (
    DeviceChoice,
    choose_device,
    first_line,
    out_of_memory,
    problems,
    require_device,
    symptom,
)
from vistower.device import Device, DeviceLike, ProviderLike, parse_providers
from vistower.errors import (
    BatchMemoryError,
    BundleCorruptError,
    DeviceError,
    InferenceError,
    NodePlacementError,
)
from vistower.memory import CudaMemory, HostMemory, Memory
from vistower.ort import CPU_PROVIDER, LOG_ERRORS_ONLY, onnxruntime
from vistower.output import DeviceArray
from vistower.placement import can_read_placement, read_placement
from vistower.providers import (
    Providers,
    SessionOptions,
    device_providers,
    merged,
    session_config,
)
from vistower.tensorrt import tensorrt_providers
from vistower.threads import available_cpus
from vistower.workers import CallingThread, Worker, gpu_worker

logger = logging.getLogger("vistower")

INPUT = "pixel_values"
OUTPUT = "last_hidden_state"

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(uint8)": np.dtype(np.uint8),
}


class Session:
    """A graph loaded on one device. Safe to share between threads; picklable: it loads again.

    ``device`` is where it really runs: this is read back from ONNX Runtime after the session
    exists, because ONNX Runtime itself falls back to the CPU with no more than a warning.
    ``reason`` says why this device, ``placement`` where its nodes went (None where ONNX Runtime
    cannot tell, or on the CPU).
    """

    def __init__(
        self,
        graph: Path,
        device: DeviceLike | DeviceChoice = "auto",
        threads: int | None = None,
        *,
        providers: Sequence[ProviderLike] | None = None,
        options: SessionOptions | None = None,
    ) -> None:
        """Load a graph.

        Args:
            graph: an ONNX file with input ``pixel_values`` and output ``last_hidden_state``.
            device: ``auto``, ``cpu``, ``cuda[:N]``, ``tensorrt[:N]``, a ``torch.device``, or what
                `choose_device` made of one of them.
            threads: CPU threads inside one run; None for all this process may use.
            providers: execution providers as ONNX Runtime takes them, instead of ``device``; the
                first must be active, and their options win over ours.
            options: how to use the device.

        Raises:
            DeviceError: the device cannot be had, or both device and providers are given.
            BundleCorruptError: the graph cannot be loaded or has other inputs or outputs.
        """
        self._pid = os.getpid()
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
        self.graph = graph
        self.options = options or SessionOptions()
        self.threads = threads or available_cpus()
        self._worker: Worker | None = None
        if self.device.on_gpu:
            self._worker = gpu_worker(self.device.index)
        elif self.options.buckets:
            self._worker = CallingThread()
        self._session = self._create(asked)
        self._check_provider()
        self._source, self._target = self._ports()
        strict = self.options.strict
        self.placement = read_placement(self._session, self.device, graph, strict=strict)
        if self._worker is not None:
            self._memory, self._bound = self._bind(self._worker)

    def __reduce__(self) -> tuple[Any, ...]:
        device = "auto" if self._asked is not None else str(self.device)
        return _load, (self.graph, device, self.threads, self._asked, self.options)

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

    def _create(self, asked: Providers | None) -> Any:
        module = onnxruntime()
        options = module.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = LOG_ERRORS_ONLY
        can_tell = can_read_placement(module.InferenceSession)
        config = session_config(self.device, self.options, read_placement=can_tell)
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        providers = self._providers(asked)
        if "session.disable_cpu_ep_fallback" in config:
            # ONNX Runtime refuses the two together.
            providers = tuple(one for one in providers if one[0] != CPU_PROVIDER)
        load = partial(
            module.InferenceSession,
            str(self.graph),
            options,
            providers=list(providers),
            # Else it would try the CPU, print so, and hide the error.
            enable_fallback=0,
        )
        try:
            # On the GPU's thread, because it changes the current CUDA device of its thread.
            return load() if self._worker is None else self._worker.run(load)
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            raise self._why_not(error) from error

    def _providers(self, asked: Providers | None) -> Providers:
        if self.device.provider == self.device.type:
            return asked or ()
        if self.device.type == "tensorrt":
            if self.options.cuda_graphs:
                raise DeviceError(
                    "cuda_graphs is for device='cuda': TensorRT's provider captures one graph for "
                    "one shape. Leave it out."
                )
            ours = tensorrt_providers(self.device, self.options, self.graph)
        else:
            ours = device_providers(self.device, self.options)
        return ours if asked is None else merged(asked, ours)

    def _why_not(self, error: Exception) -> Exception:
        """The error to raise where ONNX Runtime raised one while loading."""
        text = str(error)
        if "explicitly disabled" in text and self.options.strict:
            return NodePlacementError(
                f"strict: part of {self.graph} would run on the CPU. A newer onnxruntime-gpu (1.24 "
                f"or so) names the nodes; the fused graph (graph='ort') has none."
            )
        if self.device.type == "cpu":
            return BundleCorruptError(
                f"{self.graph} cannot be loaded by ONNX Runtime {onnxruntime().__version__}: "
                f"{first_line(text)}. Check it with `vistower verify`, or export the bundle again."
            )
        known = symptom(text)
        if known is None:
            return DeviceError(
                f"No session on {self.device} for {self.graph}: {first_line(text)}. `vistower "
                f"doctor` says whether the device works at all."
            )
        return known.error(f"No session on {self.device} for {self.graph}: {known}.")

    def _check_provider(self) -> None:
        if self.provider == self.device.provider:
            return
        found = problems(self.device) if self.device.on_gpu else ()
        reasons = "; ".join(map(str, found)) or "`vistower doctor --debug` shows what it logs"
        error = found[0].error if found else DeviceError
        raise error(
            f"{str(self.device)!r} was asked for, but ONNX Runtime made a session with "
            f"{self.provider}: {reasons}."
        )

    def _ports(self) -> tuple[Port, Port]:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        named = {node.name: node for node in outputs}
        if [node.name for node in inputs] != [INPUT] or OUTPUT not in named:
            raise BundleCorruptError(
                f"{self.graph} has inputs {[node.name for node in inputs]} and outputs "
                f"{list(named)}; a vision tower has the input {INPUT} and the output {OUTPUT}. For "
                f"CLIP, export the vision model (CLIPVisionModel), not text and vision together."
            )
        return _port(self.graph, inputs[0]), _port(self.graph, named[OUTPUT])

    def _bind(self, worker: Worker) -> tuple[Memory, BoundRunner]:
        memory: Memory = (
            CudaMemory(self.device.index, worker.run) if self.device.on_gpu else HostMemory()
        )
        bound = BoundRunner(
            onnxruntime(),
            self._session,
            memory,
            source=self._source,
            target=self._target,
            options=self.options,
        )
        return memory, bound

    def empty(self, batch_size: int) -> npt.NDArray[Any]:
        """An uninitialized input array (B, 3, H, W) to make a batch in.

        On a GPU it lies in page-locked memory, from which the upload is fastest; any other array
        works too.
        """
        shape = (batch_size, *self._source.shape)
        if self._worker is None:
            return np.empty(shape, self._source.dtype)
        return self._memory.empty(shape, self._source.dtype)

    def run(self, pixel_values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """One forward pass: (B, 3, H, W) of `input_dtype` → ``last_hidden_state`` (B, T, D).

        Where memory runs out, the batch is computed in two halves, once, with a warning.

        Raises:
            BatchMemoryError: memory ran out for half the batch too.
            InferenceError: ONNX Runtime failed, or the session was inherited through fork.
        """
        self._check_process()
        try:
            tokens = self._forward(pixel_values)
        except Exception as error:
            if not out_of_memory(error) or len(pixel_values) < 2:
                raise self._failed(pixel_values, error) from error
            tokens = self._halved(pixel_values, error)
        return tokens if tokens.dtype == np.float32 else tokens.astype(np.float32)

    def _forward(
        self, pixel_values: npt.NDArray[Any], *, shrink: bool = False
    ) -> npt.NDArray[np.float32]:
        if self._worker is None:
            outputs = self._session.run([OUTPUT], {INPUT: pixel_values})
            return cast("npt.NDArray[np.float32]", outputs[0])
        batch = self._bindable(pixel_values)
        return self._worker.run(self._bound.run, batch, shrink=shrink)

    def _halved(self, pixel_values: npt.NDArray[Any], error: Exception) -> npt.NDArray[np.float32]:
        middle = (len(pixel_values) + 1) // 2
        logger.warning(
            "%s ran out of memory for a batch of %d (%s); it is computed in halves of %d. Use a "
            "smaller batch_size.",
            self.device,
            len(pixel_values),
            first_line(str(error)),
            middle,
        )
        try:
            return np.concatenate(
                [
                    self._forward(part, shrink=True)
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
            f"{pixel_values.shape}: {first_line(str(error))}"
        )
        if out_of_memory(error):
            return BatchMemoryError(f"{text}. Use a smaller batch_size, or raise memory_limit.")
        return InferenceError(text)

    def run_on_device(self, pixel_values: npt.NDArray[Any]) -> DeviceArray:
        """The same, the tokens left in the device's memory and handed out through DLPack.

        The work is finished when this returns: a consumer need not synchronize.

        Raises:
            InferenceError: ONNX Runtime failed, or the session was inherited through fork.
        """
        self._check_process()
        try:
            if self._worker is None:
                module = onnxruntime()
                feeds = {INPUT: module.OrtValue.ortvalue_from_numpy(pixel_values)}
                return DeviceArray(self._session.run_with_ort_values([OUTPUT], feeds)[0])
            batch = self._bindable(pixel_values)
            return DeviceArray(self._worker.run(self._bound.run_on_device, batch))
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
        self._check_process()
        report = []
        for size in batch_sizes or self.options.buckets or (1,):
            # Not zeros: a captured graph is compared with the plain run on it.
            noise = np.random.default_rng(0).integers(0, 255, (size, *self._source.shape))
            batch = (noise / 255 if self._source.dtype.kind == "f" else noise).astype(
                self._source.dtype
            )
            try:
                if self._worker is None:
                    warmed = Warmed(size, self._timed(batch), self._timed(batch), graph=False)
                else:
                    warmed = self._worker.run_alone(self._bound.warm, batch)
            except Exception as error:
                raise self._failed(batch, error) from error
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

    def _timed(self, batch: npt.NDArray[Any]) -> float:
        start = time.perf_counter()
        self._forward(batch)
        return time.perf_counter() - start

    def _bindable(self, pixel_values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # By address nothing checks what ONNX Runtime's own run() checks.
        if pixel_values.dtype != self._source.dtype or pixel_values.shape[1:] != self._source.shape:
            raise InferenceError(
                f"The graph takes (B, {', '.join(map(str, self._source.shape))}) of "
                f"{self._source.dtype}, and got {pixel_values.shape} of {pixel_values.dtype}."
            )
        return np.ascontiguousarray(pixel_values)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise InferenceError(
                "This session was made in another process and its threads did not survive the "
                "fork. Open the encoder in the worker, or use the 'spawn' start method."
            )


def _port(graph: Path, node: Any) -> Port:
    if (dtype := DTYPES.get(node.type)) is None or not all(
        isinstance(size, int) for size in node.shape[1:]
    ):
        raise BundleCorruptError(
            f"{graph}: {node.name} is {node.type} {node.shape}; known are {', '.join(DTYPES)} with "
            f"every size but the batch fixed."
        )
    return Port(node.name, dtype, tuple(node.shape[1:]))


def _load(
    graph: Path,
    device: str,
    threads: int,
    providers: Sequence[ProviderLike] | None,
    options: SessionOptions,
) -> Session:
    return Session(graph, device, threads, providers=providers, options=options)
