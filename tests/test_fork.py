"""Forked children: each thing works there or says at once what to do; nothing hangs, nor at exit.

Every scenario runs in a process of its own, which forks and ends what does not come back.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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


def test_a_fork_waits_for_the_imports_of_a_first_use(clip_bundle: Path, tmp_path: Path) -> None:
    # Pillow imports what reads this one only when it comes.
    Image.new("RGB", (30, 40), "red").save(tmp_path / "a.tif")
    script = f"""
from vistower import VisionEncoder
def use():
    return shape(opened(1).encode({str(tmp_path / "a.tif")!r}))
def parent(delay):
    # A process that has not yet imported ONNX Runtime and the like, which its threads now do.
    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(delay)
    said = child(use)
    for thread in threads:
        thread.join()
    return said
for delay in (0, 0.01, 0.03, 0.1, 0.2, 0.3):
    print(child(lambda: parent(delay)))
"""
    assert run(script, clip_bundle) == ["(1, 64)"] * 6


def test_what_has_threads_is_refused_in_a_child_and_made_anew(clip_bundle: Path) -> None:
    script = """
import asyncio, gc
from vistower import CLIPMixin, DynamicBatcher, VisionEncoder
encoder, mixin = opened(), CLIPMixin(model_path=BUNDLE, device="cpu")
mixin.get_features(IMAGES[0])
batcher, used = DynamicBatcher(encoder), DynamicBatcher(encoder)
futures = [used.submit(image) for image in IMAGES]
begun, fresh = encoder.encode_stream(IMAGES * 9, batch_size=2), encoder.encode_stream(IMAGES)
next(begun)
async def abegun():
    stream = encoder.aencode_stream(IMAGES * 9, batch_size=2)
    await anext(stream)
    # Not by sys.exit: both processes would close the event loop's one selector.
    print(child(lambda: stream.asend(None).send(None), os._exit))
asyncio.run(abegun())
for use in (
    lambda: next(begun),
    lambda: list(fresh),
    lambda: batcher.encode(IMAGES[0]),
    lambda: batcher.submit(IMAGES[0]),
    lambda: used.encode(IMAGES[0]),
    lambda: used.submit(IMAGES[0]),
    lambda: asyncio.run(used.aencode(IMAGES[0])),
    lambda: mixin.get_features(IMAGES[1]),
    lambda: mixin.get_cls_feature(IMAGES[2]),
):
    print(child(use))
def end():
    global begun, fresh, batcher, used, futures
    used.close()
    begun.close()
    with batcher:
        begun = fresh = batcher = used = futures = None
    gc.collect()
print(child(end))
def anew():
    global encoder, mixin
    encoder, mixin = opened(), CLIPMixin(model_path=BUNDLE, device="cpu")
    with DynamicBatcher(encoder) as batcher:
        shapes = [shape(batcher.encode(IMAGES[0])), shape(batcher.submit(IMAGES[0]).result())]
    streamed = list(encoder.encode_stream(IMAGES, batch_size=2))
    return shapes, len(streamed), mixin.get_features(IMAGES[0]).shape
print(child(anew))
print(len([future.result() for future in futures]), len(list(begun)), len(list(fresh)))
batcher.close()
used.close()
"""
    lines = run(script, clip_bundle, VISTOWER_OUTPUT="numpy")
    made = ["stream", "stream", "encoder", *["batcher"] * 5, "encoder", "encoder"]
    for line, what in zip(lines[:10], made, strict=True):
        assert line.startswith(f"InferenceError: This {what} was made before")
    assert lines[10:] == ["None", "([(1, 64), (1, 64)], 4, (49, 64))", "4 35 4"]


def test_a_forked_worker_may_exit_while_it_works(clip_bundle: Path) -> None:
    script = """
from vistower import DynamicBatcher, VisionEncoder
encoder = opened()
encoder.encode(IMAGES)
def work():
    global mine, batcher, stream
    mine = opened()
    batcher = DynamicBatcher(mine)
    for image in IMAGES:
        batcher.submit(image)
    stream = mine.encode_stream(IMAGES * 99, batch_size=2)
    next(stream)
    def forever():
        while True:
            mine.encode(IMAGES)
    threading.Thread(target=forever, daemon=True).start()
    time.sleep(0.2)
print(child(work))
print(child(work, os._exit))
"""
    assert run(script, clip_bundle) == ["None", "None"]


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


def test_a_child_has_the_features_its_parent_had(clip_bundle: Path) -> None:
    script = """
from vistower import CLIPMixin
mixin = CLIPMixin(model_path=BUNDLE, device="cpu")
want = mixin.get_cls_feature(IMAGES[0])
stop = threading.Event()
def busy():
    while not stop.is_set():
        for image in IMAGES:
            mixin.get_features(image)
threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(8):
    # Four pictures are kept, which are all there are.
    print(child(lambda: np.array_equal(mixin.get_cls_feature(IMAGES[0]), want)))
stop.set()
for thread in threads:
    thread.join()
import pickle
print(child(lambda: pickle.loads(pickle.dumps(mixin)).get_cls_feature(255 - IMAGES[0]).shape))
print(child(lambda: mixin.get_cls_feature(255 - IMAGES[0])))
"""
    *kept, reopened, new = run(script, clip_bundle, VISTOWER_OUTPUT="numpy")
    assert kept == ["True"] * 8
    assert reopened == "(64,)"
    assert new.startswith("InferenceError: This encoder was made before")


def test_a_fork_while_the_feature_cache_changes(clip_bundle: Path) -> None:
    script = """
from vistower.mixins.feature_cache import FeatureCache
class Slow(np.ndarray):
    def __len__(self):
        inside.set()
        time.sleep(0.3)
        return 1
inside, cache = threading.Event(), FeatureCache()
slow = np.zeros((1, 3, 4, 4), np.float32).view(Slow)
other = np.ones((1, 3, 4, 4), np.float32)
compute = lambda pixels: np.asarray(pixels) + 1
assert cache.forward(other, compute)[0, 0, 0, 0] == 2
thread = threading.Thread(target=cache.forward, args=(slow, compute))
thread.start()
inside.wait()
time.sleep(0.4)
print(child(lambda: cache.forward(other, compute)[0, 0, 0, 0]))
thread.join()
"""
    assert run(script, clip_bundle) == ["2.0"]
