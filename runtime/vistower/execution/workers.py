"""One worker thread per GPU, on which everything that touches that GPU runs.

ONNX Runtime keeps captured CUDA graphs and cuDNN's plans per calling thread, and a session that
replays graphs must not run twice at once: so one thread per GPU serves all callers. While one
captures, CUDA forbids memory operations in every other thread of the process
(``cudaStreamCaptureModeGlobal``), hence `GpuWorker.run_alone`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import ParamSpec, Protocol, TypeVar

from vistower.forks import Process, in_every_child

P = ParamSpec("P")
R = TypeVar("R")


class Worker(Protocol):
    """Runs functions one at a time for any number of calling threads."""

    def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function and return its result or raise its exception."""

    def run_alone(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The same, while no other worker of the process runs anything."""


class CallingThread:
    """The worker of a CPU session: the calling thread itself, behind a lock."""

    def __init__(self) -> None:
        """Make the lock."""
        self._lock = threading.Lock()

    def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function and return its result or raise its exception."""
        with self._lock:
            return function(*args, **kwargs)

    run_alone = run


class GpuWorker:
    """The worker thread of one GPU."""

    def __init__(self, index: int) -> None:
        """Name the thread after the GPU; it starts with its first task."""
        self.index = index
        self._process = Process()
        self._busy = threading.Lock()
        self._ident: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"vistower-gpu-{index}")

    def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function on the GPU's thread and wait for its result or exception.

        A task of the thread itself may call it: the function then runs at once.

        Raises:
            InferenceError: the worker was inherited through fork.
        """
        self._process.require("GPU's worker")
        if threading.get_ident() == self._ident:
            return function(*args, **kwargs)

        def task() -> R:
            self._ident = threading.get_ident()
            with self._busy:
                return function(*args, **kwargs)

        return self._thread.submit(task).result()

    def run_alone(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The same, while no other GPU's worker runs anything."""
        self._process.require("GPU's worker")

        def task() -> R:
            self._ident = threading.get_ident()
            # In the order of the GPUs, and one capture a time: so no two wait for each other.
            with _capture, ExitStack() as all_busy:
                for _, worker in sorted(_workers.items()):
                    all_busy.enter_context(worker._busy)
                return function(*args, **kwargs)

        return self._thread.submit(task).result()


_capture = threading.Lock()
_making = threading.Lock()
_workers: dict[int, GpuWorker] = {}


def gpu_worker(index: int) -> GpuWorker:
    """The process's worker of a GPU."""
    with _making:
        return _workers.setdefault(index, GpuWorker(index))


def _forget() -> None:
    """A forked child has none of its parent's threads, and may have copied a lock while held."""
    global _capture, _making
    _capture, _making = threading.Lock(), threading.Lock()
    _workers.clear()


in_every_child(_forget)
