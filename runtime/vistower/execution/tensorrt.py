"""The TensorRT execution provider: its options, and where its engines are kept.

TensorRT takes the portable graph: it knows none of ONNX Runtime's fused operators. Building an
engine takes minutes; engine and timing cache lie in a directory of their own per model, GPU and
version, so that none is ever used where it does not belong.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vistower.bundle import cache_directory, sha256
from vistower.errors import BundleCorruptError, DeviceError
from vistower.execution.cuda_machine import Driver, driver, load_library, provider_libraries
from vistower.execution.device import Device
from vistower.execution.ort import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    LOG_ERRORS_ONLY,
    TENSORRT_PROVIDER,
    onnxruntime,
)
from vistower.execution.providers import Providers, SessionOptions, cuda_options

MAX_BATCH = 64
"""Largest batch of an engine where no buckets say another."""

TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
"""NVIDIA's environment variable; 0 turns TF32 off in its libraries, TensorRT's builder too."""


@dataclass(frozen=True)
class EngineKey:
    """What a TensorRT engine depends on; it is of no use where one of these differs.

    ``model`` is the start of the SHA-256 of each of the graph's files, ``gpu`` its name and compute
    capability, ``versions`` those of ONNX Runtime and TensorRT, ``batch`` the largest batch.
    """

    model: str
    gpu: str
    versions: str
    batch: int
    tf32: bool

    @property
    def directory(self) -> str:
        """One directory name, readable and safe in a file system."""
        tf32 = "-tf32" if self.tf32 else ""
        text = f"{self.model}-{self.gpu}-{self.versions}-batch{self.batch}{tf32}"
        return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text)


def engine_key(graph: Path, device: Device, options: SessionOptions) -> EngineKey:
    """The key of a graph's engine on a device of this machine."""
    # Weights beside the graph: which of these files it names does not matter for a key.
    files = [graph, *sorted(graph.parent.glob("*_data"))]
    found = driver()
    if isinstance(found, Driver) and device.index < len(found.gpus):
        gpu = found.gpus[device.index]
        name = f"{gpu.name}-sm{gpu.compute_capability[0]}{gpu.compute_capability[1]}"
    else:
        name = "unknown-gpu"
    return EngineKey(
        model="".join(sha256(file)[:8] for file in files),
        gpu=name,
        versions=f"ort{onnxruntime().__version__}-trt{_tensorrt_version()}",
        batch=max(options.buckets, default=MAX_BATCH),
        tf32=options.tf32,
    )


def _tensorrt_version() -> str:
    """TensorRT's own version number, e.g. 101300; its SONAME has the major version only."""
    names = [library.name for library in provider_libraries(TENSORRT_PROVIDER)]
    name = next((name for name in names if name.startswith("libnvinfer.")), None)
    try:
        return str(load_library(name).getInferLibVersion()) if name else "unknown"
    except OSError:
        return "unknown"


def tensorrt_providers(
    device: Device, options: SessionOptions, graph: Path, size: tuple[int, int] | None = None
) -> Providers:
    """Execution providers for ``tensorrt``: it, then CUDA and the CPU for what it leaves.

    Args:
        device: the GPU.
        options: of the session.
        graph: the ONNX file.
        size: (height, width) in pixels that it takes; None to read it from the file.

    Raises:
        DeviceError: see `tensorrt_options`.
        BundleCorruptError: the graph cannot be read.
    """
    key = engine_key(graph, device, options)
    engines = (options.engine_cache or cache_directory() / "tensorrt") / key.directory
    image = image_shape(graph) if size is None else (3, *size)
    tensorrt = tensorrt_options(device, options, image, engines)
    engines.mkdir(parents=True, exist_ok=True)
    cuda = cuda_options(device, options)
    return (TENSORRT_PROVIDER, tensorrt), (CUDA_PROVIDER, cuda), (CPU_PROVIDER, {})


def tensorrt_options(
    device: Device, options: SessionOptions, image: tuple[int, int, int], engines: Path
) -> dict[str, str]:
    """Options of TensorrtExecutionProvider: one engine for batches of 1 to the largest bucket.

    Args:
        device: the GPU.
        options: of the session.
        image: (channels, height, width) of the graph's input.
        engines: directory of the engine and timing cache.

    Raises:
        DeviceError: TF32 is off in ``options`` and on in TensorRT.
    """
    if not options.tf32 and os.environ.get(TF32_OVERRIDE) != "0":
        raise DeviceError(
            "TensorRT rounds fp32 products to TF32, and ONNX Runtime has no option against it. "
            f"Set {TF32_OVERRIDE}=0 in the environment of the process, or ask for TF32."
        )
    largest = max(options.buckets, default=MAX_BATCH)
    size = "x".join(map(str, image))
    tensorrt = {
        "device_id": str(device.index),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(engines),
        "trt_profile_min_shapes": f"pixel_values:1x{size}",
        "trt_profile_opt_shapes": f"pixel_values:{largest}x{size}",
        "trt_profile_max_shapes": f"pixel_values:{largest}x{size}",
    }
    if options.stream is not None:
        tensorrt["user_compute_stream"] = str(options.stream)
    return tensorrt


def image_shape(graph: Path) -> tuple[int, int, int]:
    """(channels, height, width) of a graph's input, read without optimizing the graph.

    Raises:
        BundleCorruptError: the graph cannot be read, or these sizes are not fixed.
    """
    module = onnxruntime()
    options = module.SessionOptions()
    options.graph_optimization_level = module.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = LOG_ERRORS_ONLY
    try:
        session = module.InferenceSession(str(graph), options, providers=[CPU_PROVIDER])
        channels, height, width = (int(size) for size in session.get_inputs()[0].shape[1:])
    except Exception as error:
        raise BundleCorruptError(f"{graph} cannot be read for TensorRT: {error}") from error
    return channels, height, width
