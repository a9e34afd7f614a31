"""Forked children: each thing works there or says at once what to do; nothing hangs, nor at exit.

Every scenario runs in a process of its own, which forks and ends what does not come back.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

HELPERS = """
import os, signal, sys, threading, time
import numpy as np

BUNDLE = sys.argv[1]
IMAGES = [np.random.default_rng(n).integers(0, 255, (300, 200 + n, 3), np.uint8) for n in range(4)]

def child(function, leave=sys.exit):
    # What the function returned or raised in a forked child, which leaves in the usual way.
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        # A hang ends by the signal, and so does one of the interpreter's own end.
        signal.alarm(20)
        try:
            told = str(function())
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        os.write(sender, told.encode())
        leave(0)
    os.close(sender)
    with open(receiver) as file:
        told = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return told if status == 0 else f"exit code {status} after: {told}"

def opened(threads=2):
    return VisionEncoder.open(BUNDLE, device="cpu", threads=threads)

def shape(embeddings):
    return embeddings.cls.shape
"""


def run(script: str, bundle: Path, **environment: str) -> list[str]:
    """What a script prints, line by line; it must end by itself and say nothing else."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore:This process", "-c", HELPERS + script, str(bundle)],
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | environment,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


@pytest.mark.parametrize(("bundle", "threads"), [("clip_bundle", 2), ("dinov3_bundle", 1)])
def test_a_child_prepares_opens_and_encodes_and_leaves_its_parents_encoder_alone(
    bundle: str, threads: int, request: pytest.FixtureRequest
) -> None:
    script = f"""
from vistower import VisionEncoder
print(child(lambda: shape(opened({threads}).encode(IMAGES))))
encoder = opened({threads})
print(child(lambda: encoder.preprocess(IMAGES).shape))
print(child(lambda: shape(opened({threads}).encode(IMAGES))))
pixels, want = encoder.preprocess(IMAGES), encoder.encode(IMAGES).cls
print(child(lambda: np.array_equal(encoder.preprocess(IMAGES), pixels)))
print(child(lambda: np.abs(opened({threads}).encode(IMAGES).cls - want).max() <= 1e-5))
for use in (
    lambda: encoder.encode(IMAGES),
    lambda: encoder.forward(pixels),
    lambda: encoder.warmup(),
    lambda: encoder.forward_on_device(pixels),
    lambda: list(encoder.encode_stream(IMAGES)),
):
    print(child(use))
# A child's child, and a parent's encoder that a child drops.
print(child(lambda: child(lambda: shape(opened({threads}).encode(IMAGES)))))
def drop():
    global encoder
    encoder = None
print(child(drop))
print(child(drop, os._exit))
print(shape(encoder.encode(IMAGES)))
"""
    lines = run(script, request.getfixturevalue(bundle))
    assert lines[:5] == ["(4, 64)", "(4, 3, 224, 224)", "(4, 64)", "True", "True"]
    for line in lines[5:10]:
        assert line.startswith("InferenceError: This encoder was made before")
        assert "VisionEncoder.open() works here" in line
    assert lines[10:] == ["(4, 64)", "None", "None", "(4, 64)"]


@pytest.mark.parametrize("first", ["vistower", "onnxruntime"])
def test_the_order_of_imports_does_not_matter(first: str, clip_bundle: Path) -> None:
    # ONNX Runtime 1.32 starts a telemetry thread where it is imported first.
    script = f"""
import {first}
from vistower import VisionEncoder
print(child(lambda: shape(opened().encode(IMAGES))))
encoder = opened()
encoder.encode(IMAGES)
print(child(lambda: shape(opened().encode(IMAGES))))
print(child(lambda: None))
"""
    assert run(script, clip_bundle) == ["(4, 64)", "(4, 64)", "None"]


@pytest.mark.parametrize("bundle", ["clip_bundle", "dinov3_bundle"])
def test_forks_while_threads_are_busy(bundle: str, request: pytest.FixtureRequest) -> None:
    script = """
from vistower import VisionEncoder
encoder = opened()
stop = threading.Event()
def busy(work):
    while not stop.is_set():
        work()
works = [
    lambda: encoder.preprocess(IMAGES),
    lambda: encoder.encode(IMAGES[:1]),
    lambda: opened(1),
    lambda: list(encoder.encode_stream(IMAGES, batch_size=2)),
]
threads = [threading.Thread(target=busy, args=(work,)) for work in works]
for thread in threads:
    thread.start()
def use():
    return encoder.preprocess(IMAGES).shape, shape(opened().encode(IMAGES))
for number in range(8):
    print(child(use))
stop.set()
for thread in threads:
    thread.join()
"""
    lines = run(script, request.getfixturevalue(bundle))
    assert lines == ["((4, 3, 224, 224), (4, 64))"] * 8


def test_workers_of_multiprocessing(clip_bundle: Path) -> None:
    script = """
import multiprocessing
from vistower import VisionEncoder
encoder = opened()
want = encoder.encode(IMAGES).cls
def work(image):
    global mine
    if "mine" not in globals():
        mine = opened(1)
    return mine.encode(image).cls[0]
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(np.abs(np.stack(pool.map(work, IMAGES)) - want).max() <= 1e-5)
    print(np.array_equal(
        np.concatenate(pool.map(encoder.preprocess, IMAGES)), encoder.preprocess(IMAGES)
    ))
"""
    assert run(script, clip_bundle) == ["True", "True"]
