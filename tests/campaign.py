"""Faults on purpose: stopped, raced, without room. `scripts/faults` runs all, the tests a part.

After each fault one rule is checked: the output is not there, is the old whole one or the new
whole one; what else lies in its folder is a staging folder, and is gone after the next run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nursery import Ended, Nursery, started
from vistower.bundle import Bundle
from vistower.staging import SUFFIX

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Tally:
    """What came of a number of faults."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    left_over: int = 0

    def __str__(self) -> str:
        outcomes = ", ".join(f"{count} {what}" for what, count in sorted(self.outcomes.items()))
        return (
            f"{self.kind}: {self.outcomes.total()} faults: {outcomes}; {self.left_over} left a "
            f"staging folder, none after the next run"
        )

    def add(self, outcome: str, output: Path, *companions: str) -> None:
        self.outcomes[outcome] += 1
        left = others(output, *companions)
        assert left <= {f".{output.name}{SUFFIX}"}, left
        self.left_over += bool(left)


def others(output: Path, *companions: str) -> set[str]:
    """What lies beside an output."""
    return {path.name for path in output.parent.iterdir()} - {output.name, *companions}


def bundle_state(output: Path) -> str:
    """Which whole bundle is there.

    Raises:
        BundleError: it is no whole one.
    """
    if not os.path.lexists(output):
        return "absent"
    bundle = Bundle.load(output)
    bundle.check()
    return bundle.name


def embeddings_state(output: Path, wholes: dict[str, bytes]) -> str:
    """Which of some whole .npz is there."""
    if not os.path.lexists(output):
        return "absent"
    data = output.read_bytes()
    return next(name for name, whole in wholes.items() if whole == data)


def stop_exports(
    nursery: Nursery, first: Path, second: Path, output: Path, number: int, count: int, seed: int
) -> Tally:
    """Stop exports at random moments; each has the one or the other checkpoint."""
    tally = Tally(f"export, {signal.Signals(number).name}")
    seconds = nursery.run("export", first, "--output", output, "--overwrite").seconds
    chance = random.Random(seed)
    for index in range(count):
        if index % 5 == 4:
            shutil.rmtree(output, ignore_errors=True)
        elif not output.exists():
            seconds = nursery.run("export", first, "--output", output).seconds
        before = bundle_state(output)
        checkpoint = second if before == first.name else first
        # Half of them near the end, where the old one's place is taken.
        after = chance.uniform(0, 1.1) if index % 2 else chance.uniform(0.8, 1.2)
        ended = nursery.stopped(
            number, after * seconds, "export", checkpoint, "--output", output, "--overwrite"
        )
        state = bundle_state(output)
        assert state in {before, checkpoint.name}, (before, state)
        # What is over before the signal comes has done its work.
        if ended.code == 0:
            assert state == checkpoint.name
            # The machine is faster now than when it was timed.
            seconds = min(seconds, ended.seconds)
        else:
            _require_stopped(ended, number, output)
        tally.add("over before" if ended.code == 0 else _named(state, before), output)
        if number != signal.SIGKILL:
            assert not others(output)
    assert nursery.run("export", first, "--output", output, "--overwrite").code == 0
    assert bundle_state(output) == first.name
    assert not others(output)
    return tally


def _require_stopped(ended: Ended, number: int, output: Path) -> None:
    """Raise unless a signal ended it as it should; before it handles them, it has made nothing."""
    if ended.code == -number and number != signal.SIGKILL:
        assert not ended.errors, ended
        assert not others(output)
    else:
        assert ended.code == (-number if number == signal.SIGKILL else 128 + number), ended
        assert ended.quiet, ended


def _named(state: str, before: str) -> str:
    return "absent" if state == "absent" else "the old one" if state == before else "the new one"


