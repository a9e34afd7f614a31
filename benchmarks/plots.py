"""A run as pictures: speed of each task, and what it costs to start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.report import REFERENCE, TASKS
from benchmarks.results import Run, Summary, summaries

mpl.use("Agg")
from matplotlib import pyplot as plt

OURS, THEIRS, TORCH, LIMIT = "#c2410c", "#94a3b8", "#475569", "#0f766e"
BATCHES_DRAWN = 3


def draw(run: Run, folder: Path, name: str) -> list[Path]:
    """Write the plots and return their paths."""
    paths = [_speed(run, task, folder / f"{name}-{task}.png") for task in TASKS]
    return [*paths, _start(run, folder / f"{name}-start.png")]


def _speed(run: Run, task: str, path: Path) -> Path:
    """Images a second: a row for each model, a column for each batch size."""
    batches = run.settings["batches"]
    step = max(1, (len(batches) - 1) // (BATCHES_DRAWN - 1))
    batches = batches[::step][:BATCHES_DRAWN]
    figure, axes = _grid(run, len(batches), f"{TASKS[task]}, images per second")
    for row, model in zip(axes, run.models, strict=True):
        found = [s for s in summaries(run, model) if any(key[0] == task for key in s.timings)]
        for axis, batch in zip(row, batches, strict=True):
            _bars(
                axis,
                found,
                [_rate(s, task, batch) for s in found],
                "{:.1f}" if run.device == "cpu" else "{:,.0f}",
                run.device,
            )
            # Room below for the name of the limit's line.
            axis.set_title(f"{run.models[model]['label']}, batch {batch}", fontsize=10, pad=13)
            if task == "model" and run.device == "cpu" and run.peaks:
                _limit(axis, run.peak_gflops / run.models[model]["gflop"])
    return _save(figure, run, path)


def _limit(axis: Any, rate: float) -> None:
    """The rate at which matrix products alone would take the whole machine in float32."""
    axis.set_xlim(0, max(axis.get_xlim()[1], 1.2 * rate))
    axis.axvline(rate, color=LIMIT, linestyle="--", linewidth=1, zorder=0)
    axis.annotate(
        "float32 limit",
        (rate, -0.5),
        xytext=(3, 0),
        textcoords="offset points",
        va="bottom",
        color=LIMIT,
        fontsize=7,
    )


def _start(run: Run, path: Path) -> Path:
    """Cold start, peak memory, installed size."""
    quantities: tuple[tuple[str, str, Callable[[Summary], float | None]], ...] = (
        ("cold start, s", "{:.2f}", lambda s: s.cold),
        ("peak memory, MB", "{:,.0f}", lambda s: s.rss and s.rss / 1e6),
        (
            "installed without CUDA libraries, MB",
            "{:,.0f}",
            lambda s: s.installed and (s.installed - (s.installed_cuda or 0)) / 1e6,
        ),
    )
    figure, axes = _grid(run, len(quantities), "From nothing to the first embedding of a JPEG file")
    for row, model in zip(axes, run.models, strict=True):
        found = [s for s in summaries(run, model) if s.cold is not None]
        for axis, (title, form, quantity) in zip(row, quantities, strict=True):
            _bars(axis, found, [quantity(s) for s in found], form, run.device)
            axis.set_title(f"{run.models[model]['label']}: {title}", fontsize=10)
    return _save(figure, run, path)


def _rate(summary: Summary, task: str, batch: int) -> float | None:
    timing = summary.timings.get((task, batch))
    return timing.images_per_second if timing else None


def _grid(run: Run, columns: int, title: str) -> tuple[Any, Any]:
    bars = max(len(run.backends(model)) for model in run.models)
    height = 0.9 + 0.27 * bars
    figure, axes = plt.subplots(
        len(run.models),
        columns,
        figsize=(4.0 * columns + 1.6, height * len(run.models) + 0.9),
        squeeze=False,
        sharey="row",
    )
    figure.suptitle(f"{title} (random weights)", fontsize=12)
    return figure, axes


def _bars(
    axis: Any, found: Sequence[Summary], values: Sequence[float | None], form: str, device: str
) -> None:
    """One horizontal bar for each backend, in order from the top, with its number."""
    known = [0.0 if value is None else value for value in values]
    axis.barh(range(len(found)), known, color=[_colour(s, device) for s in found], height=0.72)
    for index, value in enumerate(values):
        text = "–" if value is None else form.format(value)
        axis.annotate(
            text,
            (known[index], index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axis.set_yticks(range(len(found)), [s.label for s in found], fontsize=8)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.set_xlim(0, 1.18 * max([*known, 1e-9]))
    axis.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _colour(summary: Summary, device: str) -> str:
    if summary.backend.startswith("vistower"):
        return OURS
    return TORCH if summary.backend == REFERENCE[device] else THEIRS


def _save(figure: Any, run: Run, path: Path) -> Path:
    machine = run.machine
    where = machine["gpu"] or f"{machine['cpu']}, {run.settings['threads']} cores"
    sets = ", ".join(machine["flags"])
    figure.text(
        0.01, 0.005, f"{where} ({sets}), {machine['date'][:10]}", fontsize=7, color="#64748b"
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
