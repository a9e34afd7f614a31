"""The benchmark harness: what it compares, counts and keeps. No time is asserted."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import artifacts, models, plots, report, sizes
from benchmarks.backends import entries
from benchmarks.compare import compare
from benchmarks.models import MODELS, Model
from benchmarks.results import Record, Run, summaries
from benchmarks.run import Plan, ResumeError, UnknownBackendError, begin, run

TINY = Model("tiny-clip", "tiny CLIP", "clip", 2, 64, 128, 50, 32)


def verdict(*, agrees: bool = True) -> dict[str, Any]:
    return {"cosine": 1.0, "cosine_cls": 1.0, "max_abs": 1e-6, "max_rel": 1e-7, "agrees": agrees}


def result(times: dict[str, list[float]], *, agrees: bool = True) -> dict[str, Any]:
    return {
        "cold": {"total": 2.0},
        "rss": {"first_embedding": 4e8, "end": 5e8},
        "agreement": {"model": {b: verdict(agrees=agrees) for b in ("1", "8")}, "files": {}},
        "times": {"model": times, "files": {}},
        "installed": {"bytes": 3_000_000, "cuda_bytes": 1_000_000},
        "versions": {"numpy": "2.0"},
    }


def made_run() -> Run:
    """Torch in two rounds, ours disagreeing, one that failed."""

    def record(backend: str, number: int, **changes: Any) -> Record:
        values: dict[str, Any] = {
            "backend": backend,
            "label": backend,
            "note": "",
            "precision": "fp32",
            "model": TINY.name,
            "round": number,
            "seconds": 1.0,
            "foreign": 0.0,
            "result": None,
            "error": None,
        }
        return Record(**(values | changes))

    times = [{"1": [0.2, 0.1, 0.3], "8": [0.8, 0.9]}, {"1": [0.4, 0.5, 0.6], "8": [1.6, 1.8]}]
    return Run(
        device="cpu",
        machine={
            "cpu": "a CPU",
            "cpu_family": "1/2",
            "flags": ["avx2"],
            "memory_gib": 1.0,
            "kernel": "6",
            "gpu": None,
            "date": "2026-01-01",
            "commit": "abc",
            "uncommitted": False,
        },
        settings={"batches": [1, 8], "rounds": 2, "seconds": 1, "calls": 2, "threads": 2},
        models={TINY.name: {"label": TINY.label, "gflop": 2.0}},
        peaks=[{"gflops": 100.0, "by_library": {"torch": {"a": 100.0}}, "numpy_blas": "Haswell"}],
        records=[
            record("torch", 0, result=result(times[0])),
            record("torch", 1, result=result(times[1]), foreign=0.4),
            record("vistower-ort", 0, result=result({}, agrees=False)),
            record("openvino", 0, error="exit status 1: first\nImportError: no | such module"),
        ],
    )


def test_figures_come_from_every_round() -> None:
    torch, _, _ = summaries(made_run(), TINY.name)
    timing = torch.timings["model", 1]
    assert timing.median == pytest.approx((0.2 + 0.5) / 2)
    assert (timing.best, timing.p99, timing.calls) == (0.1, 0.6, 6)
    assert timing.p50 == pytest.approx(0.35)
    assert torch.timings["model", 8].images_per_second == pytest.approx(8 / ((0.85 + 1.7) / 2))
    assert (torch.cold, torch.rss, torch.rss_end) == (2.0, 4e8, 5e8)


def test_what_disagrees_has_no_time_and_what_failed_is_named() -> None:
    _, ours, failed = summaries(made_run(), TINY.name)
    assert not ours.timings
    assert ours.disagrees == ("model at batch 1", "model at batch 8")
    assert failed.cold is None
    table = report.markdown(made_run())
    assert "**disagrees** (model at batch 1, model at batch 8): no time there" in table
    assert "**failed**: ImportError: no \\| such module" in table
    assert "All weights are random" in table
    assert "**Disturbed** by other processes on the machine, so slower: torch on tiny CLIP" in table


def test_tables_have_as_many_cells_in_each_row() -> None:
    blocks, block = [], list[str]()
    for line in [*report.markdown(made_run()).splitlines(), ""]:
        if line.startswith("|"):
            block.append(line.replace("\\|", ""))
        elif block:
            blocks.append(block)
            block = []
    assert len(blocks) == 5
    for rows in blocks:
        assert len({row.count("|") for row in rows}) == 1, rows


def test_a_share_of_the_peak_is_arithmetic_over_the_fastest_product() -> None:
    row = next(x for x in report.markdown(made_run()).splitlines() if x.startswith("| torch |"))
    # 2 GFLOP a picture in 0.35 s, against 100 GFLOP/s.
    assert row.split("|")[2:5] == [" 2.9 ", " 1.00 ", " 6 "]


def test_a_run_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    made_run().save(tmp_path / "cpu.json")
    assert Run.load(tmp_path / "cpu.json") == made_run()
    data = json.loads((tmp_path / "cpu.json").read_text())
    (tmp_path / "cpu.json").write_text(json.dumps(data | {"format_version": 0}))
    with pytest.raises(ValueError, match="format version 0"):
        Run.load(tmp_path / "cpu.json")


def test_plots_are_drawn(tmp_path: Path) -> None:
    paths = plots.draw(made_run(), tmp_path, "cpu")
    assert {path.name for path in paths} == {"cpu-model.png", "cpu-files.png", "cpu-start.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_numbers_are_compared_row_by_row() -> None:
    want = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    near, far, turned = want + 1e-6, want.copy(), want.copy()
    far[1, 3, 7] += 0.1
    turned[0, 2] = -turned[0, 2]
    assert compare(near, want, "fp32").agrees
    assert not compare(far, want, "fp32").agrees
    assert compare(far, want, "int8").agrees
    assert compare(turned, want, "int8").cosine == pytest.approx(-1)
    broken = want.copy()
    broken[0, 0, 0] = np.nan
    assert not compare(broken, want, "int8").agrees
    assert not compare(want[:, 1:], want, "int8").agrees


def test_arithmetic_of_the_known_towers() -> None:
    # Published for 224 pixels: ViT-B/32 4.4 and ViT-B/16 17.6 GMAC.
    assert MODELS["clip-vit-base-patch32"].gflop / 2 == pytest.approx(4.4, abs=0.05)
    assert MODELS["clip-vit-base-patch16"].gflop / 2 == pytest.approx(17.5, abs=0.1)


def test_ours_come_from_the_graphs_of_the_bundle() -> None:
    graphs = {"portable": "fp32", "ort": "fp32", "int8": "int8", "fp16": "fp16"}
    assert [e.name for e in entries("cpu", graphs) if e.name.startswith("vistower")] == [
        "vistower-openvino",
        "vistower-ort",
        "vistower-int8",
    ]
    assert "vistower-fp16-fp16-graphs" in [e.name for e in entries("cuda", graphs)]
    for device in ("cpu", "cuda"):
        names = [entry.name for entry in entries(device, graphs)]
        assert len(names) == len(set(names))


def test_installed_size_counts_requirements_and_names_what_is_missing() -> None:
    alone, with_requirements = sizes.installed(["numpy"]), sizes.installed(["matplotlib", "nope"])
    assert set(alone["distributions"]) == {"numpy"}
    assert alone["bytes"] > 10_000_000
    assert {"numpy", "pillow", "matplotlib"} <= set(with_requirements["distributions"])
    assert with_requirements["bytes"] == sum(with_requirements["distributions"].values())
    assert with_requirements["missing"] == ["nope"]


@pytest.fixture
def tiny(
    clip_checkpoint: Path, clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The artifacts of a tiny CLIP, but for the exports of others."""
    monkeypatch.setitem(models.MODELS, TINY.name, TINY)
    shutil.copytree(clip_checkpoint, tmp_path / "checkpoints" / TINY.name)
    shutil.copytree(clip_bundle, tmp_path / "bundles" / TINY.name)
    artifacts.write_reference(tmp_path, TINY, artifacts.write_pictures(tmp_path))
    return tmp_path


