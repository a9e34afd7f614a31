"""Stopped, raced and without room: what is at an output is whole, and nothing else is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import campaign
import readers
from command_line import run
from nursery import Nursery, started
from vistower.errors import OutputExistsError
from vistower.staging import clean, staged
from vistower_export.pictures import SAMPLES


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.fixture
def checkpoints(
    clip_checkpoint: Path, dinov3_checkpoint: Path, tmp_path: Path
) -> tuple[Path, Path, Path]:
    """Two checkpoints, and where to export them."""
    return clip_checkpoint, dinov3_checkpoint, tmp_path / "outputs" / "bundle"


@pytest.mark.slow
def test_killed_before_each_step_on_the_disk(tmp_path: Path) -> None:
    """Every step of publishing a folder or embeddings, new or replacing: see `campaign`."""
    with Nursery("vistower.embedding_files") as light:
        tallies = {
            tally.kind: tally for tally in campaign.kill_everything_at_every_step(light, tmp_path)
        }
    assert len(tallies) == 8
    for kind, tally in tallies.items():
        assert tally.outcomes.total() > 20, kind
        assert tally.outcomes["the new one"] > 5, kind
        if "replaced" in kind:
            assert tally.outcomes["the old one"] > 10, kind
    # In one step a folder or a file takes another's place.
    assert "absent" not in tallies["folder, replaced, killed at every step"].outcomes
    assert "absent" not in tallies[".npz, replaced, killed at every step"].outcomes


@pytest.mark.slow
@pytest.mark.parametrize("number", campaign.SIGNALS)
def test_exports_stopped_at_random_moments(
    number: int, nursery: Nursery, checkpoints: tuple[Path, Path, Path]
) -> None:
    tally = campaign.stop_exports(nursery, *checkpoints, number, count=4, seed=number)
    assert tally.outcomes.total() == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", campaign.SIGNALS)
def test_embeds_stopped_at_random_moments(
    number: int, nursery: Nursery, clip_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "outputs" / "o.npz"
    tally = campaign.stop_embeds(
        nursery, clip_bundle, SAMPLES * 4, output, number, count=6, seed=number
    )
    assert tally.outcomes.total() == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_embed_says_so_and_leaves_nothing(
    number: int, code: int, nursery: Nursery, clip_bundle: Path, tmp_path: Path
) -> None:
    """While a picture is waited for: it is a pipe that nobody writes to."""
    output = tmp_path / "o.npz"
    slow = (
        "import time, vistower.encoder as e\n"
        "forward = e.VisionEncoder.compute\n"
        "e.VisionEncoder.compute = lambda *a: (time.sleep(0.4), forward(*a))[1]\n"
        "import os; os.set_blocking(2, True)\n"
    )
    going = nursery.start(
        "embed", clip_bundle, *SAMPLES * 8, "--output", output, "--batch-size", 1, code=slow
    )
    staging = tmp_path / ".o.npz.vistower-staging"
    while not staging.exists():
        os.sched_yield()
    going.stop(number)
    ended = nursery.wait(going)
    assert ended.code == code
    assert ended.errors == f"stopped by {signal.Signals(number).name}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_during_the_imports_is_no_traceback(clip_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.npz"
    for after in (0.25, 0.5):
        command = ("embed", clip_bundle, *SAMPLES * 8, "--output", output)
        ended = started(command, signal.SIGINT, after)
        assert ended.code in {130, 0, -signal.SIGINT}
        assert ended.code == -signal.SIGINT or ended.quiet
        assert set(tmp_path.iterdir()) <= {output}
        # A fast machine is done by then, and on its way out.
        if output.exists():
            with np.load(output) as written:
                assert len(written["cls"]) == len(SAMPLES * 8)
            output.unlink()
        else:
            assert ended.code != 0


def test_signals_that_are_ignored_stay_so(clip_bundle: Path, tmp_path: Path) -> None:
    """``nohup`` and a shell's background jobs ignore some."""
    program = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from vistower.interrupts import Stopped, stoppable\n"
        "with stoppable():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('goes on', flush=True)\n"
        "    with stoppable():\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('no')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "goes on\n", "stopped by SIGTERM\n")


