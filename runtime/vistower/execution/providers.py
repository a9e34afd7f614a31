"""The options of a session, and how they are spelled for ONNX Runtime's execution providers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from vistower.errors import DeviceError
from vistower.execution.cpu import int8_saturates
from vistower.execution.device import Device
from vistower.execution.ort import CPU_PROVIDER, CUDA_PROVIDER

Providers: TypeAlias = tuple[tuple[str, dict[str, str]], ...]


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How a session uses its device. The defaults give torch's numbers and grow no faster.

    Attributes:
        strict: raise where a compute node was placed on the CPU; otherwise it is only reported.
        tf32: let fp32 products round to TF32 on GPUs that have it.
        memory_limit: bytes of ONNX Runtime's GPU memory arena (``gpu_mem_limit``); CUDA itself,
            cuBLAS and the buffers for input and output come on top. None for no limit.
        buckets: batch sizes to compute in: a batch is padded to the smallest that holds it, and
            cut by the largest. So at most so many shapes ever allocate. Empty for any size.
        cuda_graphs: `Session.warmup` captures one CUDA graph per bucket, replayed from then on.
        stream: address of a ``cudaStream_t`` to compute on (``user_compute_stream``), e.g.
            ``torch.cuda.Stream().cuda_stream``; it must outlive the session.
        shrink: give the arena's unused memory back after every run; costs time.
        non_finite: what to do about NaN or infinity in the tokens: ``error``, ``fp32`` (fp16 and
            bf16 only: compute the batch again with the bundle's fp32 graph; else an error), or
            ``ignore``.
        engine_cache: directory of TensorRT's engines and timings; None for ``tensorrt`` under
            vistower's cache.
    """

    strict: bool = False
    tf32: bool = False
    memory_limit: int | None = None
    buckets: tuple[int, ...] = ()
    cuda_graphs: bool = False
    stream: int | None = None
    shrink: bool = False
    non_finite: Literal["error", "fp32", "ignore"] = "error"
    engine_cache: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            DeviceError: buckets that are no growing batch sizes, CUDA graphs without buckets or
                with shrinking (a captured graph keeps using the arena's memory), no memory.
        """
        if any(size < 1 for size in self.buckets) or list(self.buckets) != sorted(
            set(self.buckets)
        ):
            raise DeviceError(
                f"buckets={self.buckets!r} must be growing batch sizes from 1, e.g. (1, 8, 32)."
            )
        if self.cuda_graphs and not self.buckets:
            raise DeviceError(
                "cuda_graphs needs buckets, e.g. buckets=(1, 8, 32): one graph is captured each."
            )
        if self.cuda_graphs and self.shrink:
            raise DeviceError(
                "cuda_graphs and shrink exclude each other: a captured graph keeps using the "
                "memory that shrinking gives back. Choose one."
            )
        if self.memory_limit is not None and self.memory_limit < 1:
            raise DeviceError(f"memory_limit={self.memory_limit} must be a number of bytes.")


def session_config(
    device: Device, options: SessionOptions, *, read_placement: bool
) -> dict[str, str]:
    """Session configuration entries.

    Args:
        device: where the session runs.
        options: of the session.
        read_placement: whether this ONNX Runtime can tell afterwards where each node went.
    """
    # Workers that spin between the operators of a run save 5 % of a single picture; after a run
    # they would burn the cores that other sessions and decoders of this process need.
    config = {"session.force_spinning_stop": "1"}
    if device.type == "cpu":
        # Its fused kernel takes four times as long there as the two it replaces.
        config["optimization.disable_specified_optimizers"] = "SkipLayerNormFusion"
        if int8_saturates():
            # ONNX Runtime then computes with uint8 weights in 16 bits: exact, but half as fast.
            config["session.x64quantprecision"] = "1"
        return config
    if device.on_gpu:
        # Weights outside the arena: it then grows for activations only.
        config["session.use_device_allocator_for_initializers"] = "1"
    if read_placement:
        config["session.record_ep_graph_assignment_info"] = "1"
    elif options.strict:
        config["session.disable_cpu_ep_fallback"] = "1"
    return config


def device_providers(device: Device, options: SessionOptions) -> Providers:
    """Execution providers for ``cpu`` or ``cuda``, best first, with their options as strings."""
    if device.type == "cpu":
        return ((CPU_PROVIDER, {}),)
    return (CUDA_PROVIDER, cuda_options(device, options)), (CPU_PROVIDER, {})


def cuda_options(device: Device, options: SessionOptions) -> dict[str, str]:
    """Options of CUDAExecutionProvider."""
    cuda = {
        "device_id": str(device.index),
        "use_tf32": str(int(options.tf32)),
        # Doubling the arena at each growth is the default, and the usual complaint.
        "arena_extend_strategy": "kSameAsRequested",
        # Only graphs of other exporters have Conv: the exhaustive search costs seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    if options.memory_limit is not None:
        cuda["gpu_mem_limit"] = str(options.memory_limit)
    if options.stream is not None:
        cuda["user_compute_stream"] = str(options.stream)
    if options.cuda_graphs and device.type == "cuda":
        cuda["enable_cuda_graph"] = "1"
    return cuda


def merged(asked: Providers, defaults: Providers) -> Providers:
    """The providers asked for, each with our defaults where its options say nothing."""
    known: Mapping[str, dict[str, str]] = dict(defaults)
    return tuple((name, {**known.get(name, {}), **options}) for name, options in asked)