def stop_embeds(
    nursery: Nursery | None,
    bundle: Path,
    pictures: Sequence[Path],
    output: Path,
    number: int,
    count: int,
    seed: int,
) -> Tally:
    """Stop embeds at random moments; without a nursery, their imports are stopped too."""
    whole = "without" if nursery is None else "after"
    tally = Tally(f"embed {whole} its imports, {signal.Signals(number).name}")
    wholes: dict[str, bytes] = {}
    orders = {"forwards": pictures, "backwards": pictures[::-1]}

    def command(order: str) -> tuple[object, ...]:
        return "embed", bundle, *orders[order], "--output", output, "--device", "cpu"

    seconds = 0.0
    for order in orders:
        ended = nursery.run(*command(order)) if nursery else started(command(order))
        assert ended.code == 0, ended
        wholes[order], seconds = output.read_bytes(), ended.seconds
    chance = random.Random(seed)
    for index in range(count):
        if index % 5 == 4:
            output.unlink(missing_ok=True)
        elif not output.exists():
            output.write_bytes(wholes["forwards"])
        before = embeddings_state(output, wholes)
        order = "backwards" if before == "forwards" else "forwards"
        after = seconds * (chance.uniform(0, 1.1) if index % 2 else chance.uniform(0.8, 1.2))
        if nursery is not None:
            ended = nursery.stopped(number, after, *command(order))
        else:
            ended = started(command(order), number, after)
        state = embeddings_state(output, wholes)
        assert state in {before, order}
        if ended.code == 0:
            assert state == order
            seconds = min(seconds, ended.seconds)
        elif nursery is not None or after > 0.5:
            # Before it begins, Python itself ends as it does.
            _require_stopped(ended, number, output)
        tally.add("over before" if ended.code == 0 else _named(state, before), output)
    ended = nursery.run(*command("forwards")) if nursery else started(command("forwards"))
    assert ended.code == 0
    assert not others(output)
    return tally


def race_exports(
    nursery: Nursery, first: Path, second: Path, output: Path, count: int, seed: int
) -> Tally:
    """Start two exports to one output, the second a little later."""
    tally = Tally("two exports to one output")
    chance = random.Random(seed)
    seconds = nursery.run("export", first, "--output", output, "--overwrite").seconds
    for index in range(count):
        if index % 3 == 2:
            shutil.rmtree(output)
        one = nursery.start("export", first, "--output", output, "--overwrite")
        time.sleep(chance.choice((0, chance.uniform(0, 1.1 * seconds))))
        other = nursery.start("export", second, "--output", output, "--overwrite")
        ended = [nursery.wait(one), nursery.wait(other)]
        state = bundle_state(output)
        winners = [
            checkpoint.name
            for checkpoint, run in zip((first, second), ended, strict=True)
            if run.code == 0
        ]
        assert state in winners
        for run in ended:
            assert run.code in {0, 2}, run
            assert run.quiet, run
            assert run.code == 0 or "is being written by another process" in run.errors, run
        tally.add(
            "one after the other" if len(winners) == 2 else "one whole, one told to wait", output
        )
        assert not others(output)
    return tally


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes (tmpfs, by whole pages).

    Raises:
        subprocess.CalledProcessError: it may not be mounted here.
    """
    place.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
        check=True,
        capture_output=True,
    )
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def can_mount(place: Path) -> bool:
    """Whether `small_disk` works here."""
    try:
        with small_disk(place, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill_disk(
    nursery: Nursery,
    disk: Path,
    old: Path,
    arguments: Sequence[object],
    output: str,
    sizes: Sequence[int],
    state: Callable[[Path], str],
) -> Tally:
    """Run a command whose output lies on disks with less room than it takes.

    Args:
        nursery: starts it.
        disk: where to mount them.
        old: what is at the output before, copied there.
        arguments: of the command, but for its output.
        output: its name on the disk.
        sizes: of the disks in bytes, from too small on.
        state: names the whole output there is.
    """
    tally = Tally(f"{arguments[0]} on a full disk")
    for size in sizes:
        with small_disk(disk, size) as place:
            target = place / output
            if old.is_dir():
                shutil.copytree(old, target)
            else:
                shutil.copy(old, target)
            before = state(target)
            ended = nursery.run(*arguments, "--output", target)
            tally.add(_refused(ended) if ended.code else "had room", target)
            if ended.code:
                assert state(target) == before
            assert not others(target)
    return tally


def limit_files(
    nursery: Nursery,
    target: Path,
    arguments: Sequence[object],
    limits: Sequence[int],
    state: Callable[[Path], str],
) -> Tally:
    """The same with a limit on the size of a file, which needs no rights."""
    tally = Tally(f"{arguments[0]} with a limit on its files")
    for limit in limits:
        before = state(target)
        ended = nursery.run(*arguments, "--output", target, file_size=limit)
        tally.add(_refused(ended) if ended.code else "had room", target)
        if ended.code:
            assert state(target) == before
        assert not others(target)
    return tally


def _refused(ended: Ended) -> str:
    assert ended.code == 2, ended
    assert ended.quiet, ended
    assert "cannot be written" in ended.errors, ended
    return "refused" if "takes at least" in ended.errors else "failed on the way"


STEP = """
import os, signal, sys
left = {step}
def audit(event, arguments):
    global left
    touches = event in {{'open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate',
                        'os.chmod', 'ctypes.dlsym', 'fcntl.flock', 'os.listdir', 'os.scandir'}}
    if touches and (event[:2] in ('ct', 'fc') or {place!r} in repr(arguments)):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
