"""Starts the processes, round by round, and keeps each result as it comes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import artifacts, machine
from benchmarks.backends import Entry, entries
from benchmarks.models import MODELS
from benchmarks.results import DISTURBED, Record, Run
from benchmarks.worker import Job

REPOSITORY = Path(__file__).resolve().parent.parent

SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that would decide a library's kernels or threads behind its back: taken out."""

ERROR_LINES = 12


@dataclass(frozen=True)
class Plan:
    """What a run does.

    ``seconds`` and ``calls`` are the least for each batch size in a process, ``timeout`` the
    seconds a process may take. One that others on the machine disturbed is measured again, up to
    ``tries`` times, and the least disturbed counts.
    """

    device: str
    models: tuple[str, ...]
    backends: tuple[str, ...] | None
    batches: tuple[int, ...]
    rounds: int
    seconds: float
    calls: int
    timeout: float
    threads: int
    tries: int


class ResumeError(RuntimeError):
    """An interrupted run cannot be continued with these settings."""


class UnknownBackendError(ValueError):
    """A backend was asked for that is not known for the device."""


def run(plan: Plan, root: Path, pythons: Mapping[str, str], output: Path) -> Run:
    """Run the plan; ``output`` is written again after every process.

    A process that fails or takes too long is recorded with its error and does not end the run.

    Args:
        plan: what to do.
        root: the folder `benchmarks.artifacts` filled.
        pythons: environment → its interpreter.
        output: the JSON of the run.

    Raises:
        UnknownBackendError: naming it, and those there are.
    """
    graphs = {name: artifacts.graphs(root, name) for name in plan.models}
    chosen = {name: _chosen(plan, name, graphs[name]) for name in plan.models}
    _check_names(plan, graphs)
    folder = _folder(plan, root)
    description = machine.describe(plan.threads, plan.device)
    settings = asdict(plan) | {"graphs": graphs}
    models = {name: asdict(MODELS[name]) | {"gflop": MODELS[name].gflop} for name in plan.models}
    peaks: list[dict[str, Any]] = []
    records: list[Record] = []

    def save() -> Run:
        order = [(name, entry.name) for name in plan.models for entry in chosen[name]]
        ordered = sorted(records, key=lambda r: (order.index((r.model, r.backend)), r.round))
        done = Run(plan.device, description, settings, models, peaks, ordered)
        done.save(output)
        return done

    for number in range(plan.rounds):
        if (peak := _peak(plan, folder, pythons["main"], number)) is not None:
            peaks.append(peak)
        jobs = [(name, entry) for name in plan.models for entry in chosen[name]]
        # Every other round backwards, so that heat and drift do not favour a place in the order.
        for name, entry in jobs if number % 2 == 0 else reversed(jobs):
            record = _record(plan, root, folder, pythons, graphs[name], entry, name, number)
            records.append(record)
            _tell(record)
            save()
    return save()


def begin(plan: Plan, root: Path, *, resume: bool) -> bool:
    """Make the folder of the run's raw rounds; tell whether an interrupted run goes on.

    Raises:
        ResumeError: the interrupted run had another plan or commit.
    """
    folder = _folder(plan, root)
    commit = machine.describe(plan.threads, plan.device)["commit"]
    stamp = json.dumps(asdict(plan) | {"commit": commit}, sort_keys=True)
    path = folder / "plan.json"
    if resume and path.exists():
        found = path.read_text(encoding="utf-8")
        if found != stamp:
            raise ResumeError(
                f"The interrupted run in {folder} was {found}, and this is {stamp}. Start anew "
                f"without --resume."
            )
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path.write_text(stamp, encoding="utf-8")
    return False


def _folder(plan: Plan, root: Path) -> Path:
    return root / "rounds" / plan.device


def make_artifacts(plan: Plan, root: Path, pythons: Mapping[str, str]) -> None:
    """Make the files all backends share; the optimum environment is used if it is wanted."""
    command = [pythons["main"], "-m", "benchmarks.artifacts", str(root), plan.device, *plan.models]
    subprocess.run(command, check=True, cwd=REPOSITORY, env=_environment())
    if plan.device == "cpu" and (plan.backends is None or "optimum" in plan.backends):
        for name in plan.models:
            try:
                artifacts.write_optimum(root, MODELS[name], pythons["optimum"])
            except (OSError, subprocess.CalledProcessError) as error:
                stderr = getattr(error, "stderr", None) or b""
                print(f"{name}: no export by optimum: {error} {stderr.decode()[-500:]}", flush=True)


def _chosen(plan: Plan, name: str, graphs: Mapping[str, str]) -> list[Entry]:
    """A model's backends; ``vistower`` stands for every graph of ours."""
    return [
        entry
        for entry in entries(plan.device, graphs)
        if MODELS[name].family in entry.families
        and (
            plan.backends is None
            or entry.name in plan.backends
            or (entry.name.startswith("vistower-") and "vistower" in plan.backends)
        )
    ]


