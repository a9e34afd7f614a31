"""Where bundles are found: a directory of their own, or the cache, by hub id or checkpoint."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vistower.bundle.contents import Bundle, holds_bundle, is_directory, nothing_here
from vistower.bundle.manifest import CONFIG_FILE
from vistower.bundle.source_files import changed_sources
from vistower.errors import (
    BundleCorruptError,
    BundleError,
    BundleNotFoundError,
    OptionError,
    ProcessorConfigError,
)
from vistower.printable import printable

_HUB_ID = re.compile(r"\w[\w.-]*(?:/[\w.-]+)*(?:@.+)?/?")
"""An id, a subfolder and, after @, a revision; a trailing slash does not matter."""

_LONGEST_ID = 200
"""Its entry in the cache is a file name, of 255 bytes at most; a hub takes 96 for a name."""


def cache_directory() -> Path:
    """Where bundles are kept by id: ``VISTOWER_CACHE``, else ``vistower`` under the HF cache.

    The HF cache is ``HF_HOME``, else ``$XDG_CACHE_HOME/huggingface``, else
    ``~/.cache/huggingface``.

    Raises:
        OptionError: none of them is set, and the user has no home directory.
    """
    try:
        return _cache_directory()
    except RuntimeError as error:
        raise OptionError(
            f"There is no place for vistower's cache ({error}). Set VISTOWER_CACHE to a directory."
        ) from error


def _cache_directory() -> Path:
    if explicit := os.environ.get("VISTOWER_CACHE"):
        return Path(explicit).expanduser()
    if hf_home := os.environ.get("HF_HOME"):
        return Path(hf_home).expanduser() / "vistower"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "vistower"


def cache_path(model: str, revision: str | None = None) -> Path:
    """The cache directory's place for the bundle of a hub id or of a local checkpoint directory.

    A hub id may carry its revision, ``owner/name@revision``. A directory's place depends on its
    absolute path, so that two checkpoints of one name do not collide.
    """
    path = Path(model).expanduser()
    if is_directory(path):
        absolute = path.resolve()
        digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:12]
        # What a file system or a terminal cannot show, or is too long for both, is in the digest.
        name = os.fsencode(absolute.name)[:_LONGEST_ID].decode("utf-8", "ignore")
        return cache_directory() / f"local--{printable(name)[:_LONGEST_ID]}--{digest}"
    if revision is not None:
        model = f"{model}@{revision}"
    return cache_directory() / model.strip("/").replace("/", "--")


def find_bundle(model: str | os.PathLike[str]) -> Bundle:
    """Find the bundle of a model: its directory, or the cache's entry for a checkpoint or hub id.

    Nothing is downloaded or exported.

    Raises:
        BundleNotFoundError: there is none; the message holds the export command.
        BundleCorruptError: it was exported from an earlier state of the checkpoint directory, or
            it is damaged.
        OptionError: it is no text and no path.
    """
    text = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise OptionError(
            f"{model!r} names no model. Give a bundle's or checkpoint's directory, or a hub id."
        )
    if not text.strip():
        # Path("") is the working directory.
        raise BundleNotFoundError(
            f"{text!r} names no model. Give a bundle's or checkpoint's directory, or a hub id."
        )
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # No such user.
        raise BundleNotFoundError(f"{text!r} is no path here ({error}).") from error
    if not is_directory(path):
        an_id = _HUB_ID.fullmatch(text) is not None and len(text) <= _LONGEST_ID
        if not an_id or path.exists():
            raise BundleNotFoundError(
                f"There is no directory {str(path)!r}. Give a bundle's directory, or a hub id "
                f"whose bundle is in the cache {cache_directory()}."
            )
        return _cached_hub_bundle(text)
    if holds_bundle(path):
        return Bundle.load(path)
    if not (path / CONFIG_FILE).is_file():
        raise BundleNotFoundError(nothing_here(path))
    return _cached_checkpoint_bundle(path)


def _cached_hub_bundle(model: str) -> Bundle:
    hub_id = model.strip("/")
    name, _, revision = hub_id.partition("@")
    # Every family's record, which a bundle's own directory does not need.
    from vistower.backbones import BACKBONES

    backbone = BACKBONES.get(name)
    if backbone is not None:
        name = backbone.hub_id
    place = cache_path(name, revision or None)
    if not is_directory(place):
        parts = name.split("/")
        command = f"vistower export {'/'.join(parts[:2])}"
        command += f" --revision {revision}" if revision else ""
        command += f" --subfolder {'/'.join(parts[2:])}" if parts[2:] else ""
        raise BundleNotFoundError(
            f"There is no bundle of {hub_id!r} in the cache {cache_directory()}. Make it, where "
            f"torch is installed, with: {command}"
        )
    return Bundle.load(place)


def _cached_checkpoint_bundle(path: Path) -> Bundle:
    place = cache_path(str(path))
    command = f"vistower export {path}"
    if not is_directory(place):
        raise BundleNotFoundError(
            f"{path} is a checkpoint, and the cache {cache_directory()} has no bundle of it. "
            f"Make it, where torch is installed, with: {command}"
        )
    bundle = Bundle.load(place)
    if bundle.manifest is not None and (
        changed := changed_sources(path, bundle.manifest.source.files)
    ):
        raise BundleCorruptError(
            f"{path} changed after the bundle {place} was made from it: {', '.join(changed)}. Make "
            f"it again with: {command} --overwrite"
        )
    return bundle


def cached_bundles() -> Iterator[tuple[Path, Bundle | BundleError | ProcessorConfigError]]:
    """Every entry of the cache directory, sorted, with its bundle or what is wrong with it."""
    root = cache_directory()
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        try:
            yield path, Bundle.load(path)
        except BundleNotFoundError:
            continue
        except (BundleError, ProcessorConfigError) as error:
            yield path, error