"""
"""Kills its process before the n-th time it touches a folder."""


def kill_at_every_step(
    nursery: Nursery,
    target: Path,
    work: str,
    state: Callable[[Path], str],
    reset: Callable[[], None],
    kind: str,
    *companions: str,
) -> Tally:
    """Kill some work before each of its steps on the disk, then do it again.

    Args:
        nursery: runs it.
        target: the output.
        work: Python that writes it.
        state: names the whole output there is, ``new`` after the work.
        reset: makes the output what it was.
        kind: for the tally.
        companions: names of what belongs to the output.
    """
    tally = Tally(f"{kind}, killed at every step")
    for step in range(1000):
        reset()
        before = state(target)
        ended = nursery.run(code=STEP.format(step=step, place=str(target.parent)) + work)
        after = state(target)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended
        assert after in {before, "new", "absent"}, (step, after)
        tally.add(_named(after, before), target, *companions)
        # The next run, to another output there, tidies up: what was moved aside is back.
        again = nursery.run(
            code=f"from vistower import staging, places; from pathlib import Path\n"
            f"staging.clean(Path({str(target.parent)!r}))"
        )
        assert again.code == 0, again
        assert state(target) in {before, "new"}, (step, after, state(target))
        assert not others(target, *companions), step
    else:
        raise AssertionError("no end")
    return tally


FOLDER = """
from pathlib import Path
from vistower import places, staging
{patch}
output = Path({output!r})
replaced = places.snapshot(output)
with staging.staged(output) as stage:
    (stage.path(output) / "deep").mkdir(parents=True)
    for name in ("one", "deep/two"):
        (stage.path(output) / name).write_text({content!r})
    stage.publish({{output: replaced}})
"""
"""Writes a small folder as the exporter writes a bundle."""

NO_EXCHANGE = """
def cannot(first, second): raise OSError(22, "Invalid argument")
staging.exchange = cannot
"""
"""As on a file system that cannot exchange two folders in one step."""

EMBEDDINGS = """
from pathlib import Path
import numpy as np
from vistower.embedding_files import embedding_file
with embedding_file(Path({output!r}), 0) as target:
    target.write([{content!r}, "b"], {{"cls": np.full((2, 3), len({content!r}), np.float32)}})
"""
"""Writes embeddings as ``vistower embed`` does."""


def folder_state(output: Path) -> str:
    """Which folder of `FOLDER` is there."""
    if not os.path.lexists(output):
        return "absent"
    assert len(list(output.rglob("*"))) == 3
    contents = {(output / name).read_text() for name in ("one", "deep/two")}
    assert len(contents) == 1
    return contents.pop()


def rows_state(output: Path) -> str:
    """Which embeddings of `EMBEDDINGS` are there, names and rows of one run."""
    if not os.path.lexists(output):
        return "absent"
    loaded = np.load(output)
    if output.suffix == ".npz":
        names, cls = loaded["names"].tolist(), loaded["cls"]
    else:
        names, cls = json.loads(output.with_suffix(".names.json").read_text()), loaded
    assert cls.shape == (2, 3)
    assert (cls == len(names[0])).all()
    return str(names[0])


def kill_everything_at_every_step(nursery: Nursery, folder: Path) -> Iterator[Tally]:
    """`kill_at_every_step` for folders and both kinds of embeddings, new and replaced."""
    for old in ("", "old one"):
        for kind, work, name, state in (
            ("folder", FOLDER.replace("{patch}", ""), "out", folder_state),
            (
                "folder without exchange",
                FOLDER.replace("{patch}", NO_EXCHANGE),
                "out",
                folder_state,
            ),
            (".npz", EMBEDDINGS, "out.npz", rows_state),
            (".npy and names", EMBEDDINGS, "out.npy", rows_state),
        ):
            place = folder / "at-every-step"
            target = place / name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            kept = folder / "kept"
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            if old:
                done = nursery.run(code=work.format(output=str(kept / name), content=old))
                assert done.code == 0, done

            def reset(kept: Path = kept, place: Path = place) -> None:
                shutil.rmtree(place)
                shutil.copytree(kept, place)

            companions = (f"{target.stem}.names.json",) if target.suffix == ".npy" else ()
            yield kill_at_every_step(
                nursery,
                target,
                work.format(output=str(target), content="new"),
                state,
                reset,
                f"{kind}, {'replaced' if old else 'new'}",
                *companions,
            )