PLAN = Plan(
    device="cpu",
    models=(TINY.name,),
    backends=("torch", "ort-plain", "vistower-ort"),
    batches=(1, 2),
    rounds=1,
    seconds=0.0,
    calls=1,
    timeout=120,
    threads=1,
    tries=1,
)
PYTHONS = {"main": sys.executable, "optimum": sys.executable}


@pytest.mark.slow
def test_two_backends_are_measured_and_a_failing_one_does_not_end_the_run(tiny: Path) -> None:
    assert not begin(PLAN, tiny, resume=True)
    done = run(PLAN, tiny, PYTHONS, tiny / "cpu.json")
    torch, failed, ours = summaries(done, TINY.name)
    for summary in (torch, ours):
        assert not summary.errors
        assert not summary.disagrees
        assert set(summary.timings) == {(t, b) for t in ("model", "files") for b in (1, 2)}
        assert summary.cosine > 0.99999
        assert summary.rss > 50e6
    assert not failed.timings
    assert "model.onnx" in failed.errors[0]
    assert done.peak_gflops > 0
    assert Run.load(tiny / "cpu.json").backends(TINY.name) == list(PLAN.backends)

    # An interrupted run goes on where it was: what is there is not measured again.
    assert begin(PLAN, tiny, resume=True)
    again = run(replace(PLAN), tiny, PYTHONS, tiny / "again.json")
    kept = [r.result for r in done.records if r.error is None]
    assert [r.result for r in again.records if r.error is None] == kept
    with pytest.raises(ResumeError, match="Start anew"):
        begin(replace(PLAN, threads=2), tiny, resume=True)


def test_a_backend_that_disagrees_is_not_timed(tiny: Path) -> None:
    path = tiny / "reference" / f"{TINY.name}.npz"
    with np.load(path) as arrays:
        changed = {name: array.copy() for name, array in arrays.items()}
    changed["tokens"][0, 3] *= -1
    np.savez(path, **changed)
    plan = replace(PLAN, backends=("vistower-ort",), batches=(1,))
    begin(plan, tiny, resume=False)
    (ours,) = summaries(run(plan, tiny, PYTHONS, tiny / "cpu.json"), TINY.name)
    assert ours.disagrees == ("model at batch 1",)
    assert set(ours.timings) == {("files", 1)}


def test_an_unknown_backend_is_named(tiny: Path) -> None:
    with pytest.raises(UnknownBackendError, match=r"Unknown backend nope; known for cpu: torch,"):
        run(replace(PLAN, backends=("nope",)), tiny, PYTHONS, tiny / "cpu.json")
