"""A GPU's memory and its worker, against a CUDA runtime that writes down what it is told."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vistower.errors import CudaLibraryError, InferenceError
from vistower.execution.cuda_machine import Library
from vistower.execution.memory import CudaMemory, PinnedPool
from vistower.execution.workers import CallingThread, GpuWorker


class FakeRuntime:
    """libcudart: copies in host memory, fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: set[str] = set()
        self.blocks: list[Any] = []
        self.cudaGetErrorString = SimpleNamespace(restype=None)

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            return 35 if name in self.fails else 0

        return function

    def cudaMemcpy(self, target: Any, source: Any, size: Any, kind: int) -> int:  # noqa: N802
        self.calls.append(("cudaMemcpy", kind))
        if "cudaMemcpy" in self.fails:
            return 35
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def cudaHostAlloc(self, address: Any, size: Any, flags: int) -> int:  # noqa: N802
        self.calls.append(("cudaHostAlloc", size.value))
        if "cudaHostAlloc" in self.fails:
            return 2
        self.blocks.append(ctypes.create_string_buffer(size.value))
        address._obj.value = ctypes.addressof(self.blocks[-1])
        return 0

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()

    class ErrorString:
        restype: Any = None

        def __call__(self, result: int) -> bytes:
            return b"CUDA driver version is insufficient for CUDA runtime version"

    fake.cudaGetErrorString = ErrorString()  # type: ignore[assignment]
    libraries = (Library("libcublas.so.13", None), Library("libcudart.so.13", None))
    monkeypatch.setattr("vistower.execution.memory.provider_libraries", lambda provider: libraries)
    monkeypatch.setattr("vistower.execution.memory.load_library", lambda name: fake)
    return fake


def memory(device: int = 1) -> CudaMemory:
    return CudaMemory(device, CallingThread().run)


@pytest.mark.parametrize(("direction", "kind"), [("in", 1), ("out", 2), ("within", 3)])
def test_copies(direction: Any, kind: int, runtime: FakeRuntime) -> None:
    source, target = np.arange(6.0), np.zeros(6)
    memory().copy(target.ctypes.data, source.ctypes.data, source.nbytes, direction)
    assert np.array_equal(target, source)
    assert ("cudaMemcpy", kind) in runtime.calls
    # A copy inside the device returns before it is done.
    assert ("cudaStreamSynchronize" in runtime.names()) == (direction == "within")
    assert runtime.calls[0] == ("cudaSetDevice", 1)


def test_a_failed_copy_says_why(runtime: FakeRuntime) -> None:
    runtime.fails = {"cudaMemcpy"}
    with pytest.raises(InferenceError, match=r"cudaMemcpy failed on cuda:1: CUDA driver version"):
        memory().copy(1, 1, 1, "in")


def test_page_locked_arrays(runtime: FakeRuntime) -> None:
    own = memory()
    array = own.empty((2, 3, 50, 50), np.float32)
    array[:] = 1
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.ctypes.data == ctypes.addressof(runtime.blocks[0])
    view = array[1:, 2]
    del array
    gc.collect()
    assert own.empty((2, 3, 50, 50), np.float32).ctypes.data != view.ctypes.data - 90_000
    del view
    gc.collect()
    assert own.empty((15_000,), np.float32).ctypes.data == ctypes.addressof(runtime.blocks[0])
    assert runtime.names().count("cudaHostAlloc") == 2
    assert own.empty((0, 3), np.float32).shape == (0, 3)


def test_without_page_locked_memory_arrays_are_ordinary(runtime: FakeRuntime) -> None:
    runtime.fails = {"cudaHostAlloc"}
    array = memory().empty((4, 5), np.uint8)
    assert (array.shape, array.dtype) == ((4, 5), np.uint8)
    # Else the next call of anybody in the process would report it.
    assert "cudaGetLastError" in runtime.names()


def test_the_pool_has_a_limit() -> None:
    blocks = []

    def allocate(size: int) -> int:
        blocks.append(ctypes.create_string_buffer(size))
        return ctypes.addressof(blocks[-1])

    pool = PinnedPool(allocate, limit=3 * 65_536)
    kept = [pool.empty((65_536,), np.uint8) for _ in range(5)]
    assert len(blocks) == 3
    assert all(len(array) == 65_536 for array in kept)


def test_a_build_without_cudart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only = (Library("libcublas.so.13", None),)
    monkeypatch.setattr("vistower.execution.memory.provider_libraries", lambda provider: only)
    with pytest.raises(CudaLibraryError, match=r"linked with libcublas\.so\.13, and a libcudart"):
        memory()


# Workers


def test_a_task_may_call_its_own_worker() -> None:
    worker = GpuWorker(7)
    assert worker.run(lambda: worker.run(threading.get_ident)) == worker.run(threading.get_ident)
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 / 0)


def test_captures_of_two_gpus_exclude_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import vistower.execution.workers as workers

    monkeypatch.setattr(workers, "_workers", {})
    pair = [workers.gpu_worker(index) for index in range(2)]
    running: list[str] = []
    seen: list[tuple[str, ...]] = []

    def task(name: str) -> None:
        running.append(name)
        for _ in range(5):
            seen.append(tuple(running))
            time.sleep(0.0005)
        running.remove(name)

    def calls(worker: GpuWorker) -> None:
        for _ in range(10):
            worker.run(task, "run")
            worker.run_alone(task, "capture")

    threads = [threading.Thread(target=calls, args=(pair[n % 2],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert all(len(names) == 1 for names in seen if "capture" in names)
