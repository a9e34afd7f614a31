"""Why a device cannot be had here, with the remedy; and so which device can be."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from vistower.errors import (
    CudaLibraryError,
    DeviceError,
    DeviceMemoryError,
    DriverError,
    NoSuchDeviceError,
    ProviderMissingError,
)
from vistower.execution.cuda_machine import (
    CUDA_LIBRARY,
    LOADED_LATER,
    Library,
    Problem,
    driver,
    look_for,
    provider_libraries,
)
from vistower.execution.device import CPU, Device, DeviceLike, parse_device
from vistower.execution.ort import CUDA_PROVIDER, TENSORRT_PROVIDER, installed_wheels, onnxruntime

logger = logging.getLogger("vistower")

ORT_SYMPTOMS: tuple[tuple[str, type[DeviceError], str], ...] = (
    (
        r"out of memory|Failed to allocate memory|CUDA failure 2:|Available memory of|"
        r"(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
        DeviceMemoryError,
        "free memory on the GPU (nvidia-smi shows who holds it), raise memory_limit, or take "
        "another device",
    ),
    (
        r"Invalid device [Ii][Dd]|CUDA failure 101\b",
        NoSuchDeviceError,
        "`vistower doctor` lists the GPUs",
    ),
    (
        r"CUDA failure 100\b",
        DriverError,
        "start the container with GPUs, and look at CUDA_VISIBLE_DEVICES",
    ),
    (
        r"CUDA failure 35\b|driver version is insufficient",
        DriverError,
        "update the NVIDIA driver",
    ),
    (
        r"no kernel image is available|CUDA failure 209\b",
        DriverError,
        "this wheel has no code for so old or so new a GPU: take another onnxruntime-gpu release",
    ),
    (
        r"lib[\w.+-]+: cannot open shared object file",
        CudaLibraryError,
        "pip install 'vistower[gpu]' brings the CUDA and cuDNN libraries",
    ),
)
"""Texts of ONNX Runtime's errors → what they mean, and the remedy."""


ESSENCES = (
    r"CUDA failure \d+: [^;\n]+",
    r"Failed to allocate memory[^\n]*",
    r"Available memory of[^\n]*",
    r"Failed to parse provider option[^\n]*",
    r"Unknown provider option[^\n]*",
)
"""The sentences of ONNX Runtime's errors that are worth showing, best first."""

WHEELS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "openvino": ("OpenVINO", "openvino"),
        "cuda": ("CUDA", "gpu"),
        "tensorrt": ("TensorRT", "gpu"),
    }
)
"""Device type → what the wheel must be built with, and the extra that brings that wheel."""


@dataclass(frozen=True)
class DeviceChoice:
    """The device taken, and why it was."""

    device: Device
    reason: str


def problems(device: Device) -> tuple[Problem, ...]:
    """Every reason why a device cannot be had here, the first being the one to raise.

    The CPU always can, and of providers that have no device name nothing is known.
    Looked at: the wheels installed, the providers compiled in, the libraries the provider was
    linked with, the driver, its CUDA version against the libraries', and the device index.
    """
    if device.type not in WHEELS:
        return ()
    if (wrong := _wheel_problem(device)) is not None:
        return (wrong,)
    if not device.on_gpu:
        return ()
    libraries = provider_libraries(CUDA_PROVIDER)
    if device.type == "tensorrt":
        libraries += provider_libraries(TENSORRT_PROVIDER)
    for name in LOADED_LATER:
        # Only so that it is found when it is needed; without it other kernels are taken.
        look_for(name)
    return (*_library_problems(libraries), *_driver_problems(device, libraries))


def _wheel_problem(device: Device) -> Problem | None:
    wheels = installed_wheels()
    what, extra = WHEELS[device.type]
    if len(wheels) > 1:
        every = "both" if len(wheels) == 2 else "all of"
        found = f"{every} {' and '.join(wheels)} are installed, and they overwrite each other"
        remedy = f"pip uninstall {' '.join(wheels)}, then pip install 'vistower[{extra}]'"
        return Problem(ProviderMissingError, found, remedy)
    module = onnxruntime()
    if device.provider in module.get_available_providers():
        return None
    which = next(iter(wheels), "onnxruntime")
    found = f"the installed wheel {which} {module.__version__} is built without {what}"
    remedy = f"pip uninstall {which}, then pip install 'vistower[{extra}]'"
    return Problem(ProviderMissingError, found, remedy)


