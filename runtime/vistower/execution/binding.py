"""Runs a session by IO binding: buffers that keep their addresses, batch buckets, CUDA graphs.

Input and outputs live in a buffer each, as large as the largest batch so far. All outputs are
always computed, which keeps the addresses; only what is wanted of them is copied out. A batch of B
pictures is bound as the first B rows of them, so no batch size allocates anything of its own. With
buckets a batch is padded with zeros to the smallest bucket that holds it; the rows of a batch do
not depend on each other, and only the first B come back.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vistower.errors import InferenceError
from vistower.execution.memory import Memory
from vistower.execution.providers import SessionOptions

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger("vistower")

NO_GRAPH = -1
"""ONNX Runtime's ``gpu_graph_id`` for a run that neither captures nor replays."""

BINDINGS_KEPT = 64
"""Batch sizes whose binding is kept; without buckets there could be any number of them."""


Wanted: TypeAlias = Mapping[str, int | None]
"""Name of an output → how many of its first tokens are wanted; None for all there is."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: its name, its dtype, its shape without the batch."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row(self) -> int:
        """Bytes of one picture's row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def leading(self, tokens: int | None) -> tuple[int, ...]:
        """The shape of the first tokens alone; None for the whole."""
        return self.shape if tokens is None else (tokens, *self.shape[1:])


@dataclass(frozen=True)
class Warmed:
    """One batch size after its first run: seconds of the first run and of the next, and whether
    the next replayed a captured CUDA graph.
    """

    batch_size: int
    first: float
    next: float
    graph: bool


