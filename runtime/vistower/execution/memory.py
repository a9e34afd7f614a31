"""Where the buffers of IO binding lie, and how bytes get in and out: host memory, or one GPU's.

On a GPU the host arrays that batches are made in and tokens come back in are page-locked
(pinned): the GPU copies from and to them at the speed of the bus and without a detour through the
driver's own staging buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from vistower.errors import CudaLibraryError, InferenceError
from vistower.execution.cuda_machine import load_library, provider_libraries
from vistower.execution.ort import CUDA_PROVIDER

Direction = Literal["in", "out", "within"]
"""Of a copy: from the host to the device, from the device to the host, inside the device."""

PINNED_LIMIT = 512 * 1024**2
"""Bytes of host memory a process keeps page-locked per GPU; larger arrays are ordinary memory."""

_SMALLEST_BLOCK = 64 * 1024


class Memory(Protocol):
    """The memory a bound session reads and writes; ``device_type`` as ONNX Runtime spells it."""

    device_type: str
    device_id: int

    def copy(self, target: int, source: int, size: int, direction: Direction) -> None:
        """Copy ``size`` bytes between two addresses; both are free for use afterwards."""

    def clear(self, target: int, size: int) -> None:
        """Set ``size`` bytes of device memory to zero."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array in host memory, the fastest kind to copy from and to."""


class HostMemory:
    """Host memory, for a session on the CPU."""

    device_type = "cpu"
    device_id = 0

    def copy(self, target: int, source: int, size: int, direction: Direction) -> None:
        """Copy bytes."""
        ctypes.memmove(target, source, size)

    def clear(self, target: int, size: int) -> None:
        """Zero bytes."""
        ctypes.memset(target, 0, size)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An ordinary array."""
        return np.empty(shape, dtype)


class PinnedPool:
    """Arrays in page-locked memory, whose blocks are used again when an array is gone.

    Locking pages costs milliseconds, so a block is never given back to the system; a batch size
    that comes again finds its block. Beyond ``limit`` bytes arrays are ordinary memory.
    """

    def __init__(self, allocate: Callable[[int], int], limit: int = PINNED_LIMIT) -> None:
        """Take blocks from ``allocate``: a size in bytes to an address, 0 where it cannot."""
        self._allocate = allocate
        self._limit = limit
        self._held = 0
        self._free: dict[int, list[int]] = {}
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An uninitialized array; its block returns to the pool with the last view of it."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        block = max(_SMALLEST_BLOCK, 1 << (size - 1).bit_length()) if size else 0
        address = self._take(block) if block else 0
        if not address:
            return np.empty(shape, dtype)
        owner = (ctypes.c_uint8 * size).from_address(address)
        # Nothing to do at exit: the memory goes with the process.
        weakref.finalize(owner, self._give_back, block, address).atexit = False
        array: npt.NDArray[Any] = np.frombuffer(memoryview(owner), kind)
        return array.reshape(shape)

    def _take(self, block: int) -> int:
        with contextlib.suppress(KeyError, IndexError):
            return self._free[block].pop()
        with self._lock:
            if self._held + block > self._limit:
                return 0
            self._held += block
        address = self._allocate(block)
        if not address:
            with self._lock:
                self._held -= block
        return address

    def _give_back(self, block: int, address: int) -> None:
        # Without the lock: the garbage collector may call this in a thread that holds it.
        self._free.setdefault(block, []).append(address)


class CudaMemory:
    """The memory of one GPU, by way of the CUDA runtime that ONNX Runtime itself is linked with.

    Every call must come from the GPU's worker thread, except `empty` as long as its pool has a
    block: the CUDA runtime keeps the current device per thread, and callers' is theirs.
    """

    device_type = "cuda"
    _COPIES: dict[Direction, int] = {"in": 1, "out": 2, "within": 3}  # noqa: RUF012
    _PORTABLE = 1

    def __init__(self, device_id: int, on_worker: Callable[[Callable[[], int]], int]) -> None:
        """Load the CUDA runtime.

        Args:
            device_id: the GPU.
            on_worker: calls a function on the GPU's worker thread.

        Raises:
            CudaLibraryError: the CUDA provider was not linked with a CUDA runtime library.
        """
        names = [library.name for library in provider_libraries(CUDA_PROVIDER)]
        name = next((name for name in names if name.startswith("libcudart.")), None)
        if name is None:
            raise CudaLibraryError(
                f"The CUDA provider is linked with {', '.join(names) or 'nothing'}, and a "
                f"libcudart was expected: this onnxruntime-gpu build is not known."
            )
        self.device_id = device_id
        self._cuda = load_library(name)
        self._cuda.cudaGetErrorString.restype = ctypes.c_char_p
        self._pool = PinnedPool(lambda size: on_worker(lambda: self._pinned(size)))

    def copy(self, target: int, source: int, size: int, direction: Direction) -> None:
        """Copy bytes and wait until they have arrived.

        Raises:
            InferenceError: CUDA failed.
        """
        kind = self._COPIES[direction]
        arguments = ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), kind
        self._check("cudaMemcpy", *arguments)
        if direction == "within":
            # Copies inside the device return at once, and DLPack's consumers do not wait.
            self._check("cudaStreamSynchronize", None)

    def clear(self, target: int, size: int) -> None:
        """Zero bytes and wait.

        Raises:
            InferenceError: CUDA failed.
        """
        self._check("cudaMemset", ctypes.c_void_p(target), 0, ctypes.c_size_t(size))
        self._check("cudaStreamSynchronize", None)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array in page-locked memory, or an ordinary one where that is used up."""
        return self._pool.empty(shape, dtype)

    def _pinned(self, size: int) -> int:
        address = ctypes.c_void_p()
        self._cuda.cudaSetDevice(self.device_id)
        result = self._cuda.cudaHostAlloc(
            ctypes.byref(address), ctypes.c_size_t(size), self._PORTABLE
        )
        if result:
            # The error would stay behind and be reported by the next call of anybody.
            self._cuda.cudaGetLastError()
            return 0
        return address.value or 0

    def _check(self, function: str, *arguments: Any) -> None:
        self._cuda.cudaSetDevice(self.device_id)
        result = getattr(self._cuda, function)(*arguments)
        if result:
            text = self._cuda.cudaGetErrorString(result).decode(errors="replace")
            raise InferenceError(f"{function} failed on cuda:{self.device_id}: {text} ({result}).")
