"""The files that make up a checkpoint: which there must be, and whether they are whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from vistower.bundle.source_files import ADAPTER, PROCESSOR_CONFIGS, WEIGHTS
from vistower.errors import CheckpointError

CONFIG = "config.json"


def needed(names: Collection[str], path_of: Callable[[str], Path]) -> tuple[tuple[str, ...], str]:
    """What a checkpoint needs of the files there are.

    Args:
        names: of the files there are.
        path_of: brings a file, called for the index of sharded weights only.

    Returns:
        The files' names, and what is missing (empty if nothing is).

    Raises:
        CheckpointError: the index is damaged.
    """
    if CONFIG not in names:
        return (), CONFIG
    processors = tuple(name for name in PROCESSOR_CONFIGS if name in names)
    if not processors:
        return (), " and no ".join(PROCESSOR_CONFIGS)
    weights = next((name for name in WEIGHTS if name in names), None)
    if weights is None:
        return (), f"weights: none of {', '.join(WEIGHTS)}"
    parts = _with_shards(weights, path_of)
    missing = next((name for name in parts if name not in names), "")
    return (CONFIG, *processors, *parts), missing


def lacking(what: str, missing: str, names: Collection[str]) -> CheckpointError:
    """The error of a checkpoint that is not whole.

    Args:
        what: the checkpoint in words.
        missing: see `needed`.
        names: of the files there are; paths, those in folders with a slash.
    """
    folders = {name.rpartition("/")[0] for name in names if name.endswith(f"/{CONFIG}")}
    found = some(name for name in names if "/" not in name)
    hint = f" There is a {CONFIG} in {some(folders)}: name it with --subfolder." if folders else ""
    return CheckpointError(
        f"{what} has no {missing}. It holds: {found}.{hint} Complete it, or give another "
        f"checkpoint."
    )


def refuse_adapter(what: str, names: Collection[str]) -> None:
    """Refuse a checkpoint with a PEFT adapter beside it.

    Raises:
        CheckpointError: saying how to merge it.
    """
    adapter = [name for name in ADAPTER if name in names]
    if adapter:
        raise CheckpointError(
            f"{what} has a PEFT adapter ({', '.join(adapter)}), which an export would leave out. "
            f"Merge it into its base first, with peft: "
            f"PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR), "
            f"and export DIR. For the base alone, give a checkpoint without these files."
        )


def check_files(directory: Path, what: str) -> dict[str, Any]:
    """Check that a directory holds a complete checkpoint.

    Returns:
        Its ``config.json``.

    Raises:
        CheckpointError: a file is missing, damaged, or an adapter's.
    """
    names = {entry.name for entry in directory.iterdir()}
    refuse_adapter(what, names)
    files, missing = needed(names, lambda name: directory / name)
    if missing:
        nested = {path.relative_to(directory).as_posix() for path in directory.glob(f"*/{CONFIG}")}
        raise lacking(what, missing, names | nested)
    for name in files:
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{what}: {name} is no file that can be read, but a folder, a pipe or a link to "
                f"nothing. Complete it, or give another checkpoint."
            )
        if name.endswith(".json"):
            read_json(directory / name)
        else:
            _check_weights(directory / name)
    return read_json(directory / CONFIG)


def _with_shards(weights: str, path_of: Callable[[str], Path]) -> Sequence[str]:
    """Names of the files that make up ``weights``: itself, or an index and its shards."""
    if not weights.endswith(".index.json"):
        return (weights,)
    index = read_json(path_of(weights))
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise damaged(path_of(weights), "names no shards (no weight_map)")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{weights} names a shard outside its directory: {name!r}. Do not use this "
                "checkpoint."
            )
    return (weights, *names)


def _check_weights(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(b"version "):
            raise CheckpointError(
                f"{str(path)!r} is a Git LFS pointer, not weights. Run `git lfs pull` there."
            )
        if size == 0:
            raise damaged(path, "is empty")
        if path.suffix != ".safetensors":
            return
        # The format: an unsigned 64-bit length, a JSON header of that length, the tensors' bytes.
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > size - 8:
            raise damaged(path, f"has {size} bytes, too few for its header of {length}")
        try:
            header = json.loads(file.read(length))
            tensors = [entry for key, entry in header.items() if key != "__metadata__"]
            expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise damaged(path, f"has an unreadable header ({error})") from error
    if size != expected:
        raise damaged(path, f"has {size} bytes and its header promises {expected}")


def damaged(path: Path, found: str) -> CheckpointError:
    """The error of a file that is not what it should be."""
    # Resolved: in the hub's cache the file to delete is the one behind the symbolic link.
    return CheckpointError(
        f"{str(path.resolve())!r} {found}: it was cut off or changed. Delete it and fetch the "
        "checkpoint again."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise damaged(path, f"should hold a JSON object and holds a {type(content).__name__}")
    return content


def some(names: Iterable[str], limit: int = 12) -> str:
    """The first of some names, in words."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (", ".join(ordered[:limit]) or "nothing") + more
