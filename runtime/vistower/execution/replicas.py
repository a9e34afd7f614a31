"""Data parallelism inside one process: one session per device, each batch shared out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.execution.binding import Wanted, Warmed
from vistower.execution.device import Device
from vistower.execution.session import Session
from vistower.families.record import LAST_HIDDEN_STATE
from vistower.forks import Process


class Replicas:
    """Sessions of one graph on several devices, used like one session.

    A batch is cut into as many equal parts as there are devices (fewer where it has fewer
    pictures) and computed at once; each part goes to the device that has the least to do, so
    single pictures from many threads spread out too.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        """Join sessions of one graph, at least one."""
        self.sessions = tuple(sessions)
        self._pending = [0] * len(sessions)
        self._lock = threading.Lock()
        self._process = Process()
        # As many callers as there are devices can keep them all busy; more would wait anyway.
        self._threads = ThreadPoolExecutor(len(sessions), thread_name_prefix="vistower-replica")

    def __reduce__(self) -> tuple[Any, ...]:
        return Replicas, (self.sessions,)

    @property
    def device(self) -> Device:
        """The first device; all are of one kind as a rule."""
        return self.sessions[0].device

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices in the order given."""
        return tuple(session.device for session in self.sessions)

    @property
    def threads(self) -> int:
        """CPU threads inside one run of one device."""
        return self.sessions[0].threads

    @property
    def provider(self) -> str:
        """Their execution providers, each once."""
        return ", ".join(dict.fromkeys(session.provider for session in self.sessions))

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """What the graph takes."""
        return self.sessions[0].input_dtype

    def empty(self, batch_size: int) -> npt.NDArray[Any]:
        """An input array, see `Session.empty`."""
        return self.sessions[0].empty(batch_size)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs of the graph."""
        return self.sessions[0].outputs

    def run(self, pixel_values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """``last_hidden_state`` alone, see `Session.run`."""
        return self.compute(pixel_values, {LAST_HIDDEN_STATE: None})[LAST_HIDDEN_STATE]

    def compute(
        self, pixel_values: npt.NDArray[Any], wanted: Wanted
    ) -> dict[str, npt.NDArray[np.float32]]:
        """One forward pass over all devices, see `Session.compute`; rows keep their order.

        Raises:
            InferenceError: a device failed; the other parts are computed to their end first.
        """
        self._process.require("encoder")
        parts = np.array_split(pixel_values, min(len(self.sessions), len(pixel_values)))
        if len(parts) == 1:
            return self._on_least_busy(parts[0], wanted)
        waiting = [self._threads.submit(self._on_least_busy, part, wanted) for part in parts]
        wait(waiting)
        found = [future.result() for future in waiting]
        return {name: np.concatenate([part[name] for part in found]) for name in wanted}

    def _on_least_busy(
        self, pixel_values: npt.NDArray[Any], wanted: Wanted
    ) -> dict[str, npt.NDArray[np.float32]]:
        with self._lock:
            index = self._pending.index(min(self._pending))
            self._pending[index] += len(pixel_values)
        try:
            return self.sessions[index].compute(pixel_values, wanted)
        finally:
            with self._lock:
                self._pending[index] -= len(pixel_values)

    def warmup(self, batch_sizes: Sequence[int] = ()) -> tuple[Warmed, ...]:
        """Warm every device up in turn, see `Session.warmup`; reports come device by device."""
        return tuple(warmed for session in self.sessions for warmed in session.warmup(batch_sizes))
