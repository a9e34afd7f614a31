"""What is kept between pictures stays small, whatever the number of threads, sizes and lengths.

Each of the three stores (scratch memory, the native library's results, weights) is filled by
pictures, in a process of its own, with several times what it may keep; the memory that stays is
read off the process. Without its bound each of them fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vistower.preprocess import native

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

HELPERS = """
import ctypes, gc, re, sys, threading
import numpy as np
from PIL import Image
from vistower import VisionEncoder
encoder = VisionEncoder.open(sys.argv[1], device="cpu", threads=1)

def resident():
    gc.collect()
    # What is free already is no matter of ours.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def in_threads(count, work):
    together = threading.Barrier(count)
    failed = []
    def run(number):
        together.wait()
        try:
            work(number)
        except Exception as error:
            failed.append(error)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed

def prepare(width, height):
    encoder.preprocess(Image.new("RGB", (width, height), (40, 80, 120)))

prepare(640, 480)
before = resident()
"""

SCRATCH = """
# None goes on before all have come to where they copy pixels into their scratch memory.
real, here, together = np.copyto, threading.local(), threading.Barrier(THREADS)
def copyto(*arguments, **options):
    if not hasattr(here, "came"):
        here.came = together.wait(60)
    return real(*arguments, **options)
def work(number):
    prepare(1600 + number, 600)
    assert here.came >= 0
np.copyto = copyto
in_threads(THREADS, work)
""".replace("THREADS", "64")

RESULTS = """
# The native library's result between the two axes is 224 pixels wide and as high as the picture.
def work(number):
    for step in range(12):
        prepare(1400, 5000 - 12 * number - step)
in_threads(8, work)
"""

WEIGHTS = """
# 4 MB for the long axis of each.
def work(number):
    for step in range(10):
        prepare(1, 150_000 + 1000 * (10 * number + step))
        prepare(200_000 - 1000 * (10 * number + step), 1)
in_threads(4, work)
"""


def growth(script: str, bundle: Path) -> float:
    """MB that stay in a process after a script."""
    code = HELPERS + script + "print(resident() - before)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        # glibc would keep what was freed.
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize(
    ("script", "family"),
    [
        (SCRATCH, "dinov3"),
        (WEIGHTS, "dinov3"),
        pytest.param(
            RESULTS,
            "clip",
            marks=pytest.mark.skipif(native.library() is None, reason="no native library"),
        ),
    ],
    ids=["scratch", "weights", "results"],
)
def test_what_is_kept_is_bounded(script: str, family: str, request: pytest.FixtureRequest) -> None:
    """64 MB of scratch, 32 MB of results, 32 MB of weights, and some slack."""
    assert growth(script, request.getfixturevalue(f"{family}_bundle")) < 130
