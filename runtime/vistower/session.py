"""One ONNX Runtime session on one device; the only module that imports onnxruntime."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from vistower.errors import BundleCorruptError, DeviceError, InferenceError, MissingExtraError
from vistower.threads import available_cpus

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger("vistower")

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

_WHEELS = ("onnxruntime", "onnxruntime-gpu")


class TorchDevice(Protocol):
    """What is read of a ``torch.device``; torch itself is never imported."""

    type: str
    index: int | None


DeviceLike: TypeAlias = str | TorchDevice


@dataclass(frozen=True)
class Device:
    """Where a session runs: ``cpu``, or ``cuda`` with a device index."""

    type: str
    index: int = 0

    def __str__(self) -> str:
        return self.type if self.type == "cpu" else f"{self.type}:{self.index}"

    @property
    def provider(self) -> str:
        """The ONNX Runtime execution provider of this device."""
        return CPU_PROVIDER if self.type == "cpu" else CUDA_PROVIDER


@dataclass(frozen=True)
class DeviceChoice:
    """The device that ``auto`` takes, and why."""

    device: Device
    reason: str


@lru_cache(maxsize=1)
def onnxruntime() -> ModuleType:
    """ONNX Runtime, imported on first use, with the CUDA libraries of nvidia wheels loaded.

    Raises:
        MissingExtraError: it is not installed, or it fails to import.
    """
    try:
        import onnxruntime as module
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX Runtime cannot be imported ({error}). Install one of: "
            f"pip install 'vistower[cpu]', pip install 'vistower[gpu]'."
        ) from error
    # A GPU machine prints this at every start, and there is nothing to do about it.
    module.set_default_logger_severity(3)
    if CUDA_PROVIDER in module.get_available_providers() and hasattr(module, "preload_dlls"):
        module.preload_dlls()
    return cast("ModuleType", module)


def installed_wheels() -> dict[str, str]:
    """The installed distributions that provide ``import onnxruntime``, with their versions."""
    found = {}
    for name in _WHEELS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse_device(device: DeviceLike) -> Device | None:
    """Read ``auto`` (None), ``cpu``, ``cuda``, ``cuda:N`` or a ``torch.device``.

    Raises:
        DeviceError: it is none of them.
    """
    if isinstance(device, str):
        text = device
    else:
        kind, index = getattr(device, "type", None), getattr(device, "index", None)
        text = str(kind) if index is None else f"{kind}:{index}"
    if text == "auto":
        return None
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", text)
    if match is None:
        raise DeviceError(f"device={device!r} is not known. Use 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    return Device(match[1], 0 if match[1] == "cpu" else int(match[2] or 0))


def cuda_problem() -> str | None:
    """Why a CUDA session cannot be had here, as one sentence with its remedy; None if it can.

    Looked at in this order: the wheels installed, the providers compiled in, and whether the CUDA
    provider's library loads (a missing library is named).
    """
    wheels = installed_wheels()
    if len(wheels) > 1:
        return (
            "both onnxruntime and onnxruntime-gpu are installed, and they overwrite each other: "
            "pip uninstall both, then pip install 'vistower[gpu]'"
        )
    module = onnxruntime()
    if CUDA_PROVIDER not in module.get_available_providers():
        which = ", ".join(wheels) or "onnxruntime"
        return (
            f"the installed wheel {which} {module.__version__} is built without CUDA: "
            f"pip uninstall {which}, then pip install 'vistower[gpu]'"
        )
    capi = Path(cast("str", module.__file__)).parent / "capi"
    for library in ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"):
        path = capi / library
        if not path.is_file():
            continue
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return (
                f"the CUDA provider cannot be loaded ({error}): pip install 'vistower[gpu]' "
                f"brings the CUDA and cuDNN libraries, the driver comes with the machine"
            )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"there is no NVIDIA driver ({error}): install one, or start the container with GPUs"
    return None


def choose_device() -> DeviceChoice:
    """What ``device="auto"`` takes here, and why: CUDA where it can be had, else the CPU."""
    problem = cuda_problem()
    if problem is None:
        return DeviceChoice(Device("cuda"), "a CUDA device can be used")
    return DeviceChoice(Device("cpu"), f"no CUDA: {problem}")


class Session:
    """A graph loaded on one device. Safe to share between threads.

    ``device`` is where it really runs: for CUDA this is read back from ONNX Runtime after the
    session exists, because ONNX Runtime itself falls back to the CPU with no more than a warning.
    """

    def __init__(
        self, graph: Path, device: DeviceLike = "auto", threads: int | None = None
    ) -> None:
        """Load a graph.

        Args:
            graph: an ONNX file with input ``pixel_values`` and output ``last_hidden_state``.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or a ``torch.device``.
            threads: CPU threads inside one run; None for all this process may use.

        Raises:
            DeviceError: the device cannot be had.
            BundleCorruptError: the graph cannot be loaded or has other inputs or outputs.
        """
        wanted = parse_device(device)
        if wanted is None:
            choice = choose_device()
            wanted = choice.device
            logger.debug("device auto: %s (%s)", wanted, choice.reason)
        elif wanted.type == "cuda" and (problem := cuda_problem()) is not None:
            raise DeviceError(f"device={str(wanted)!r} was asked for, but {problem}.")
        self.graph = graph
        self.device = wanted
        self.threads = threads or available_cpus()
        self._session = self._create()
        self._check_provider()
        self._check_signature()
        self._pid = os.getpid()

    @property
    def provider(self) -> str:
        """The active execution provider, e.g. ``CUDAExecutionProvider``."""
        return str(self._session.get_providers()[0])

    def _create(self) -> Any:
        module = onnxruntime()
        options = module.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning workers burn the cores that other sessions and decoders of this process need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = [CPU_PROVIDER]
        if self.device.type == "cuda":
            # TF32 would change the numbers torch computes by default.
            cuda = {"device_id": str(self.device.index), "use_tf32": "0"}
            providers = [(CUDA_PROVIDER, cuda), CPU_PROVIDER]
        try:
            return module.InferenceSession(str(self.graph), options, providers=providers)
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            text = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            if self.device.type == "cuda":
                raise DeviceError(f"No session on {self.device}: {text}") from error
            raise BundleCorruptError(
                f"{self.graph} cannot be loaded by ONNX Runtime {module.__version__}: {text}. "
                f"Check it with `vistower verify`, or export the bundle again."
            ) from error

    def _check_provider(self) -> None:
        if self.provider != self.device.provider:
            raise DeviceError(
                f"device={str(self.device)!r} was asked for, but ONNX Runtime made a session with "
                f"{self.provider}. `vistower doctor` names the cause."
            )

    def _check_signature(self) -> None:
        inputs = [node.name for node in self._session.get_inputs()]
        outputs = [node.name for node in self._session.get_outputs()]
        if inputs != ["pixel_values"] or "last_hidden_state" not in outputs:
            raise BundleCorruptError(
                f"{self.graph} has inputs {inputs} and outputs {outputs}; a vision tower has the "
                f"input pixel_values and the output last_hidden_state. For CLIP, export the vision "
                f"model (CLIPVisionModel), not text and vision together."
            )

    def run(self, pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """One forward pass: (B, 3, H, W) float32 → ``last_hidden_state`` (B, T, D) float32.

        Raises:
            InferenceError: ONNX Runtime failed, or the session was inherited through fork.
        """
        if os.getpid() != self._pid:
            raise InferenceError(
                "This session was made in another process and its threads did not survive the "
                "fork. Open the encoder in the worker, or use the 'spawn' start method."
            )
        try:
            outputs = self._session.run(["last_hidden_state"], {"pixel_values": pixel_values})
        except Exception as error:
            raise InferenceError(
                f"ONNX Runtime failed on {self.device} for pixel_values of shape "
                f"{pixel_values.shape}: {str(error).strip().splitlines()[0]}"
            ) from error
        return cast("npt.NDArray[np.float32]", outputs[0])
