"""One process: one backend on one model. Opens it, checks its numbers, then times it.

``python -m benchmarks.worker JOB.json RESULT.json STARTED``, where STARTED is ``time.monotonic()``
of the parent just before it started this process: the clock is the machine's, so the cold start
counts the interpreter and every import.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.backends import Entry, entries
from benchmarks.backends.base import Backend, Context


@dataclass(frozen=True)
class Job:
    """What one process does.

    Each batch size is called at least ``calls`` times and for at least ``seconds``.
    """

    backend: str
    model: str
    family: str
    device: str
    threads: int
    artifacts: str
    graphs: dict[str, str]
    batches: list[int]
    seconds: float
    calls: int

    def entry(self) -> Entry:
        """The backend's entry."""
        found = entries(self.device, self.graphs)
        return next(entry for entry in found if entry.name == self.backend)


def cold_start(backend: Backend, first: Path, started: float) -> dict[str, float]:
    """Open everything and embed one picture file: seconds of each stage, and since ``started``."""
    stages = {"start": time.monotonic() - started}
    backend.open()
    stages["open"] = time.monotonic() - started
    backend.open_files()
    stages["open_files"] = time.monotonic() - started
    backend.embed([first])
    total = time.monotonic() - started
    return {
        "start": stages["start"],
        "open": stages["open"] - stages["start"],
        "open_files": stages["open_files"] - stages["open"],
        "first": total - stages["open_files"],
        "total": total,
    }


def sample(call: Callable[[], Any], seconds: float, calls: int) -> list[float]:
    """Seconds of each call, after the check has warmed it up."""
    times: list[float] = []
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(times) < calls or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def measure(backend: Backend, job: Job, files: Sequence[Path]) -> dict[str, Any]:
    """Check, then time, each task at each batch size; one that disagrees has no time.

    Tasks: ``model`` is pixel_values → last_hidden_state, ``files`` is JPEG files → embeddings.
    """
    import numpy as np

    from benchmarks.compare import Agreement, compare

    reference = np.load(Path(job.artifacts) / "reference" / f"{job.model}.npz", allow_pickle=False)
    precision = job.entry().precision
    agreement: dict[str, dict[str, Any]] = {"model": {}, "files": {}}
    times: dict[str, dict[str, list[float]]] = {"model": {}, "files": {}}

    def keep(task: str, batch: int, verdict: Agreement, call: Callable[[], Any]) -> None:
        agreement[task][str(batch)] = asdict(verdict)
        if verdict.agrees:
            times[task][str(batch)] = sample(call, job.seconds, job.calls)

    for batch in job.batches:
        index = [i % len(files) for i in range(batch)]
        backend.prepare(batch)
        if backend.model_only:
            inputs = backend.put(np.ascontiguousarray(reference["pixel_values"][index]))
            verdict = compare(
                backend.get(backend.run(inputs)), reference["tokens"][index], precision
            )
            keep("model", batch, verdict, lambda: backend.run(inputs))  # noqa: B023
        chosen = [files[i] for i in index]
        verdict = compare(backend.embed(chosen), reference[backend.embeds][index], precision)
        keep("files", batch, verdict, lambda: backend.embed(chosen))  # noqa: B023
    return {"agreement": agreement, "times": times}


def work(job: Job, started: float) -> dict[str, Any]:
    """The whole life of the process."""
    artifacts = Path(job.artifacts)
    files = sorted((artifacts / "pictures").glob("*.jpg"))
    entry = job.entry()
    context = Context(artifacts, job.model, job.family, job.threads, job.device)
    backend = entry.make(context)
    cold = cold_start(backend, files[0], started)

    from benchmarks import machine, sizes

    rss = {"first_embedding": machine.peak_rss()}
    result = {"cold": cold, **measure(backend, job, files), "settings": backend.settings()}
    rss["end"] = machine.peak_rss()
    if job.device == "cuda":
        result["gpu_memory"] = machine.gpu_memory()
    return {
        **result,
        "rss": rss,
        "versions": machine.versions(),
        "installed": sizes.installed(entry.libraries),
    }


def main() -> None:
    """Read the job, write the result."""
    job_path, result_path, started = sys.argv[1:]
    job = Job(**json.loads(Path(job_path).read_text(encoding="utf-8")))
    result = work(job, float(started))
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