def _check_names(plan: Plan, graphs: Mapping[str, Mapping[str, str]]) -> None:
    known = {e.name: None for found in graphs.values() for e in entries(plan.device, found)}
    if unknown := set(plan.backends or ()) - set(known) - {"vistower"}:
        raise UnknownBackendError(
            f"Unknown backend {', '.join(sorted(unknown))}; known for {plan.device}: "
            f"{', '.join(known)}, or vistower for all of ours."
        )


def _environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in SLOWING}
    paths = [str(REPOSITORY), environment.get("PYTHONPATH", "")]
    return environment | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _peak(plan: Plan, folder: Path, python: str, number: int) -> dict[str, Any] | None:
    path = folder / f"peak-{number}.json"
    if not path.exists():
        call = (
            f"peak.cpu({plan.threads}, {plan.seconds / 3})"
            if plan.device == "cpu"
            else "peak.gpu(2.0)"
        )
        code = f"import json; from benchmarks import peak; print(json.dumps({call}))"
        done = subprocess.run(
            [python, "-c", code],
            check=False,
            cwd=REPOSITORY,
            env=_environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            print(f"round {number}: no fastest product: {done.stderr[-500:]}", flush=True)
            return None
        path.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
    peak: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    print(f"round {number}: fastest float32 product {peak['gflops']:.0f} GFLOP/s", flush=True)
    return peak


def _record(
    plan: Plan,
    root: Path,
    folder: Path,
    pythons: Mapping[str, str],
    graphs: dict[str, str],
    entry: Entry,
    name: str,
    number: int,
) -> Record:
    stem = f"{name}--{entry.name}--{number}"
    kept = folder / f"{stem}.record.json"
    if kept.exists():
        return Record(**json.loads(kept.read_text(encoding="utf-8")))
    job = Job(
        backend=entry.name,
        model=name,
        family=MODELS[name].family,
        device=plan.device,
        threads=plan.threads,
        artifacts=str(root),
        graphs=graphs,
        batches=list(plan.batches),
        seconds=plan.seconds,
        calls=plan.calls,
    )
    tries = []
    for _ in range(plan.tries):
        clock = machine.CpuClock()
        result, error = _work(job, folder / stem, pythons[entry.environment], plan.timeout)
        tries.append(
            Record(
                backend=entry.name,
                label=entry.label,
                note=entry.note,
                precision=entry.precision,
                model=name,
                round=number,
                seconds=clock.seconds(),
                foreign=clock.foreign(),
                result=result,
                error=error,
            )
        )
        if error is not None or tries[-1].foreign <= DISTURBED:
            break
    record = min(tries, key=lambda one: (one.error is not None, one.foreign))
    # A failure is tried again by --resume; what succeeded is kept.
    if record.error is None:
        kept.write_text(json.dumps(asdict(record)), encoding="utf-8")
    return record


def _work(
    job: Job, stem: Path, python: str, timeout: float
) -> tuple[dict[str, Any] | None, str | None]:
    """Run one worker: its result, or what went wrong in a few lines."""
    job_path, result_path, log_path = (
        stem.with_name(f"{stem.name}.{kind}") for kind in ("job.json", "result.json", "log")
    )
    job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    result_path.unlink(missing_ok=True)
    command = [python, "-m", "benchmarks.worker", str(job_path), str(result_path)]
    with log_path.open("wb") as log:
        try:
            done = subprocess.run(
                [*command, repr(time.monotonic())],
                cwd=REPOSITORY,
                env=_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except OSError as error:
            return None, f"{python} cannot be started: {error}"
        except subprocess.TimeoutExpired:
            return None, f"not finished after {timeout:.0f} s"
    if done.returncode == 0 and result_path.exists():
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        return result, None
    tail = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return None, f"exit status {done.returncode}: " + "\n".join(tail[-ERROR_LINES:])


def _tell(record: Record) -> None:
    head = f"  {record.model} {record.label}:"
    if record.result is None:
        print(f"{head} FAILED: {(record.error or '').splitlines()[-1]}", flush=True)
        return
    parts = []
    for task, batches in record.result["times"].items():
        for batch, times in batches.items():
            middle = sorted(times)[len(times) // 2] / int(batch) * 1e3
            parts.append(f"{task} b{batch} {middle:.1f}")
    off = [
        f"{task} b{batch} DISAGREES (cosine {verdict['cosine']:.6f})"
        for task, batches in record.result["agreement"].items()
        for batch, verdict in batches.items()
        if not verdict["agrees"]
    ]
    cold, foreign = record.result["cold"]["total"], record.foreign
    disturbed = f"; DISTURBED: others took {foreign:.0%} of the CPU" if foreign > DISTURBED else ""
    print(f"{head} ms/image {', '.join(parts + off)}; cold {cold:.2f} s{disturbed}", flush=True)


def default_pythons(names: Sequence[str] = ("main", "optimum", "openvino")) -> dict[str, str]:
    """The interpreter that runs this, for every environment."""
    return dict.fromkeys(names, sys.executable)
