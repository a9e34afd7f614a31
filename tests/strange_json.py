"""JSON that is still JSON, with strange values in it: for tests/fuzz and tests/mutations.py."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 16, 17, 224, 10**9, -(2**63), 2**64, 10**30),
    *(0.5, 16.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "0", "224", "fp32", "int8", "..", "/etc/passwd", "../../x", "a" * 10_000, "\x1b[2J"),
    *("\ud800", "\x00", "onnx/model.onnx", "CON", "*/_ORT_MEM_ADDR_/*", "\u202egnp.exe"),
    *([], {}, [1], [[[]]], {"a": {}}, [224, 224], ["x"] * 5000, [float("nan")] * 3),
)


def forged(data: bytes, rng: random.Random) -> bytes:
    """JSON with one to five values removed, renamed, moved or made strange.

    Raises:
        ValueError: it is no JSON.
    """
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        do = rng.randrange(8)
        if do == 0:
            del holder[key]
        elif do == 1 and isinstance(holder, dict):
            holder[rng.choice([str(x) for x in STRANGE])] = holder[key]
        elif do == 2:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        elif do == 3 and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * rng.choice((-1, 2, 0.5, 10**6)) + rng.choice((0, 1, -1))
        else:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))
        if len(list(_places(value))) > 100_000:
            break
    try:
        return json.dumps(value).encode()
    except ValueError:
        return data[:-1]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield value, key
            yield from _places(value[key])
