"""Processes that open and run a bundle again and again while it is replaced by another one.

Whatever the moment, a reader must get the one bundle's vectors or the other's, bit for bit, under
the right name, or a `VistowerError`: never a mixture of the two.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from vistower import places, staging

READER = """
import hashlib, sys
from pathlib import Path
from vistower import VisionEncoder
from vistower.errors import VistowerError

bundle, picture, end = sys.argv[1:]
while True:
    try:
        encoder = VisionEncoder.open(bundle, device="cpu", threads=1)
        vectors = encoder.encode(picture, outputs="cls").cls
        print(encoder.bundle.name, hashlib.sha256(vectors.tobytes()).hexdigest(), flush=True)
    except VistowerError as error:
        print("refused", type(error).__name__, flush=True)
    if Path(end).exists():
        break
"""


def _reader(bundle: Path, picture: Path, end: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READER, str(bundle), str(picture), str(end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _lines(reader: subprocess.Popen[str]) -> list[str]:
    text, errors = reader.communicate(timeout=300)
    assert reader.returncode == 0, errors
    return text.splitlines()


def replace(output: Path, bundle: Path) -> None:
    """Publish a copy of a bundle at an output, as the exporter does."""
    there = places.snapshot(output)
    with staging.staged(output) as stage:
        shutil.copytree(bundle, stage.path(output))
        stage.publish({output: there})


def race(
    first: Path, second: Path, output: Path, picture: Path, *, times: int, readers: int, seed: int
) -> Counter[str]:
    """Replace the bundle at an output so many times under so many readers; what they got."""
    output.parent.mkdir(exist_ok=True)
    end = output.parent / "end"
    end.touch()
    whole = {_lines(_reader(bundle, picture, end))[0] for bundle in (first, second)}
    assert len(whole) == 2
    end.unlink()
    replace(output, first)
    chance = random.Random(seed)
    running = [_reader(output, picture, end) for _ in range(readers)]
    for index in range(times):
        time.sleep(chance.uniform(0, 0.1))
        replace(output, first if index % 2 else second)
    end.touch()
    found: Counter[str] = Counter()
    for reader in running:
        for line in _lines(reader):
            name, what = line.split()
            assert name == "refused" or line in whole, line
            found[what if name == "refused" else name] += 1
    end.unlink()
    return found
