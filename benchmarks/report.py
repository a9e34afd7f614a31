"""A run as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.results import DISTURBED, Run, Summary, summaries

REFERENCE = {"cpu": "torch", "cuda": "torch-fp32"}
"""The backend the ratios are against."""

TASKS = {"model": "pixel_values → tokens", "files": "JPEG file → embedding"}


def markdown(run: Run) -> str:
    """The whole report."""
    parts = [_head(run)]
    for model in run.models:
        found = summaries(run, model)
        parts.append(f"## {run.models[model]['label']}, random weights\n")
        for task, title in TASKS.items():
            parts.append(f"### {title}\n\n{_speed(run, found, task)}")
        parts.append(
            f"### From nothing to the first embedding, and memory\n\n{_weight(run, found)}"
        )
        parts.append(f"### Agreement with torch, before any time counted\n\n{_agreement(found)}")
    parts.append(_notes(run))
    return "\n".join(parts)


def _head(run: Run) -> str:
    machine, settings = run.machine, run.settings
    rows = [
        (
            "machine",
            f"{machine['cpu']} (family {machine['cpu_family']}), {run.settings['threads']} "
            f"cores used, {machine['memory_gib']} GiB, Linux {machine['kernel']}",
        ),
        ("instruction sets", ", ".join(machine["flags"])),
    ]
    if machine["gpu"]:
        rows.append(("GPU", machine["gpu"]))
    rows += [
        ("versions", ", ".join(f"{k} {v}" for k, v in _versions(run).items())),
        (
            "when",
            f"{machine['date']}, commit {(machine['commit'] or 'unknown')[:12]}"
            + (" with uncommitted changes" if machine["uncommitted"] else ""),
        ),
        (
            "rounds",
            f"{settings['rounds']}, in alternating order, one process per backend and "
            f"round, at least {settings['seconds']} s and {settings['calls']} calls per batch size",
        ),
        ("fastest float32 product", _peak(run)),
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# Benchmark, {run.device.upper()}\n\n"
        "Made by `scripts/bench`. **All weights are random**: the architectures and so the "
        "arithmetic are the released ones, the embeddings mean nothing.\n\n"
        f"| | |\n|---|---|\n{lines}\n"
    )


def _peak(run: Run) -> str:
    if not run.peaks:
        return "not measured"
    parts = ", ".join(f"{peak['gflops']:.0f}" for peak in run.peaks)
    text = f"{run.peak_gflops:.0f} GFLOP/s (rounds: {parts})"
    by_precision = run.peaks[0].get("by_precision")
    if by_precision:
        found = ", ".join(f"{k} {v / 1e3:.0f}" for k, v in by_precision.items())
        return f"{text}; TFLOP/s by precision: {found}"
    by_library: dict[str, dict[str, float]] = run.peaks[0]["by_library"]
    best = ", ".join(f"{name} {max(sizes.values()):.0f}" for name, sizes in by_library.items())
    return f"{text}; by library: {best}; NumPy's BLAS runs its {run.peaks[0]['numpy_blas']} kernel"


def _versions(run: Run) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for record in run.records:
        for name, version in (record.result or {}).get("versions", {}).items():
            found.setdefault(name, set()).add(version)
    return {name: " and ".join(sorted(versions)) for name, versions in sorted(found.items())}


def _speed(run: Run, found: Sequence[Summary], task: str) -> str:
    """Images a second, against torch, share of the peak; latency at the smallest batch."""
    batches: list[int] = run.settings["batches"]
    reference = next((s for s in found if s.backend == REFERENCE[run.device]), None)
    gflop = run.models[found[0].model]["gflop"]
    head = ["backend"]
    for batch in batches:
        head += [f"b{batch} images/s", "× torch"] + (["% peak"] if task == "model" else [])
    smallest = batches[0]
    head += [f"b{smallest} p50 ms", "p99 ms"]
    rows = []
    for summary in found:
        row = [_label(summary)]
        for batch in batches:
            timing = summary.timings.get((task, batch))
            if timing is None:
                row += ["–"] * (3 if task == "model" else 2)
                continue
            row.append(f"{timing.images_per_second:.1f}")
            base = reference.timings.get((task, batch)) if reference else None
            row.append(f"{base.median / timing.median:.2f}" if base else "–")
            if task == "model":
                row.append(_share(run, summary, timing.images_per_second * gflop))
        timing = summary.timings.get((task, smallest))
        row += [f"{timing.p50 * 1e3:.1f}", f"{timing.p99 * 1e3:.1f}"] if timing else ["–", "–"]
        rows.append(row)
    return _table(head, rows)


def _share(run: Run, summary: Summary, gflops: float) -> str:
    """Share of the fastest product of this precision; int8 has no float32 limit."""
    precision = summary.precision
    if precision == "int8" or not run.peaks:
        return "–"
    peaks = run.peaks[0].get("by_precision")
    peak = max(p["by_precision"][precision] for p in run.peaks) if peaks else run.peak_gflops
    return f"{100 * gflops / peak:.0f}"


def _weight(run: Run, found: Sequence[Summary]) -> str:
    reference = next((s for s in found if s.backend == REFERENCE[run.device]), None)
    head = ["backend", "cold start s", "÷ torch", "peak RSS MB", "÷ torch", "peak RSS after all MB"]
    head += ["installed MB", "without CUDA libraries MB"]
    if run.device == "cuda":
        head.append("GPU memory MB")
    rows = []
    for s in found:
        installed = s.installed
        row = [
            _label(s),
            _number(s.cold, "{:.2f}"),
            _ratio(s.cold, reference.cold if reference else None),
            _number(s.rss, "{:,.0f}", 1e6),
            _ratio(s.rss, reference.rss if reference else None),
            _number(s.rss_end, "{:,.0f}", 1e6),
            _number(installed, "{:,.0f}", 1e6),
            _number(installed and installed - (s.installed_cuda or 0), "{:,.0f}", 1e6),
        ]
        if run.device == "cuda":
            row.append(_number(s.gpu_memory, "{:,.0f}", 1e6))
        rows.append(row)
    return _table(head, rows)


def _agreement(found: Sequence[Summary]) -> str:
    rows = []
    for s in found:
        verdict = "agrees"
        if s.disagrees:
            verdict = f"**disagrees** ({', '.join(s.disagrees)}): no time there"
        if s.errors:
            verdict = "**failed**: " + s.errors[0].splitlines()[-1].replace("|", "\\|")
        rows.append([_label(s), _number(s.cosine, "{:.7f}"), _number(s.max_abs, "{:.1e}"), verdict])
    return _table(["backend", "smallest cosine", "largest difference", "verdict"], rows)


def _notes(run: Run) -> str:
    notes = dict.fromkeys((r.label, r.note) for r in run.records if r.note)
    lines = [f"- {label}: {note}." for label, note in notes]
    if run.device == "cpu":
        lines.append(
            "- % peak: matrix-product arithmetic done a second over the fastest float32 product "
            "measured in the same run. A batch small enough for the cache, or a core that clocks "
            "higher for a moment, can pass 100."
        )
    lines.append(
        "- cold start: from the start of the process to the first embedding of a JPEG file, files "
        "in the page cache; peak RSS up to there, and after the largest batch. Each is the median "
        "of the rounds."
    )
    disturbed = [r for r in run.records if r.foreign > DISTURBED]
    if disturbed:
        named = ", ".join(f"{r.label} on {run.models[r.model]['label']}" for r in disturbed)
        lines.append(f"- **Disturbed** by other processes on the machine, so slower: {named}.")
    lines.append(
        "- installed: all files of the backend's distributions and what they require; torch's "
        "wheel for Linux brings the CUDA libraries, a CPU-only build leaves them out."
    )
    return "## Notes\n\n" + "\n".join(lines) + "\n"


def _label(summary: Summary) -> str:
    return f"**{summary.label}**" if summary.backend.startswith("vistower") else summary.label


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "–" if value is None else form.format(value / unit)


def _ratio(value: float | None, base: float | None) -> str:
    return "–" if value is None or base is None else f"{value / base:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    line: Callable[[Sequence[Any]], str] = lambda cells: f"| {' | '.join(map(str, cells))} |"  # noqa: E731
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join([line(head), line(rule), *map(line, rows)]) + "\n"
