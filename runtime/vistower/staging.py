"""Writing folders and files so that a place holds the old whole thing or the new whole thing.

What is made for ``dir/NAME`` lies in the hidden folder ``dir/.NAME.vistower-staging`` until it is
complete, and is then renamed. A lock in that folder tells a live process's from what a killed one
left: two processes never write to one output at a time, and leftovers are cleaned by the next one
that writes to the same directory, which first puts back what was only moved aside.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vistower.errors import OutputError, OutputExistsError
from vistower.interrupts import held
from vistower.places import (
    Snapshot,
    as_output_error,
    exchange,
    remove,
    require_as_it_was,
    snapshot,
    sync,
    sync_directory,
)

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("vistower")

SUFFIX = ".vistower-staging"
_LOCK = "lock"
_LOCK_TEXT = "vistower, process "
_NEW = "new"
_OLD = "old"
_PLAN = "plan.json"
_DONE = "done.json"
_LONGEST_NAME = 255
"""Bytes of a file's name, on every file system in use."""

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
"""What ``flock`` says on a file system without locks."""


@dataclass(frozen=True)
class Staging:
    """The staging folder of outputs in one directory; made by `staged`."""

    place: Path
    outputs: Sequence[Path]

    def path(self, output: Path) -> Path:
        """Where to make an output; nothing is there yet."""
        return self.place / _NEW / output.name

    def publish(self, replaced: Mapping[Path, Snapshot] | None = None) -> None:
        """Put what was made into its place.

        Of one output the old one is there until the new one is. Of several, the last one is
        absent while the others change.

        Args:
            replaced: `snapshot` of every output that may be replaced, as it was when that was
                decided.

        Raises:
            OutputExistsError: something else is at an output now.
            OutputError: the system refuses.
        """
        replaced = replaced or {}
        last = self.outputs[-1]
        with as_output_error(last):
            for output in self.outputs:
                require_as_it_was(output, output, replaced.get(output, {}))
                sync(self.path(output))
            names = [output.name for output in self.outputs]
            files = {*replaced.get(last, {}), *snapshot(self.path(last))} - {""}
            plan = {"outputs": names, "files": sorted(files)}
            (self.place / _PLAN).write_text(json.dumps(plan), encoding="ascii")
            try:
                if len(self.outputs) > 1:
                    self._replace_several()
                else:
                    self._replace(last, replaced.get(last, {}))
            except BaseException:
                tidy(self.place)
                raise
            sync_directory(last.parent)

    def _replace(self, output: Path, replaced: Snapshot) -> None:
        new, old = self.path(output), self.place / _OLD / output.name
        if not new.is_dir() or not replaced:
            _rename(new, output)
            return
        try:
            exchange(new, output)
        except OSError as error:
            if error.errno not in {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}:
                raise
            output.rename(old)
            _rename(new, output)
        else:
            new.rename(old)
        try:
            require_as_it_was(output, old, replaced)
        except BaseException:
            output.rename(new)
            old.rename(output)
            raise

    def _replace_several(self) -> None:
        for output in reversed(self.outputs):
            if os.path.lexists(output):
                output.rename(self.place / _OLD / output.name)
        for output in self.outputs:
            _rename(self.path(output), output)


@contextmanager
def staged(*outputs: Path) -> Iterator[Staging]:
    """The staging folder of outputs in one directory, which is made if need be.

    It is gone afterwards, with everything that was not published.

    Raises:
        OutputError: the directory cannot be written, or another process is writing the output.
    """
    output = outputs[-1]
    with as_output_error(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        # A name too long, say, is one now and not after the work.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(output)
        clean(output.parent, but=output)
    lock = None
    try:
        with as_output_error(output):
            with held():
                place, lock = _acquire(output)
            tidy(place)
            for name in (_NEW, _OLD):
                (place / name).mkdir(exist_ok=True)
        yield Staging(place, outputs)
    finally:
        if lock is not None:
            _release(place, lock)


def clean(directory: Path, *, but: Path | None = None) -> None:
    """Remove what killed processes left in a directory, and put back what they moved aside.

    Args:
        directory: where outputs are.
        but: an output whose staging folder is left alone.
    """
    for place in sorted(directory.glob(f".*{SUFFIX}")):
        mine = but is not None and place.name == staging_name(but.name)
        if mine or place.is_symlink() or not place.is_dir():
            continue
        # Another user's, a read-only one, gone, or somebody else's folder of that name.
        with contextlib.suppress(OSError):
            if not any(place.iterdir()):
                place.rmdir()
            elif (lock := _lock(place, create=False)) is not None:
                _release(place, lock)


def staging_name(name: str) -> str:
    """What the staging folder of an output is called."""
    whole = f".{name}{SUFFIX}"
    if len(os.fsencode(whole)) <= _LONGEST_NAME:
        return whole
    encoded = os.fsencode(name)
    start = encoded[:160].decode("utf-8", "ignore")
    return f".{start}-{hashlib.sha256(encoded).hexdigest()[:16]}{SUFFIX}"


def _acquire(output: Path) -> tuple[Path, int]:
    place = output.parent / staging_name(output.name)
    for _ in range(100):
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)
        # Not found: the process that had it ended between two of our steps.
        with contextlib.suppress(FileNotFoundError):
            if place.is_symlink() or not place.is_dir() or not _is_ours(place):
                raise OutputExistsError(
                    f"{place} is where {output} would be made, and vistower did not make it. Move "
                    f"it away."
                )
            if (lock := _lock(place, create=True)) is not None:
                return place, lock
            raise OutputError(
                f"{output} is being written by another process ({_owner(place)}). Wait until it "
                f"has ended, or choose another output. If it ended long ago, remove {place}."
            )
    raise OutputError(f"{place} comes and goes, and cannot be locked. Choose another output.")


