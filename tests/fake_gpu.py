"""A GPU machine faked at its edges: the driver, the shared libraries, and ONNX Runtime's session.

What lies between, all of vistower, is real, and so are the numbers: the faked CUDA session computes
on the CPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

import vistower.execution.cuda_machine as cuda_machine
import vistower.execution.session as session_module
from vistower.execution.memory import HostMemory, PinnedPool

OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
    "MatMul node. Name:'layers.0.up' Status Message: /onnxruntime_src/onnxruntime/core/framework/"
    "bfc_arena.cc:359 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, Stream*) "
    "Failed to allocate memory for requested buffer of size 1207959552\n"
)
"""ONNX Runtime's own words."""


@dataclass
class FakeGpu:
    """The machine, to be bent by a test; and what was asked of it."""

    providers: list[str] = field(
        default_factory=lambda: [
            "TensorrtExecutionProvider",
            "CUDAExecutionProvider",
            "CPUExecutionProvider",
        ]
    )
    wheels: dict[str, str] = field(default_factory=lambda: {"onnxruntime-gpu": "1.31.1"})
    needed: tuple[str, ...] = ("libcublasLt.so.13", "libcudart.so.13", "libcuda.so.1", "libc.so.6")
    missing: set[str] = field(default_factory=set)
    only: set[str] = field(default_factory=set)
    cu_init: int = 0
    cuda_version: int = 13000
    gpus: list[tuple[str, tuple[int, int]]] = field(
        default_factory=lambda: [("NVIDIA H200", (9, 0)), ("NVIDIA T4", (7, 5))]
    )
    fails_to_open: str | None = None
    falls_back: bool = False
    nodes_on_cpu: Sequence[tuple[str, str]] = ()
    largest_batch: int | None = None
    replay: Callable[[Any], None] | None = None
    opened: list[dict[str, dict[str, str]]] = field(default_factory=list)
    config: list[dict[str, str]] = field(default_factory=list)
    runs: list[SimpleNamespace] = field(default_factory=list)

    def load_library(self, name: str) -> Any:
        """What `ctypes.CDLL` does on this machine."""
        if name in self.missing or (name.startswith("lib") and not self._has(name)):
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return (
            self if name == "libcuda.so.1" else SimpleNamespace(getInferLibVersion=lambda: 101300)
        )

    def _has(self, name: str) -> bool:
        return name in self.needed or name in self.only

    # The CUDA driver's functions write through pointers.

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.cu_init

    def cuDriverGetVersion(self, value: Any) -> int:  # noqa: N802
        value._obj.value = self.cuda_version
        return 0

    def cuDeviceGetCount(self, value: Any) -> int:  # noqa: N802
        value._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, value: Any, index: int) -> int:  # noqa: N802
        value._obj.value = index
        return 0

    def cuDeviceGetName(self, buffer: Any, size: int, device: Any) -> int:  # noqa: N802
        buffer.value = self.gpus[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, value: Any, device: Any) -> int:  # noqa: N802
        value._obj.value = 80 * 1000**3
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.gpus[device.value][1][{75: 0, 76: 1}[number]]
        return 0


class FakeCudaMemory(HostMemory):
    """A GPU's memory in host memory, with a real pool of "pinned" blocks."""

    def __init__(self, device_id: int, on_worker: Callable[[Callable[[], int]], int]) -> None:
        self.blocks: list[Any] = []
        self.pool = PinnedPool(lambda size: on_worker(lambda: self._allocate(size)))

    def _allocate(self, size: int) -> int:
        self.blocks.append(ctypes.create_string_buffer(size))
        return ctypes.addressof(self.blocks[-1])

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.pool.empty(shape, dtype)


