"""What ``--overwrite`` may replace: a folder in which everything is proven to be vistower's own.

The proof is a record that was written with the folder: the size and SHA-256 of every file in it,
by ``vistower.json`` of a bundle and ``README.md`` of a random-weight checkpoint. A file that is
not recorded, or is another than was recorded, is somebody's work, and the folder stays.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistower.bundle import sha256
from vistower.bundle.manifest import MANIFEST_FILE, FileRecord
from vistower.errors import OutputExistsError
from vistower.places import Snapshot, as_output_error, is_mount_point, real_place, snapshot

_NAMED = 8
"""How many foreign files a message names."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder vistower writes.

    ``read`` gives the record of the files of such a folder, and raises ``ValueError`` where it has
    none; ``file`` is the one that holds the record.
    """

    name: str
    file: str
    read: Callable[[Path], Mapping[str, FileRecord]]


def _manifest_files(path: Path) -> Mapping[str, FileRecord]:
    # Of any format version: the SHA-256 of its files prove it ours whatever else it says.
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not {"format_version", "source"} <= manifest.keys():
        raise ValueError("it is no manifest")
    return {str(name): _record(record) for name, record in dict(manifest["files"]).items()}


def _record(record: Any) -> FileRecord:
    return FileRecord(int(record["size"]), str(record["sha256"]))


BUNDLE = Kind("bundle", MANIFEST_FILE, _manifest_files)


def may_write(
    output: Path, kind: Kind, *, overwrite: bool = False, sources: Iterable[Path] = ()
) -> tuple[Path, Snapshot]:
    """Decide whether a folder may be written to a path, and what it replaces.

    Args:
        output: the folder; of a link, the folder it points to, so that the link stays.
        kind: of the folder.
        overwrite: replace a folder of this kind.
        sources: files and folders it is made from: neither one of them is replaced, nor what
            holds one, nor is anything written into such a folder.

    Returns:
        The folder's real path, and what is in it now (nothing, if it is not there).

    Raises:
        OutputExistsError: what is there may not be replaced; the message names it.
        OutputError: no folder can be made there.
    """
    with as_output_error(output):
        place = real_place(output)
        _require_apart(output, place, sources)
        if not os.path.lexists(place):
            return place, {}
        if not place.is_dir():
            raise OutputExistsError(
                f"{output} is a file, and a {kind.name} is a folder. Choose another output."
            )
        _require_movable(output, place)
        found = snapshot(place)
        if not found:
            return place, {}
        foreign = _foreign(place, kind, found)
        if foreign:
            raise OutputExistsError(
                f"{output} is not empty and holds what vistower did not write as a {kind.name}: "
                f"{_some(foreign)}. It is left as it is, with --overwrite too: choose another "
                f"output, or move these away."
            )
        if not overwrite:
            raise OutputExistsError(
                f"{output} holds a {kind.name}. Choose another output, or replace it with "
                f"--overwrite."
            )
        return place, found


def _require_apart(output: Path, place: Path, sources: Iterable[Path]) -> None:
    """Refuse what would write over a source, or into one.

    Compared by device and inode: paths of one folder may differ in case, by links and by mounts.
    """
    above = [path for path in (place, *place.parents) if path.exists()]
    for source in sources:
        real = Path(os.path.realpath(source))
        if place.exists() and any(map(place.samefile, (real, *real.parents))):
            raise OutputExistsError(
                f"{output} is or holds {source}, which is read to make it. Choose another output."
            )
        if real.is_dir() and any(map(real.samefile, above)):
            raise OutputExistsError(
                f"{output} is in {source}, which is read to make it. Choose an output outside."
            )


def _require_movable(output: Path, place: Path) -> None:
    here = Path.cwd()
    if any(map(place.samefile, (here, *here.parents))):
        raise OutputExistsError(
            f"{output} is or holds the current directory, which cannot be replaced. Choose a "
            f"folder in it, or run from elsewhere."
        )
    if is_mount_point(place):
        raise OutputExistsError(
            f"{output} is a mount point, which cannot be replaced. Choose a folder in it."
        )


def _foreign(place: Path, kind: Kind, found: Snapshot) -> list[str]:
    """What is in a folder that its record does not prove to be ours."""
    try:
        if not stat.S_ISREG((place / kind.file).stat().st_mode):
            raise ValueError("it is no regular file")
        records = kind.read(place / kind.file)
    except FileNotFoundError:
        return sorted(found)
    # Whatever else may be in a file of that name.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return [f"{kind.file}, which is no record of a {kind.name} ({error})", *sorted(found)]
    folders = {f"{parent.as_posix()}/" for name in records for parent in Path(name).parents}
    foreign = []
    device = place.stat().st_dev
    for name in sorted(found):
        entry = place / name
        if name == kind.file:
            continue
        if entry.lstat().st_dev != device:
            foreign.append(f"{name} (a mount point)")
        elif name.endswith("/") and name in folders:
            continue
        elif name not in records:
            foreign.append(name)
        elif not _is_as_recorded(entry, records[name]):
            foreign.append(f"{name} (changed since)")
    return foreign


def _is_as_recorded(path: Path, record: FileRecord) -> bool:
    try:
        found = path.stat()
        same = stat.S_ISREG(found.st_mode) and found.st_size == record.size
        return same and sha256(path) == record.sha256
    except OSError:
        return False


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
