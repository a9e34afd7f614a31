"""One thread, a decoded picture → ``pixel_values``: vistower against the Hugging Face processors.

    python benchmarks/preprocess.py --output benchmarks/results/preprocess.json

Equality is checked before anything is timed. Ours and the reference run in processes of their own,
in turn, several rounds, one thread each (torch, BLAS and the native resize library): a process's
allocations decide whether its large arrays get fresh pages each time, which the reference's time
depends on by a factor of two. Each round is a median; the ratio is that of the medians of the
rounds, with the smallest and the largest of any two rounds beside it.
"""

# BLAS reads its environment when NumPy is imported.
# ruff: noqa: E402

from __future__ import annotations

import os

for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import datetime
import importlib.metadata
import io
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from vistower.doctor import diagnose
from vistower.preprocess import native
from vistower.preprocess.processor import Preprocessor
from vistower_export.pictures import SAMPLES
from vistower_export.reference import transparency

REFERENCES = {
    "clip-torchvision": ("CLIPImageProcessor", "torchvision", 0.0),
    "clip-pil": ("CLIPImageProcessorPil", "pil", 0.0),
    "dinov3": ("DINOv3ViTImageProcessor", "torchvision", 1e-5),
}
SIZES = ((1024, 768), (640, 480), (3000, 2000))
LIBRARIES = ("numpy", "pillow", "torch", "torchvision", "transformers", "cykooz-resizer")


def agree(what: object, difference: float, allowed: float) -> None:
    """Stop where there is nothing worth timing."""
    if difference > allowed:
        raise SystemExit(f"{what}: pixels differ by {difference}, allowed is {allowed}")


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the figures are of."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    found = diagnose()
    return {
        "cpu": model,
        "flags": found.cpu_flags,
        "cpus": found.cpus,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def taking_turns(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median milliseconds of each call; a turn is five calls, the first of which warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            for repeat in range(5):
                start = time.perf_counter()
                call()
                if turn and repeat:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


@dataclass(frozen=True)
class Case:
    """One processor at one size (width, height), ours and the reference."""

    name: str
    size: tuple[int, int]

    def load(self) -> tuple[Any, Preprocessor, Image.Image]:
        """The reference, ours, and the picture."""
        class_name, backend, _ = REFERENCES[self.name]
        reference = getattr(transformers, class_name)()
        ours = Preprocessor.from_config(
            reference.to_dict(),
            backend=backend,
            transparency=transparency(reference),
            transformers=transformers.__version__,
        )
        image = Image.open(SAMPLES[0]).convert("RGB").resize(self.size, Image.Resampling.BICUBIC)
        return reference, ours, image

    def check(self) -> float:
        """Largest difference of the pixels, native and NumPy, which must be allowed."""
        reference, ours, image = self.load()
        want = reference(images=image, return_tensors="pt")["pixel_values"][0].numpy()
        found = [float(np.abs(ours(image) - want).max())]
        with without_native_library():
            found.append(float(np.abs(ours(image) - want).max()))
        agree(self, max(found), REFERENCES[self.name][2])
        return max(found)

    def times(self, who: str, turns: int) -> dict[str, float]:
        """Median milliseconds of every way ``who`` has."""
        reference, ours, image = self.load()
        if who == "huggingface":
            return taking_turns({who: lambda: reference(images=image, return_tensors="pt")}, turns)
        array = np.asarray(image)
        out = np.empty((3, *ours.output_size), np.float32)
        times = taking_turns(
            {
                "vistower": lambda: ours(image, out=out),
                "vistower_from_array": lambda: ours(array, out=out),
            },
            turns,
        )
        if native.library() is not None and self.name == "clip-torchvision":
            with without_native_library():
                times |= taking_turns({"vistower_numpy_alone": lambda: ours(image, out=out)}, turns)
        return times


CASES = [Case(name, size) for size in SIZES for name in REFERENCES]


@contextmanager
def without_native_library() -> Iterator[None]:
    """NumPy alone."""
    library, native.library = native.library, lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        native.library = library


def in_a_process(who: str, turns: int) -> list[dict[str, float]]:
    """What `Case.times` gives for every case, from a process of its own."""
    command = [sys.executable, __file__, "--who", who, "--turns", str(turns)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    times: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return times


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Of the medians, and of the extremes of any two rounds."""
    return {
        "median": round(statistics.median(above) / statistics.median(below), 2),
        "smallest": round(min(above) / max(below), 2),
        "largest": round(max(above) / min(below), 2),
    }


def decoding(size: tuple[int, int], turns: int) -> dict[str, Any]:
    """Milliseconds of Pillow's JPEG decoding, for comparison."""
    buffer = io.BytesIO()
    image = Image.open(SAMPLES[0]).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=90)
    times = taking_turns({"jpeg": lambda: Image.open(io.BytesIO(buffer.getvalue())).load()}, turns)
    return {"size": list(size), "ms": times["jpeg"]}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--who", choices=("huggingface", "vistower"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.who is not None:
        print(json.dumps([case.times(arguments.who, arguments.turns) for case in CASES]))
        return
    if arguments.output is None:
        parser.error("--output is needed")
    differences = [case.check() for case in CASES]
    rounds: list[dict[str, list[float]]] = [{} for _ in CASES]
    for number in range(arguments.rounds):
        for who in ("huggingface", "vistower")[:: 1 if number % 2 else -1]:
            for found, times in zip(rounds, in_a_process(who, arguments.turns), strict=True):
                for name, value in times.items():
                    found.setdefault(name, []).append(value)
    results = [
        {
            "processor": case.name,
            "size": list(case.size),
            "max_abs": difference,
            "ms": {name: statistics.median(values) for name, values in found.items()},
            "rounds_ms": found,
            "ratio": ratio(found["huggingface"], found["vistower"]),
            "ratio_from_array": ratio(found["huggingface"], found["vistower_from_array"]),
        }
        for case, difference, found in zip(CASES, differences, rounds, strict=True)
    ]
    for result in results:
        print(result["processor"], result["size"], result["ms"], "ratio", result["ratio"])
    report = {
        "machine": machine(),
        "threads": 1,
        "preprocessing": results,
        "jpeg_decoding": [decoding(size, arguments.turns) for size in SIZES],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