def fake_session(gpu: FakeGpu) -> type:
    """ONNX Runtime's InferenceSession on that machine."""
    real = onnxruntime.InferenceSession

    class Session(real):  # type: ignore[misc,valid-type]
        def __init__(
            self, path: str, options: Any = None, *, providers: Any, **kwargs: Any
        ) -> None:
            pairs = dict(one if isinstance(one, tuple) else (one, {}) for one in providers)
            on_gpu = next(iter(pairs)) != "CPUExecutionProvider"
            if on_gpu:
                gpu.opened.append(pairs)
                gpu.config.append({key: _entry(options, key) for key in CONFIG})
                if gpu.fails_to_open is not None:
                    raise RuntimeError(gpu.fails_to_open)
                if gpu.config[-1]["session.disable_cpu_ep_fallback"] == "1":
                    # ONNX Runtime refuses the two together.
                    assert "CPUExecutionProvider" not in pairs
                    options = onnxruntime.SessionOptions()
            super().__init__(path, options, providers=["CPUExecutionProvider"], **kwargs)
            self.claimed = list(pairs) if on_gpu and not gpu.falls_back else None

        def get_providers(self) -> list[str]:
            return self.claimed or super().get_providers()

        def get_provider_graph_assignment_info(self) -> list[Any]:
            if self.claimed is None:
                return list(super().get_provider_graph_assignment_info())
            parts = [_part(self.claimed[0], [("MatMul", f"layers.{n}.q") for n in range(9)])]
            return [*parts, _part("CPUExecutionProvider", gpu.nodes_on_cpu)]

        def run_with_iobinding(self, binding: Any, run_options: Any = None) -> None:
            size = binding._bound_size
            gpu.runs.append(
                SimpleNamespace(
                    size=size,
                    graph=_entry(run_options, "gpu_graph_id"),
                    shrink=_entry(run_options, "memory.enable_memory_arena_shrinkage"),
                    thread=threading.current_thread().name,
                )
            )
            if gpu.largest_batch is not None and size > gpu.largest_batch:
                raise RuntimeError(OUT_OF_MEMORY)
            super().run_with_iobinding(binding, run_options)
            if gpu.replay is not None and _entry(run_options, "gpu_graph_id") not in (None, "-1"):
                gpu.replay(binding)

        def io_binding(self) -> Any:
            return _Binding(self)

    return Session


class _Binding(onnxruntime.IOBinding):  # type: ignore[misc]
    def bind_input(self, name: str, *place: Any) -> None:
        self._bound_size = place[3][0]
        super().bind_input(name, *place)


CONFIG = (
    "session.disable_cpu_ep_fallback",
    "session.record_ep_graph_assignment_info",
    "session.use_device_allocator_for_initializers",
)


def _entry(options: Any, key: str) -> Any:
    if options is None:
        return None
    name = "get_run_config_entry" if hasattr(options, "get_run_config_entry") else None
    try:
        return getattr(options, name or "get_session_config_entry")(key)
    except RuntimeError:
        return None


def _part(provider: str, nodes: Sequence[tuple[str, str]]) -> Any:
    found = [SimpleNamespace(op_type=kind, name=name, domain="") for kind, name in nodes]
    return SimpleNamespace(ep_name=provider, get_nodes=lambda: found)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A machine with two GPUs where everything is right, until a test bends it."""
    machine = FakeGpu()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: machine.providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fake_session(machine))
    monkeypatch.setattr("vistower.execution.cuda_problems.installed_wheels", lambda: machine.wheels)
    monkeypatch.setattr(cuda_machine, "load_library", machine.load_library)
    monkeypatch.setattr("vistower.execution.tensorrt.load_library", machine.load_library)
    # Any file that exists: what it was linked with is the machine's to say.
    files = dict.fromkeys(cuda_machine.PROVIDER_FILES, "_pybind_state.py")
    monkeypatch.setattr(cuda_machine, "PROVIDER_FILES", files)
    monkeypatch.setattr(cuda_machine, "needed_libraries", lambda path: machine.needed)
    monkeypatch.setattr(session_module, "CudaMemory", FakeCudaMemory)
    return machine