class BoundRunner:
    """A session with its buffers. Not thread-safe: one worker calls it."""

    def __init__(
        self,
        module: ModuleType,
        session: Any,
        memory: Memory,
        *,
        source: Port,
        targets: Sequence[Port],
        options: SessionOptions,
    ) -> None:
        """Bind nothing yet.

        Args:
            module: ONNX Runtime.
            session: its ``InferenceSession``.
            memory: where input and outputs lie.
            source: the graph's input.
            targets: the graph's outputs.
            options: buckets, CUDA graphs and shrinking are read.
        """
        self._module = module
        self._session = session
        self._memory = memory
        self._source = source
        self._targets = {port.name: port for port in targets}
        self._options = options
        self._capacity = 0
        self._stale = 0
        """Rows of the input buffer, from the first, that may hold an earlier batch."""
        self._input: Any = None
        self._outputs: dict[str, Any] = {}
        self._bindings: dict[int, Any] = {}
        self._captured: set[int] = set()

    def run(
        self, batch: npt.NDArray[Any], wanted: Wanted, *, shrink: bool = False
    ) -> dict[str, npt.NDArray[Any]]:
        """A batch (B, ...) of any size → the outputs wanted (B, ...), the caller's own arrays."""
        results = {
            name: self._memory.empty(
                (len(batch), *self._targets[name].leading(tokens)), self._targets[name].dtype
            )
            for name, tokens in wanted.items()
        }
        for start, part in self._parts(batch):
            self._compute(part, shrink=shrink)
            for name, result in results.items():
                self._take(name, result[start : start + len(part)], wanted[name])
        return results

    def _take(self, name: str, out: npt.NDArray[Any], tokens: int | None) -> None:
        """Copy the first rows of an output's buffer, and of each the first tokens."""
        address, source = out.ctypes.data, self._outputs[name].data_ptr()
        if tokens is None:
            self._memory.copy(address, source, out.nbytes, "out")
            return
        size = out[0].nbytes
        for picture in range(len(out)):
            place = source + picture * self._targets[name].row
            self._memory.copy(address + picture * size, place, size, "out")

    def run_on_device(self, batch: npt.NDArray[Any], name: str) -> Any:
        """One output, as an ``OrtValue`` of the caller's own that stays on the device."""
        target = self._targets[name]
        result = self._allocate(len(batch), target)
        for start, part in self._parts(batch):
            self._compute(part)
            address = result.data_ptr() + start * target.row
            size = len(part) * target.row
            self._memory.copy(address, self._outputs[name].data_ptr(), size, "within")
        return result

    def warm(self, batch: npt.NDArray[Any]) -> Warmed:
        """Run a batch twice, and capture its CUDA graph in between where that is asked for.

        A captured graph whose first replay gives other numbers than the plain run is not used.

        Raises:
            InferenceError: the capture failed.
        """
        start = time.perf_counter()
        plain = self.run(batch, self._everything)
        first = time.perf_counter() - start
        size = self._padded(len(batch))
        if self._options.cuda_graphs and size not in self._captured:
            self._capture(size, batch, plain)
        start = time.perf_counter()
        self.run(batch, self._everything)
        return Warmed(len(batch), first, time.perf_counter() - start, size in self._captured)

    @property
    def _everything(self) -> Wanted:
        return dict.fromkeys(self._targets)

    def _capture(
        self, size: int, batch: npt.NDArray[Any], plain: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        self._captured.add(size)
        try:
            # One call runs twice for the allocations and then captures; older releases need more.
            for _ in range(3):
                replayed = self.run(batch, self._everything)
        except Exception as error:
            self._captured.discard(size)
            raise InferenceError(
                f"The CUDA graph of batch size {size} could not be captured: {error} Warm up while "
                f"no other thread of the process uses CUDA, or open without cuda_graphs."
            ) from error
        difference = np.max(
            [
                np.abs(replayed[name] - values).max() / (np.abs(values).max() or 1.0)
                for name, values in plain.items()
            ]
        )
        if not difference <= 1e-2:
            self._captured.discard(size)
            logger.warning(
                "The CUDA graph of batch size %d is not used: its replay is off by %.1e.",
                size,
                difference,
            )

    def _parts(self, batch: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Cut a batch by the largest bucket."""
        step = max(self._options.buckets, default=len(batch) or 1)
        for start in range(0, len(batch), step):
            yield start, batch[start : start + step]

    def _padded(self, batch_size: int) -> int:
        return next((size for size in self._options.buckets if size >= batch_size), batch_size)

    def _compute(self, batch: npt.NDArray[Any], *, shrink: bool = False) -> None:
        """Upload, run and wait; the first rows of the output buffer are the batch's."""
        size = self._padded(len(batch))
        # With buckets at once for the largest: captured graphs keep the buffers' addresses.
        self._reserve(max(self._options.buckets, default=size))
        row, address = self._source.row, self._input.data_ptr()
        self._memory.copy(address, batch.ctypes.data, len(batch) * row, "in")
        if len(batch) < (stale := min(self._stale, size)):
            self._memory.clear(address + len(batch) * row, (stale - len(batch)) * row)
        self._stale = self._stale if self._stale > size else len(batch)
        self._session.run_with_iobinding(self._binding(size), self._run_options(size, shrink))

    def _run_options(self, size: int, shrink: bool) -> Any:
        options = self._module.RunOptions()
        if self._options.cuda_graphs:
            graph = self._options.buckets.index(size) + 1 if size in self._captured else NO_GRAPH
            options.add_run_config_entry("gpu_graph_id", str(graph))
        if (shrink or self._options.shrink) and not self._options.cuda_graphs:
            where = "cpu" if self._memory.device_type == "cpu" else "gpu"
            options.add_run_config_entry(
                "memory.enable_memory_arena_shrinkage", f"{where}:{self._memory.device_id}"
            )
        return options

    def _reserve(self, size: int) -> None:
        if size <= self._capacity:
            return
        # Dropped first: old and new need not fit at once.
        self._bindings.clear()
        self._input = None
        self._outputs = {}
        self._capacity = 0
        self._input = self._allocate(size, self._source)
        self._outputs = {name: self._allocate(size, port) for name, port in self._targets.items()}
        self._memory.clear(self._input.data_ptr(), size * self._source.row)
        self._stale = 0
        self._capacity = size

    def _allocate(self, size: int, port: Port) -> Any:
        return self._module.OrtValue.ortvalue_from_shape_and_type(
            [size, *port.shape], port.dtype.type, self._memory.device_type, self._memory.device_id
        )

    def _binding(self, size: int) -> Any:
        if (binding := self._bindings.get(size)) is not None:
            return binding
        if len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.clear()
        binding = self._session.io_binding()
        place = self._memory.device_type, self._memory.device_id
        for bind, port, value in (
            (binding.bind_input, self._source, self._input),
            *(
                (binding.bind_output, port, self._outputs[name])
                for name, port in self._targets.items()
            ),
        ):
            bind(port.name, *place, port.dtype.type, (size, *port.shape), value.data_ptr())
        self._bindings[size] = binding
        return binding
