"""The files of a checkpoint that a bundle is made from, and whether they are still the same.

What counts is the content, by SHA-256: an archive or an image layer cuts times to whole seconds,
and ``touch`` and a copy change them. Size and time of a weight file may say that it is unchanged,
which saves hashing it, but never that it changed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from vistower.bundle.hashes import sha256_once
from vistower.bundle.manifest import CONFIG_FILE, SourceFile
from vistower.errors import BundleError

PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
"""Files transformers reads an image processor from. Which one counts is its own affair: 5 takes an
``image_processor`` section of the second first, 4.57 the first file first."""

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In order of preference; an index names the shards it stands for."""

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""What the peft library saves; transformers applies it only where peft is installed."""

HASHED_ALWAYS = 1 << 20
"""Files up to this many bytes are hashed each time: configs and indexes, which are edited."""

_SECOND = 1_000_000_000


def source_files(directory: Path) -> tuple[str, ...]:
    """The names of a checkpoint's files that transformers reads: configs, weights, adapters."""
    names = {entry.name for entry in directory.iterdir()}
    weights = next((name for name in WEIGHTS if name in names), None)
    found = [name for name in (CONFIG_FILE, *PROCESSOR_CONFIGS, *ADAPTER) if name in names]
    return tuple(found if weights is None else [*found, *_parts(directory, weights)])


def _parts(directory: Path, weights: str) -> Collection[str]:
    if not weights.endswith(".index.json"):
        return (weights,)
    try:
        index = json.loads((directory / weights).read_text(encoding="utf-8"))
        return (weights, *sorted(set(map(str, index["weight_map"].values()))))
    # A damaged index has changed, which its hash will say.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return (weights,)


def record_source(directory: Path) -> dict[str, SourceFile]:
    """What the files of a checkpoint are now."""
    found = {}
    for name in source_files(directory):
        path = directory / name
        state = path.stat()
        found[name] = SourceFile(state.st_size, state.st_mtime_ns, sha256_once(path))
    return found


def changed_sources(directory: Path, recorded: Mapping[str, SourceFile]) -> list[str]:
    """What is different from the record, in words; empty where nothing is.

    Hashes weights only where their time is another one, or one of whole seconds, which says
    nothing; the hash is remembered, see `vistower.bundle.hashes`.
    """
    try:
        names = source_files(directory)
    except OSError as error:
        return [f"it cannot be read ({error.strerror})"]
    found = [f"{name} is new" for name in names if name not in recorded]
    for name, record in recorded.items():
        if name not in names:
            gone = not (directory / name).exists()
            found.append(f"{name} is gone" if gone else f"{name} is no longer what is loaded")
            continue
        try:
            if not _is_same(directory / name, record):
                found.append(f"{name} changed")
        # A link to nowhere, no permission.
        except (OSError, BundleError) as error:
            found.append(f"{name} cannot be read ({error})")
    return found


def _is_same(path: Path, record: SourceFile) -> bool:
    found = path.stat()
    if found.st_size != record.size:
        return False
    same_time = found.st_mtime_ns == record.mtime_ns and found.st_mtime_ns % _SECOND != 0
    if same_time and found.st_size > HASHED_ALWAYS:
        return True
    return sha256_once(path) == record.sha256
