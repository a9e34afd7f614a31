"""Where a checkpoint comes from: a local directory, or the hub.

Nothing here imports torch or transformers: a wrong name fails before a slow import.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import constants

from vistower.backbones import find_backbone
from vistower.errors import (
    CheckpointAccessError,
    CheckpointNotFoundError,
    UnsupportedArchitectureError,
)
from vistower_export.checkpoint import is_random_weight
from vistower_export.files import CONFIG, check_files, some
from vistower_export.hub import Hub


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk and where it came from.

    Attributes:
        directory: holds ``config.json``, the processor's config and the weights.
        source: the local directory's absolute path, or the hub id, with the subfolder after it.
        name: last component of the directory or hub id, e.g. ``clip-vit-base-patch32``.
        revision: the resolved commit sha of a hub id; None for a local directory.
        random_weight: whether the checkpoint is labelled as a random-weight one.
    """

    directory: Path
    source: str
    name: str
    revision: str | None
    random_weight: bool


def resolve_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
) -> Checkpoint:
    """Find a checkpoint, download what is missing of it, and check that it is complete.

    Of a hub repository only the configs that transformers reads and one set of weights are
    downloaded: safetensors, or ``pytorch_model*.bin`` where there are none. Files already in the
    cache are not fetched again. A hub that cannot be reached is an error even if the cache could
    serve: only ``offline`` accepts a revision that may be out of date.

    Args:
        model: a checkpoint directory, a hub id ``owner/name``, or a name from
            :data:`vistower.backbones.BACKBONES`.
        revision: branch, tag or commit sha on the hub; None is the default branch.
        subfolder: where in the directory or repository the checkpoint lies, e.g.
            ``image_encoder``; None is the top.
        token: access token for the hub; None uses ``HF_TOKEN`` or the saved login.
        cache_dir: None uses huggingface_hub's cache.
        offline: use the cache only and touch no network; ``HF_HUB_OFFLINE`` does the same.

    Raises:
        CheckpointNotFoundError: no such directory, repository, revision or subfolder.
        CheckpointAccessError: a gated or private repository, or a refused token.
        HubUnreachableError: offline with nothing cached, or the hub refused, cut or failed.
        CheckpointError: a file is missing or damaged.
        ExportError: the cache cannot be written.
    """
    path = Path(model).expanduser() if model else None
    folder = _relative(subfolder)
    if path is not None and path.is_dir():
        return _local_checkpoint(path, folder, revision)
    repo_id = _hub_id(model, path)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        # An HTTP client would refuse it too, and quote it in its error.
        raise CheckpointAccessError(
            "The token holds spaces, line breaks or characters outside ASCII, which no token does. "
            "Give it as it is shown in the account's settings."
        )
    hub = Hub(repo_id, revision, folder, token, cache_dir)
    cached = offline or constants.HF_HUB_OFFLINE
    directory, commit = hub.cached() if cached else hub.download()
    config = check_files(directory, str(hub))
    return Checkpoint(
        directory=directory,
        source=f"{repo_id}/{folder}" if folder else repo_id,
        name=repo_id.rpartition("/")[2],
        revision=commit,
        random_weight=is_random_weight(config),
    )


def _relative(subfolder: str | None) -> str:
    """A subfolder as the hub writes it, empty for none."""
    folder = PurePosixPath((subfolder or "").replace("\\", "/"))
    if folder.is_absolute() or ".." in folder.parts:
        raise CheckpointNotFoundError(
            f"The subfolder {subfolder!r} does not lie in the checkpoint. Give the folder's path "
            f"from its top, e.g. image_encoder."
        )
    return "" if folder == PurePosixPath() else str(folder)


def _local_checkpoint(path: Path, subfolder: str, revision: str | None) -> Checkpoint:
    # Not resolve(): a symbolic link's own name is the one the user knows the model by.
    directory = Path(os.path.abspath(path / subfolder))  # noqa: PTH100
    if not directory.is_dir():
        folders = some(entry.name for entry in path.iterdir() if entry.is_dir())
        raise CheckpointNotFoundError(
            f"{str(path)!r} has no subfolder {subfolder!r}. Its folders: {folders}."
        )
    if revision is not None:
        raise CheckpointNotFoundError(
            f"Revision {revision!r} was asked of {str(directory)!r}, which is a local directory "
            "and has no revisions. Leave the revision out, or give a hub id."
        )
    config = check_files(directory, f"Checkpoint directory {str(directory)!r}")
    return Checkpoint(
        directory=directory,
        source=str(directory),
        name=directory.name,
        revision=None,
        random_weight=is_random_weight(config),
    )


def _hub_id(model: str, path: Path | None) -> str:
    if path is None:
        raise CheckpointNotFoundError(
            "An empty model name was given. Give a checkpoint directory or a hub id (owner/name)."
        )
    if path.exists():
        raise CheckpointNotFoundError(
            f"{model!r} is a file. Give the directory that holds {CONFIG} and the weights."
        )
    if model.startswith((".", "/", "~")) or model.endswith("/") or "\\" in model:
        raise CheckpointNotFoundError(
            f"The checkpoint directory {model!r} does not exist (looked in "
            f"{os.path.abspath(path)!r}). Check the path; a hub id is written owner/name."  # noqa: PTH100
        )
    if "/" in model:
        return model
    try:
        return find_backbone(model).hub_id
    except UnsupportedArchitectureError as error:
        raise CheckpointNotFoundError(
            f"{model!r} is neither a directory here nor a hub id (owner/name) nor a known name. "
            f"{error}"
        ) from error
