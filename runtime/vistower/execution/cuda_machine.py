"""What this machine has for CUDA: driver, GPUs, libraries.

Everything is found without a CUDA toolkit and without torch: the driver is asked through
``libcuda``, and the libraries that ONNX Runtime's CUDA provider was linked with are read from the
provider's own file.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from vistower.errors import DeviceError, DriverError
from vistower.execution.device import Device
from vistower.execution.ort import CUDA_PROVIDER, TENSORRT_PROVIDER, onnxruntime

DRIVER_LIBRARY = "libcuda.so.1"

PROVIDER_FILES: Mapping[str, str] = MappingProxyType(
    {
        CUDA_PROVIDER: "libonnxruntime_providers_cuda.so",
        TENSORRT_PROVIDER: "libonnxruntime_providers_tensorrt.so",
    }
)

LOADED_LATER = ("libcudnn.so.9",)
"""Libraries the CUDA provider loads when it needs them: cuDNN for its attention kernel and Conv."""

CUDA_LIBRARY = re.compile(r"lib(cu|nv)[a-zA-Z]+\.so\.(\d+)")
"""Libraries NVIDIA ships, with their major version: libcublas.so.13, libnvinfer.so.10."""

DRIVER_ERRORS: Mapping[int, str] = MappingProxyType(
    {
        3: "CUDA does not survive a fork: start worker processes by 'spawn'",
        34: "the libcuda found is the toolkit's stub: remove its directory from LD_LIBRARY_PATH",
        100: "it finds no GPU: start the container with GPUs, and look at CUDA_VISIBLE_DEVICES",
        802: "the system is not ready: is the fabric manager of this machine running?",
        803: "kernel module and user library differ: reboot, or start the container anew",
        804: "the forward-compatibility package does not work with this GPU: remove it",
    }
)
"""Results of ``cuInit`` (``CUresult`` in cuda.h) that have a remedy of their own."""


@dataclass(frozen=True)
class Problem:
    """One reason why a device cannot be had: what was found, what to do, the error to raise."""

    error: type[DeviceError]
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.found}: {self.remedy}"


@dataclass(frozen=True)
class Gpu:
    """One GPU as CUDA numbers them; memory in bytes, compute capability (major, minor)."""

    index: int
    name: str
    memory: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: the newest CUDA version it serves, and the GPUs it shows this process."""

    cuda_version: tuple[int, int]
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Library:
    """A shared library a provider was linked with; ``error`` is None where it can be loaded."""

    name: str
    error: str | None


def load_library(name: str) -> ctypes.CDLL:
    """Load a shared library by name, from NVIDIA's wheels too; raises OSError naming what misses.

    ONNX Runtime's own preloading looks only beside itself, and not for TensorRT.
    """
    try:
        return ctypes.CDLL(name)
    except OSError:
        for path in _in_wheels(name):
            # Global: the provider, loaded later, finds it by its name.
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        raise


def _in_wheels(name: str) -> Iterator[Path]:
    for package, pattern in (("nvidia", f"*/lib/{name}"), ("tensorrt_libs", name)):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(Path(folder).glob(pattern))


def driver() -> Driver | Problem:
    """Ask the NVIDIA driver for its version and GPUs; no CUDA context is made."""
    remedy = "install one, or start the container with GPUs"
    try:
        cuda = load_library(DRIVER_LIBRARY)
    except OSError as error:
        return Problem(DriverError, f"there is no NVIDIA driver ({error})", remedy)
    result = cuda.cuInit(0)
    if result:
        remedy = DRIVER_ERRORS.get(result, "see CUresult in the CUDA driver's documentation")
        return Problem(DriverError, f"the NVIDIA driver does not start (cuInit: {result})", remedy)
    version = _asked(cuda.cuDriverGetVersion)
    gpus = tuple(_gpu(cuda, index) for index in range(_asked(cuda.cuDeviceGetCount)))
    return Driver((version // 1000, version % 1000 // 10), gpus)


def compute_capability(device: Device) -> tuple[int, int] | None:
    """Compute capability (major, minor) of a GPU device; None for others, or where unknown."""
    found = driver() if device.on_gpu else None
    if not isinstance(found, Driver) or device.index >= len(found.gpus):
        return None
    return found.gpus[device.index].compute_capability


def _asked(function: Any, *arguments: Any) -> int:
    """Call a driver function that writes one integer to its first argument."""
    value = ctypes.c_int()
    function(ctypes.byref(value), *arguments)
    return value.value


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    handle = ctypes.c_int(_asked(cuda.cuDeviceGet, index))
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), handle)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
    major, minor = (_asked(cuda.cuDeviceGetAttribute, number, handle) for number in (75, 76))
    return Gpu(index, name.value.decode(errors="replace"), memory.value, (major, minor))


def provider_libraries(provider: str) -> tuple[Library, ...]:
    """NVIDIA's libraries that a provider was linked with, and whether each can be loaded.

    Empty where the provider's file is not there or is no ELF file.
    """
    capi = Path(cast("str", onnxruntime().__file__)).parent / "capi"
    path = capi / PROVIDER_FILES[provider]
    if not path.is_file():
        return ()
    return tuple(
        look_for(name)
        for name in needed_libraries(path)
        if name != DRIVER_LIBRARY and CUDA_LIBRARY.fullmatch(name)
    )


def look_for(name: str) -> Library:
    """Whether a shared library can be loaded."""
    try:
        load_library(name)
    except OSError as error:
        return Library(name, str(error))
    return Library(name, None)


def needed_libraries(path: Path) -> tuple[str, ...]:
    """The libraries an ELF file was linked with (``DT_NEEDED``), in order; none for other files.

    Loading the file would name only the first one that is missing.
    """
    with path.open("rb") as file:
        if file.read(6) != b"\x7fELF\x02\x01":
            return ()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return tuple(_needed(data))


_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB = 1, 5


def _needed(data: mmap.mmap) -> Iterator[str]:
    # ELF-64, little-endian: Elf64_Ehdr, Elf64_Phdr and Elf64_Dyn of the System V ABI.
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<IIQQQQ", data, offset + size * n) for n in range(count)]
    entries: list[tuple[int, int]] = []
    for kind, _, start, _, _, length in segments:
        if kind == _PT_DYNAMIC:
            entries = list(struct.iter_unpack("<QQ", data[start : start + length]))
    names = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
    base = 0
    for kind, _, start, address, _, length in segments:
        if kind == _PT_LOAD and address <= names < address + length:
            base = names - address + start
    for tag, value in entries:
        if tag == _DT_NEEDED:
            yield data[base + value : data.find(b"\0", base + value)].decode()
