"""The installed size of a backend: its distributions, everything they require, all their files.

This is what ``du`` of an environment with nothing else would say, less Python itself and pip,
without building one: pip lists every file it installs in the distribution's ``RECORD``.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CUDA = re.compile(r"^(nvidia[-_]|cuda[-_]|triton$)")
"""What a CUDA build of torch brings that a CPU-only build does not."""


def installed(libraries: Sequence[str]) -> dict[str, Any]:
    """Bytes in total, of which CUDA libraries, and by distribution; what is missing is named."""
    sizes, missing = {}, []
    waiting = [_normal(name) for name in libraries]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        sizes[name] = _bytes(distribution)
        waiting += _required(distribution)
    cuda = sum(size for name, size in sizes.items() if CUDA.match(name))
    return {
        "bytes": sum(sizes.values()),
        "cuda_bytes": cuda,
        "distributions": dict(sorted(sizes.items())),
        "missing": sorted(missing),
    }


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _required(distribution: importlib.metadata.Distribution) -> list[str]:
    """Names it requires here, extras asked for by a requirement included."""
    from packaging.requirements import Requirement

    names = []
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            names.append(_normal(requirement.name))
            names += _extra_requirements(requirement.name, requirement.extras)
    return names


def _extra_requirements(name: str, extras: set[str]) -> list[str]:
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    wanted = []
    for extra in extras:
        for text in texts:
            requirement = Requirement(text)
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                wanted.append(_normal(requirement.name))
    return wanted


def _bytes(distribution: importlib.metadata.Distribution) -> int:
    total = 0
    for file in distribution.files or ():
        path = Path(file.locate())
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total