def _is_ours(place: Path) -> bool:
    names = {entry.name for entry in place.iterdir()}
    return not names or (_LOCK in names and names <= {_LOCK, _NEW, _OLD, _PLAN, _DONE})


def _owner(place: Path) -> str:
    try:
        return (place / _LOCK).read_text(encoding="utf-8", errors="replace")[:80]
    except OSError:
        return "of which nothing is known"


def _lock(place: Path, *, create: bool) -> int | None:
    """Lock a staging folder; None where a live process has it.

    Raises:
        FileNotFoundError: it was removed meanwhile.
    """
    lock = os.open(place / _LOCK, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    try:
        known = os.read(lock, len(_LOCK_TEXT)).decode("utf-8", "replace")
        if not _LOCK_TEXT.startswith(known):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(place / _LOCK))
        if not _flock(lock):
            os.close(lock)
            return None
        # Whoever had it may have removed it between our two steps.
        if not os.path.samestat(os.fstat(lock), (place / _LOCK).stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))
        # On a full disk it stays empty, and the work will say so.
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
            os.lseek(lock, 0, os.SEEK_SET)
            os.write(lock, f"{_LOCK_TEXT}{os.getpid()}".encode())
    except BaseException:
        os.close(lock)
        raise
    return lock


def _flock(lock: int) -> bool:
    """Lock a file; False where another process has it, or where it cannot be told."""
    if sys.platform != "win32":
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        else:
            return True
    # Without locks a folder that is there may be a live process's.
    return os.fstat(lock).st_size == 0


def tidy(place: Path) -> None:
    """Undo what was published by half, and remove what lies in a staging folder; it is locked.

    Raises:
        OutputExistsError: what was moved aside holds something that is not ours.
    """
    if (outputs := _read(place / _PLAN)[0]) and not os.path.lexists(place.parent / outputs[-1]):
        for name in outputs:
            if os.path.lexists(place / _OLD / name):
                (place / _OLD / name).replace(place.parent / name)
            elif not os.path.lexists(place / _NEW / name):
                (place.parent / name).unlink(missing_ok=True)
    # From here on the old one is deleted, and no longer whole.
    if outputs:
        (place / _PLAN).replace(place / _DONE)
    (place / _PLAN).unlink(missing_ok=True)
    outputs, files = _read(place / _DONE)
    for kept in (_NEW, _OLD):
        for name in outputs:
            remove(place / kept / name, files)
    shutil.rmtree(place / _NEW, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        (place / _OLD).rmdir()
    (place / _DONE).unlink(missing_ok=True)


def _read(plan: Path) -> tuple[list[str], list[str]]:
    """The outputs that were being published, and the files that may be deleted then."""
    try:
        read = json.loads(plan.read_text(encoding="ascii"))
        outputs, files = read["outputs"], read["files"]
    # Cut off while it was written: nothing had been moved.
    except (OSError, ValueError, KeyError, TypeError):
        return [], []
    return [Path(name).name for name in outputs], [x for x in files if ".." not in Path(x).parts]


def _release(place: Path, lock: int) -> None:
    if sys.platform == "win32":  # An open file cannot be deleted there.
        os.close(lock)
    try:
        _leave(place)
    # A signal that comes now must not keep what is half removed.
    except BaseException:
        _leave(place)
        raise
    finally:
        if sys.platform != "win32":
            os.close(lock)


def _leave(place: Path) -> None:
    """Remove a staging folder as far as that can be; it is locked."""
    try:
        tidy(place)
        (place / _LOCK).unlink(missing_ok=True)
        place.rmdir()
    except OSError as error:
        # Another process may have it already.
        if error.errno not in {errno.ENOENT, errno.ENOTEMPTY}:
            logger.warning("%s is left over: %s", place, error.strerror or error)


def _rename(new: Path, output: Path) -> None:
    try:
        new.replace(output)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}:
            raise
        raise OutputExistsError(
            f"{output} was made by something else meanwhile, and is left as it is. Choose another "
            f"output."
        ) from error
