"""The result of a run: every raw round, and the figures the tables and plots take from them.

``results/DEVICE.json``: ``machine``, ``settings`` (rounds, batches, seconds…), ``peaks`` (one per
round), ``models`` and ``records``: one per process, with what `benchmarks.worker` wrote under
``result``, or ``error``.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1

DISTURBED = 0.05
"""Share of the CPU that others may take while a backend is measured without a remark."""


@dataclass(frozen=True)
class Record:
    """One process: a backend on a model in a round.

    ``seconds`` is how long it took, ``foreign`` the share of the machine's CPU time that other
    processes, or other guests of the host, took meanwhile.
    """

    backend: str
    label: str
    note: str
    precision: str
    model: str
    round: int
    seconds: float
    foreign: float
    result: dict[str, Any] | None
    error: str | None

    def __post_init__(self) -> None:
        """Either a result or an error."""
        if (self.result is None) == (self.error is None):
            raise ValueError(f"{self.backend} on {self.model}: a result or an error, not both.")


@dataclass(frozen=True)
class Run:
    """Everything measured together."""

    device: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    models: dict[str, dict[str, Any]]
    peaks: list[dict[str, Any]]
    records: list[Record] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def save(self, path: Path) -> None:
        """Write JSON, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        partial.write_text(json.dumps(_rounded(asdict(self))) + "\n", encoding="utf-8")
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote.

        Raises:
            ValueError: it is of another format.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {data.get('format_version')!r}.")
        records = [Record(**record) for record in data.pop("records")]
        return cls(**data, records=records)

    @property
    def peak_gflops(self) -> float:
        """The fastest float32 product of all rounds."""
        return max((peak["gflops"] for peak in self.peaks), default=math.nan)

    def backends(self, model: str) -> list[str]:
        """Backends of a model, in the order they were declared."""
        return list(dict.fromkeys(r.backend for r in self.records if r.model == model))


@dataclass(frozen=True)
class Timing:
    """One backend, model, task and batch over all rounds.

    ``median`` and ``best`` are seconds of a call: the median of the rounds' medians, and the
    fastest call of all; ``p50`` and ``p99`` are of all calls together, ``calls`` of them.
    """

    median: float
    best: float
    p50: float
    p99: float
    calls: int
    batch: int

    @property
    def images_per_second(self) -> float:
        """From the median."""
        return self.batch / self.median


@dataclass(frozen=True)
class Summary:
    """What the tables say of one backend on one model; None where nothing was measured.

    ``timings`` maps (task, batch) to a `Timing`. ``cold`` in seconds and ``rss`` in bytes are
    medians of the rounds, up to the first embedding; ``rss_end`` after the largest batch.
    """

    backend: str
    label: str
    note: str
    precision: str
    model: str
    timings: dict[tuple[str, int], Timing]
    cold: float | None
    rss: float | None
    rss_end: float | None
    gpu_memory: float | None
    installed: int | None
    installed_cuda: int | None
    cosine: float | None
    max_abs: float | None
    disagrees: tuple[str, ...]
    errors: tuple[str, ...]


def summaries(run: Run, model: str) -> list[Summary]:
    """Every backend of a model."""
    return [_summary(run, model, backend) for backend in run.backends(model)]


def _summary(run: Run, model: str, backend: str) -> Summary:
    records = [r for r in run.records if r.model == model and r.backend == backend]
    results = [record.result for record in records if record.result is not None]
    verdicts = [
        (task, batch, verdict)
        for result in results
        for task, batches in result["agreement"].items()
        for batch, verdict in batches.items()
    ]
    installed = results[0]["installed"] if results else None
    return Summary(
        backend=backend,
        label=records[0].label,
        note=records[0].note,
        precision=records[0].precision,
        model=model,
        timings={
            (task, batch): timing
            for task in ("model", "files")
            for batch in run.settings["batches"]
            if (timing := _timing(results, task, batch)) is not None
        },
        cold=_median(result["cold"]["total"] for result in results),
        rss=_median(result["rss"]["first_embedding"] for result in results),
        rss_end=_median(result["rss"]["end"] for result in results),
        gpu_memory=_median(
            result["gpu_memory"] for result in results if result.get("gpu_memory") is not None
        ),
        installed=installed["bytes"] if installed else None,
        installed_cuda=installed["cuda_bytes"] if installed else None,
        cosine=min((verdict["cosine"] for _, _, verdict in verdicts), default=None),
        max_abs=max((verdict["max_abs"] for _, _, verdict in verdicts), default=None),
        disagrees=tuple(
            dict.fromkeys(f"{task} at batch {b}" for task, b, v in verdicts if not v["agrees"])
        ),
        errors=tuple(dict.fromkeys(r.error for r in records if r.error is not None)),
    )


def _timing(results: Sequence[dict[str, Any]], task: str, batch: int) -> Timing | None:
    rounds = [r["times"][task][str(batch)] for r in results if str(batch) in r["times"][task]]
    if not rounds:
        return None
    calls = sorted(time for times in rounds for time in times)
    return Timing(
        median=statistics.median(statistics.median(times) for times in rounds),
        best=calls[0],
        p50=statistics.median(calls),
        p99=calls[min(len(calls) - 1, math.ceil(0.99 * len(calls)) - 1)],
        calls=len(calls),
        batch=batch,
    )


def _median(values: Iterator[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _rounded(value: Any) -> Any:
    """Floats to seven significant digits: nothing here is known better, and the file is kept."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.7g}")
    return value