def _library_problems(libraries: tuple[Library, ...]) -> Iterator[Problem]:
    missing = tuple(dict.fromkeys(library.name for library in libraries if library.error))
    tensorrt = tuple(name for name in missing if name.startswith("libnv"))
    cuda = tuple(name for name in missing if name not in tensorrt)
    others = [other for name in cuda for other in _other_majors(name)]
    if others:
        yield Problem(
            CudaLibraryError,
            f"the provider needs {', '.join(cuda)}, and this machine has {', '.join(others)}, of "
            f"another major version",
            "pip install 'vistower[gpu]' brings the right ones; or install the onnxruntime-gpu "
            "release built for the version here",
        )
    elif cuda:
        yield Problem(
            CudaLibraryError,
            f"the provider needs {', '.join(cuda)}, which cannot be loaded",
            "pip install 'vistower[gpu]' brings the CUDA and cuDNN libraries",
        )
    if tensorrt:
        yield Problem(
            CudaLibraryError,
            f"the TensorRT provider needs {', '.join(tensorrt)}, which cannot be loaded",
            "pip install the tensorrt wheel of that major version",
        )


def _other_majors(name: str) -> Iterator[str]:
    """The same library of the two majors before and after, where it can be loaded."""
    match = cast("re.Match[str]", CUDA_LIBRARY.fullmatch(name))
    major = int(match[2])
    for other in (major - 1, major + 1, major - 2, major + 2):
        candidate = name.replace(f".so.{major}", f".so.{other}")
        if look_for(candidate).error is None:
            yield candidate


def _driver_problems(device: Device, libraries: tuple[Library, ...]) -> Iterator[Problem]:
    found = driver()
    if isinstance(found, Problem):
        yield found
        return
    runtime = next((x.name for x in libraries if x.name.startswith("libcudart.so.")), None)
    # Minor versions are compatible: a driver that serves 13.0 runs any 13.x.
    needed = int(runtime.rpartition(".")[2]) if runtime else 0
    if found.cuda_version[0] < needed:
        version = ".".join(map(str, found.cuda_version))
        yield Problem(
            DriverError,
            f"the NVIDIA driver serves CUDA {version}, and this wheel needs CUDA {needed}",
            "update the driver, or install the onnxruntime-gpu release built for CUDA "
            f"{found.cuda_version[0]}",
        )
    if device.index >= len(found.gpus):
        there = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in found.gpus) or "none"
        yield Problem(
            NoSuchDeviceError,
            f"there is no GPU {device.index}; there are: {there}",
            "take one of these, and look at CUDA_VISIBLE_DEVICES",
        )


def choose_device(device: DeviceLike = "auto") -> DeviceChoice:
    """What a device request takes here, and why; ``auto`` is CUDA where it can be had, else CPU.

    Raises:
        DeviceError: the request is malformed, or the device cannot be had. Its subclass and its
            message say why: see `problems`.
    """
    wanted = parse_device(device)
    if wanted is None:
        found = problems(Device("cuda"))
        if found:
            choice = DeviceChoice(CPU, f"no CUDA: {'; '.join(map(str, found))}")
        else:
            choice = DeviceChoice(Device("cuda"), "a CUDA device can be used")
        logger.debug("device auto takes %s: %s", choice.device, choice.reason)
        return choice
    require_device(wanted)
    return DeviceChoice(wanted, "asked for")


def require_device(device: Device) -> None:
    """Raise if a device cannot be had, with every reason.

    Raises:
        DeviceError: see `problems`.
    """
    if found := problems(device):
        reasons = "; ".join(map(str, found))
        raise found[0].error(f"device={str(device)!r} was asked for, but {reasons}.")


def symptom(text: str) -> Problem | None:
    """What an error text of ONNX Runtime says about the device; None if nothing known."""
    for pattern, error, remedy in ORT_SYMPTOMS:
        if re.search(pattern, text):
            return Problem(error, essence(text), remedy)
    return None


def essence(text: str) -> str:
    """What an error text of ONNX Runtime is about: it puts C++ signatures around its sentence."""
    for pattern in ESSENCES:
        if match := re.search(pattern, text):
            return match[0].strip()
    return next(iter(text.strip().splitlines()), "no message")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of ONNX Runtime, NumPy or CUDA says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    return re.search(f"{ORT_SYMPTOMS[0][0]}|bad.?alloc", str(error)) is not None
