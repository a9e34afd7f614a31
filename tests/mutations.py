"""Bundles with one file damaged or forged, and what opening, running and verifying them raises.

A mutation is a number: the same one gives the same damage. Most are *resealed*: the manifest
is given the damaged file's hash, as one who forges a bundle would. Run as a script, it tries many:

    python tests/mutations.py BUNDLE --first 0 --count 20000
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import strange_json
from forged import reseal
from vistower import VisionEncoder
from vistower.bundle import Bundle
from vistower.errors import VistowerError
from vistower.golden import replay

GRAPH = "onnx/model_ort.onnx"
TARGETS = (
    *("vistower.json",) * 4,
    *("config.json", "preprocessor_config.json", "golden/golden.npz") * 2,
    *(GRAPH,) * 4,
    "onnx/model.onnx_data",
)


def mutate(bundle: Path, number: int) -> str:
    """Damage one file of a bundle; returns what was done."""
    rng = random.Random(number)
    name = rng.choice(TARGETS)
    path = bundle / name
    data = path.read_bytes()
    kinds: list[Callable[[bytes, random.Random, Path], bytes]] = [
        _flipped,
        _cut,
        _inserted,
        _swapped,
        _overwritten,
    ]
    if name.endswith(".json"):
        kinds = [*kinds[:3], *[_forged_json] * 7]
    elif name.endswith(".onnx"):
        kinds = [*kinds, *[_forged_graph] * 8]
    kind = rng.choice(kinds)
    changed = kind(data, rng, bundle)
    path.write_bytes(changed)
    resealed = name != "vistower.json" and rng.random() < 0.7
    if resealed:
        reseal(bundle, name)
    return f"{name} {kind.__name__}{' resealed' if resealed else ''}"


def use(bundle: Path, picture: Any, *, verify: bool = True) -> None:
    """Everything that reads a bundle."""
    loaded = Bundle.load(bundle)
    encoder = VisionEncoder.open(bundle, device="cpu", threads=1, graph=_some_graph(loaded))
    embeddings = encoder.encode(picture)
    if not np.isfinite(embeddings.patches).all():
        raise AssertionError("tokens that are not finite")
    if verify:
        collections.deque(replay(loaded), maxlen=0)


def _some_graph(bundle: Bundle) -> str:
    names = [graph.name for graph in bundle.graphs]
    return "ort" if "ort" in names else names[0]


def _flipped(data: bytes, rng: random.Random, _: Path) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random, _: Path) -> bytes:
    start = rng.randrange(len(data))
    end = len(data) if rng.random() < 0.5 else rng.randrange(start, len(data))
    return data[:start] + data[end:]


def _inserted(data: bytes, rng: random.Random, _: Path) -> bytes:
    start = rng.randrange(len(data))
    other = rng.randrange(len(data))
    piece = rng.choice(
        (rng.randbytes(rng.randrange(1, 64)), data[other : other + 200], b"[" * 100_000)
    )
    return data[:start] + piece + data[start:]


def _swapped(_: bytes, rng: random.Random, bundle: Path) -> bytes:
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    return rng.choice([*(path.read_bytes() for path in files), b"", rng.randbytes(1000)])


def _overwritten(data: bytes, rng: random.Random, _: Path) -> bytes:
    start = rng.randrange(len(data))
    size = min(len(data) - start, rng.choice((1, 4, 65536)))
    filling = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return data[:start] + filling + data[start + size :]


def _forged_json(data: bytes, rng: random.Random, _: Path) -> bytes:
    return strange_json.forged(data, rng)


def _forged_graph(data: bytes, rng: random.Random, _: Path) -> bytes:
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _forge(model, rng)
    return bytes(model.SerializeToString())


def _forge(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = model.graph
    numbers = (0, 1, -1, 2, 3, 7, 64, 2**31, 2**62, -(2**63), 10**12)
    words = ("", "x", "Loop", "EPContext", "com.microsoft", "custom", "/dev/zero", "../config.json")
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    do = rng.randrange(14)
    if do == 0:
        node.op_type = rng.choice([*words, *(other.op_type for other in graph.node)])
    elif do == 1:
        node.domain = rng.choice(words)
    elif do == 2 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(
            [
                *words,
                "pixel_values",
                tensor.name,
                *(x for other in graph.node for x in other.output),
            ]
        )
    elif do == 3 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i, attribute.type = rng.choice(numbers), rng.randrange(15)
        attribute.ints.extend(rng.choices(numbers, k=2))
    elif do == 4 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(numbers)
    elif do == 5:
        tensor.data_type = rng.randrange(0, 28)
    elif do == 6:
        tensor.raw_data = rng.randbytes(rng.choice((0, 1, 8, 256)))
    elif do == 7:
        stored = rng.choice([x for x in graph.initializer if x.external_data])
        entry = rng.choice(stored.external_data)
        entry.value = rng.choice([*words, *map(str, numbers), "model.onnx_data", "model_ort.onnx"])
    elif do == 8:
        port = rng.choice([*graph.input, *graph.output])
        shape = port.type.tensor_type.shape.dim
        if rng.random() < 0.5 and shape:
            rng.choice(shape).dim_value = rng.choice(numbers)
        else:
            port.type.tensor_type.elem_type = rng.randrange(0, 28)
    elif do == 9:
        graph.node.remove(node)
    elif do == 10:
        graph.node.append(node)
    elif do == 11:
        rng.choice(model.opset_import).version = rng.choice(numbers)
    elif do == 12:
        entry = model.metadata_props.add()
        entry.key, entry.value = "ort_config", '{"session_options": {}}'
    else:
        inner = node.attribute.add()
        inner.name, inner.type = "body", onnx.AttributeProto.GRAPH
        inner.g.node.add().op_type = rng.choice(words)


def restore(bundle: Path, original: Path) -> None:
    """Undo a mutation."""
    for path in original.rglob("*"):
        if path.is_file():
            copy = bundle / path.relative_to(original)
            if copy.read_bytes() != path.read_bytes():
                copy.write_bytes(path.read_bytes())


def main() -> None:
    """Try many. A crash of ONNX Runtime's ends it: the last number on standard error is its."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000)
    arguments = parser.parse_args()
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
    bundle = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "b"
    shutil.copytree(arguments.bundle, bundle)
    os.environ["VISTOWER_CACHE"] = str(bundle.parent / "cache")
    counts: collections.Counter[str] = collections.Counter()
    slowest = (0.0, 0)
    for number in range(arguments.first, arguments.first + arguments.count):
        print(number, end="\r", file=sys.stderr, flush=True)
        what = mutate(bundle, number)
        trace, start = "", time.perf_counter()
        try:
            use(bundle, picture, verify=number % 4 == 0)
            outcome = "accepted"
        except VistowerError as error:
            outcome = type(error).__name__
            str(error).encode()
            if not str(error).isprintable():
                outcome = "UNPRINTABLE"
        except Exception:
            outcome, trace = "ESCAPED", traceback.format_exc()[-1500:]
        slowest = max(slowest, (time.perf_counter() - start, number))
        if outcome.isupper():
            print(number, what, outcome, trace, flush=True)
        counts[f"{what.split()[0]}: {outcome}"] += 1
        restore(bundle, arguments.bundle)
    for line, count in sorted(counts.items()):
        print(f"{count:7} {line}")
    print(f"slowest: {slowest[0]:.2f} s, mutation {slowest[1]}")
    shutil.rmtree(bundle.parent)


if __name__ == "__main__":
    main()