@pytest.mark.parametrize("becomes", ["ImportError", "cli.VistowerError"])
def test_a_signal_that_a_library_makes_another_exception_of(becomes: str) -> None:
    """As pybind11 does where one comes while ONNX Runtime is imported: "initialization failed"."""
    program = (
        "import os, signal, vistower.cli as cli\n"
        "def app(arguments):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException as error:\n"
        f"        raise {becomes}('initialization failed') from error\n"
        "cli.app = app\n"
        "cli.main(['embed'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "stopped by SIGTERM\n")


@pytest.mark.slow
def test_two_exports_to_one_output(nursery: Nursery, checkpoints: tuple[Path, Path, Path]) -> None:
    tally = campaign.race_exports(nursery, *checkpoints, count=3, seed=0)
    assert tally.outcomes.total() == 3


def test_readers_of_a_bundle_that_is_replaced(
    clip_bundle: Path, dinov3_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "read" / "bundle"
    found = readers.race(
        clip_bundle, dinov3_bundle, output, SAMPLES[0], times=20, readers=2, seed=0
    )
    assert {clip_bundle.name, dinov3_bundle.name} <= found.keys()
    assert found.keys() <= {clip_bundle.name, dinov3_bundle.name, "BundleCorruptError"}
    assert {path.name for path in output.parent.iterdir()} == {output.name}


def test_the_second_is_told_at_once(checkpoints: tuple[Path, Path, Path]) -> None:
    checkpoint, _, output = checkpoints
    with staged(output):
        code = started(("export", checkpoint, "--output", output)).code
    assert code == 2
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


@pytest.mark.slow
def test_export_without_room_for_a_file(
    nursery: Nursery, checkpoints: tuple[Path, Path, Path]
) -> None:
    """The limit on a file's size stops it in each phase: configs, graphs, weights, golden."""
    first, second, output = checkpoints
    assert nursery.run("export", first, "--output", output).code == 0
    arguments = ("export", second, "--overwrite", "--precision", "int8", "--precision", "bf16")
    limits = (0, 300, 20_000, 200_000, 1_000_000, 2_000_000)
    tally = campaign.limit_files(nursery, output, arguments, limits, campaign.bundle_state)
    assert tally.outcomes["failed on the way"] >= 5
    # C's buffer of 4 KB, whose last flush NumPy's tofile() does not check.
    limit = (output / "onnx" / "model.onnx_data").stat().st_size - 100
    there = first if campaign.bundle_state(output) == first.name else second
    ended = nursery.run("export", there, "--output", output, "--overwrite", file_size=limit)
    assert ended.code == 2, ended
    assert "cannot be written: File too large" in ended.errors


def test_embed_without_room_for_a_file(nursery: Nursery, clip_bundle: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "a" / "o.npz", tmp_path / "b" / "o.npy"):
        arguments = ("embed", clip_bundle, *SAMPLES, "--device", "cpu")
        names = () if output.suffix == ".npz" else ("o.names.json",)
        for limit in (0, 10, 100, 1000):
            ended = nursery.run(*arguments, "--output", output, file_size=limit)
            assert ended.code == 2, ended
            assert "cannot be written" in ended.errors
            assert not list(output.parent.iterdir())
        assert nursery.run(*arguments, "--output", output, file_size=100_000).code == 0
        assert campaign.others(output, *names) == set()


@pytest.mark.slow
def test_full_disks(
    nursery: Nursery,
    checkpoints: tuple[Path, Path, Path],
    clip_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On small file systems, where they may be mounted; elsewhere the tests above do it."""
    disk = tmp_path / "disk"
    if not campaign.can_mount(disk):
        assert os.getuid() != 0 or Path("/.dockerenv").exists()
        return
    _, second, _ = checkpoints
    whole = sum(path.stat().st_size for path in clip_bundle.rglob("*") if path.is_file())
    tally = campaign.fill_disk(
        nursery,
        disk,
        clip_bundle,
        ("export", second, "--overwrite"),
        "bundle",
        [whole + extra for extra in (40_000, 300_000, 1_500_000, 2_500_000, 9_000_000)],
        campaign.bundle_state,
    )
    assert tally.outcomes["had room"] == 1
    assert tally.outcomes["failed on the way"] >= 2
    first = tmp_path / "first.npz"
    assert run(capsys, "embed", clip_bundle, SAMPLES[0], "--output", first)[0] == 0
    wholes = {"first": first.read_bytes()}
    pages = 4096
    tally = campaign.fill_disk(
        nursery,
        disk,
        first,
        ("embed", clip_bundle, *SAMPLES * 60, "--device", "cpu"),
        "o.npz",
        [pages * count for count in (1, 2, 4, 8, 12)],
        lambda output: campaign.embeddings_state(output, wholes),
    )
    assert tally.outcomes.total() == 5
    assert "had room" not in tally.outcomes


def test_what_is_not_ours_is_not_tidied_away(tmp_path: Path) -> None:
    """Folders that are called like ours, and what a live process has."""
    kept = {}
    for name, inside in (
        (".a.vistower-staging", "photo.jpg"),
        (".b.vistower-staging", "new/photo.jpg"),
        (".c.vistower-staging", "lock"),
    ):
        path = tmp_path / name / inside
        path.parent.mkdir(parents=True)
        path.write_bytes(b"mine")
        kept[path] = b"mine"
    (tmp_path / ".d.vistower-staging").write_bytes(b"a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").write_bytes(b"")
    (tmp_path / ".e.vistower-staging").symlink_to("elsewhere")
    with staged(tmp_path / "live") as live:
        (live.path(tmp_path / "live")).write_bytes(b"live")
        clean(tmp_path)
        assert live.path(tmp_path / "live").read_bytes() == b"live"
    assert {path: path.read_bytes() for path in kept} == kept
    assert (tmp_path / ".d.vistower-staging").read_bytes() == b"a file"
    assert (tmp_path / "elsewhere" / "lock").exists()
    for name in "abcde":
        with (
            pytest.raises((OutputExistsError, OSError), match=r"did not make it|exists|directory"),
            staged(tmp_path / name),
        ):
            pass
    assert {path: path.read_bytes() for path in kept} == kept


def test_models_shows_no_staging_folder(
    clip_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VISTOWER_CACHE", str(tmp_path))
    shutil.copytree(clip_bundle, tmp_path / ".x.vistower-staging" / "new" / "x")
    _, text, _ = run(capsys, "models")
    assert "has no bundle" in text
