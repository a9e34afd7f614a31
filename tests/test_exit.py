"""The interpreter ends in the middle of work: with its own exit code, without a word, in time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import asyncio, faulthandler, gc, itertools, os, random, signal, sys, threading, time
import numpy as np
from vistower import DynamicBatcher, VisionEncoder

image = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
encoder = VisionEncoder.open(sys.argv[1], device="cpu", threads=2)
endless = lambda: itertools.repeat(image)

def forever(work):
    while True:
        work()

def in_background(work, daemon):
    threading.Thread(target=work, daemon=daemon).start()

async def consume(images):
    async for _ in encoder.aencode_stream(images, batch_size=8):
        pass

def interrupting():
    global sender
    yield from [image] * 100
    sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    sender.start()
    yield from endless()
"""

SCENARIOS = {
    # Python ends daemon threads in the middle of ONNX Runtime's C++ and the resizer's Rust.
    "daemon threads": (
        """
for work in (
    lambda: encoder.encode([image] * 4),
    lambda: encoder.preprocess([image] * 4),
    lambda: list(encoder.encode_stream([image] * 10, batch_size=2)),
    lambda: VisionEncoder.open(sys.argv[1], device="cpu", threads=1),
):
    for _ in range(2):
        in_background(lambda work=work: forever(work), True)
time.sleep(0.5)
""",
        "",
    ),
    "daemon threads at a batcher": (
        """
batcher = DynamicBatcher(encoder)
for _ in range(8):
    in_background(lambda: forever(lambda: batcher.encode(image)), True)
time.sleep(0.5)
""",
        "",
    ),
    "a thread that goes on": (
        """
def count():
    print(len(list(encoder.encode_stream([image] * 30, batch_size=2))))
in_background(count, False)
time.sleep(0.1)
""",
        "30\n",
    ),
    "nothing closed": (
        """
batcher = DynamicBatcher(encoder)
futures = [batcher.submit(image) for _ in range(40)]
for future in futures:
    future.add_done_callback(lambda future: batcher.encode(image))
stream = encoder.encode_stream(endless(), batch_size=4)
next(stream)
""",
        "",
    ),
    "an exception of the source": (
        """
def source():
    yield image
    sys.exit(7)
list(encoder.encode_stream(source(), batch_size=4))
""",
        "",
    ),
    "a signal": (
        """
try:
    for _ in encoder.encode_stream(interrupting(), batch_size=8):
        pass
except KeyboardInterrupt:
    sender.join()
    print("interrupted", threading.active_count())
try:
    asyncio.run(consume(interrupting()))
except KeyboardInterrupt:
    sender.join()
    print("interrupted", threading.active_count())
""",
        "interrupted 1\ninterrupted 1\n",
    ),
    # Whatever Python code the main thread is in, the others must not wait for it ever after.
    "many signals": (
        """
signal.signal(signal.SIGALRM, signal.default_int_handler)
chance = random.Random(0)
faulthandler.dump_traceback_later(80, exit=True)
for _ in range(100):
    stream = encoder.encode_stream(itertools.repeat(image[:30, :40]), batch_size=2)
    next(stream)
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.01))
        for _ in stream:
            pass
    except KeyboardInterrupt:
        pass
print("interrupted", threading.active_count())
""",
        "interrupted 1\n",
    ),
    "asyncio": (
        """
async def cancelled(times):
    task = asyncio.create_task(consume(endless()))
    await asyncio.sleep(0.2)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    try:
        await task
    except asyncio.CancelledError:
        print("cancelled")
async def late():
    try:
        await asyncio.wait_for(anext(encoder.aencode_stream(endless(), batch_size=64)), 0.01)
    except asyncio.TimeoutError:
        print("late")
async def dropped():
    await anext(encoder.aencode_stream(endless(), batch_size=8))
async def pending():
    tasks.append(asyncio.create_task(consume(endless())))
    await asyncio.sleep(0.2)
async def callers():
    batcher = DynamicBatcher(encoder)
    tasks.extend(asyncio.create_task(batcher.aencode(image)) for _ in range(40))
    await asyncio.sleep(0.02)
tasks = []
for run in (cancelled(1), cancelled(2), late(), dropped(), pending(), callers()):
    asyncio.run(run)
loop = asyncio.new_event_loop()
stream = encoder.aencode_stream(endless(), batch_size=8)
loop.run_until_complete(anext(stream))
loop.close()
del stream
gc.collect()
""",
        "cancelled\ncancelled\nlate\n",
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_interpreter_ends_in_the_middle_of_work(name: str, clip_bundle: Path) -> None:
    script, says = SCENARIOS[name]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{SETUP}{script}\nsys.exit(7)", str(clip_bundle)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, says, "")
