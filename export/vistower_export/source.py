"""Where a checkpoint comes from: a local directory, or the hub through huggingface_hub.

Nothing here imports torch or transformers: a wrong name fails before a slow import. The hub is
the one huggingface_hub is configured for (``HF_ENDPOINT``), as are its cache and saved login.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub import __version__ as hub_version
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vistower.backbones import find_backbone
from vistower.errors import (
    CheckpointAccessError,
    CheckpointError,
    CheckpointNotFoundError,
    ExportError,
    HubUnreachableError,
    UnsupportedArchitectureError,
)
from vistower_export.checkpoint import is_random_weight

CONFIG = "config.json"
PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
"""Files transformers reads an image processor from. Which one counts is its own affair: 5 takes an
``image_processor`` section of the second first, 4.57 the first file first."""
_NO_PROCESSOR = " and no ".join(PROCESSOR_CONFIGS)
# In order of preference; an index names the shards it stands for.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# The HTTP client is requests below huggingface_hub 1, httpx or a fork of it from 1 on; the hub's
# own error derives from that client's. requests' errors are OSErrors, httpx's are not. A
# ValueError is an answer that is no JSON (a proxy's login page), or a malformed hub id.
_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_FAILURES = (OSError, _CLIENT_ERROR, ValueError)
_ATTEMPTS = 4
_PAUSE_SECONDS = 0.3
# Where huggingface_hub tries a file again, it does so five times in about half a minute: after a
# server's error in every version, after a connection that was cut from 1.0 on.
_HUB_RETRIES = int(hub_version.split(".")[0]) >= 1
_COMMIT_SHA = re.compile(r"[0-9a-f]{40}")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk and where it came from.

    Attributes:
        directory: holds ``config.json``, one of `PROCESSOR_CONFIGS` or both, and the weights.
        source: the hub id, or the local directory's absolute path.
        name: last component of ``source``, e.g. ``clip-vit-base-patch32``.
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
        token: access token for the hub; None uses ``HF_TOKEN`` or the saved login.
        cache_dir: None uses huggingface_hub's cache.
        offline: use the cache only and touch no network; ``HF_HUB_OFFLINE`` does the same.

    Raises:
        CheckpointNotFoundError: no such directory, repository or revision.
        CheckpointAccessError: a gated or private repository, or a refused token.
        HubUnreachableError: offline with nothing cached, or the hub refused, cut or failed.
        CheckpointError: a file is missing or damaged.
        ExportError: the cache cannot be written.
    """
    path = Path(model).expanduser() if model else None
    if path is not None and path.is_dir():
        return _local_checkpoint(path, revision)
    repo_id = _hub_id(model, path)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        # An HTTP client would refuse it too, and quote it in its error.
        raise CheckpointAccessError(
            "The token holds spaces, line breaks or characters outside ASCII, which no token does. "
            "Give it as it is shown in the account's settings."
        )
    hub = _Hub(repo_id, revision, token, cache_dir)
    directory = hub.cached() if offline or constants.HF_HUB_OFFLINE else hub.download()
    config = _check_files(directory, str(hub))
    return Checkpoint(
        directory=directory,
        source=repo_id,
        name=repo_id.rpartition("/")[2],
        revision=directory.name,
        random_weight=is_random_weight(config),
    )


def _local_checkpoint(path: Path, revision: str | None) -> Checkpoint:
    # Not resolve(): a symbolic link's own name is the one the user knows the model by.
    directory = Path(os.path.abspath(path))  # noqa: PTH100
    if revision is not None:
        raise CheckpointNotFoundError(
            f"Revision {revision!r} was asked of {str(directory)!r}, which is a local directory "
            "and has no revisions. Leave the revision out, or give a hub id."
        )
    config = _check_files(directory, f"Checkpoint directory {str(directory)!r}")
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


class _MissingFileError(CheckpointError):
    """A checkpoint lacks a file, as against having a damaged one."""


@dataclass(frozen=True, repr=False)  # No repr: it would show the token.
class _Hub:
    """One repository at one revision."""

    repo_id: str
    revision: str | None
    token: str | None
    cache_dir: Path | None

    def download(self) -> Path:
        """Bring the needed files into the cache; return their directory, named by the commit."""
        commit, names = self._list()
        self._require(CONFIG in names, CONFIG, names)
        processors = [name for name in PROCESSOR_CONFIGS if name in names]
        self._require(bool(processors), _NO_PROCESSOR, names)
        weights = next((name for name in WEIGHTS if name in names), None)
        self._require(weights is not None, "safetensors or PyTorch weights", names)
        directory = self._fetch(CONFIG, commit).parent
        for name in processors:
            self._fetch(name, commit)
        for name in _with_shards(weights or "", lambda name: self._fetch(name, commit)):
            self._require(name in names, name, names)
            self._fetch(name, commit)
        if not _COMMIT_SHA.fullmatch(self._asked):
            # By its branch's name, so that huggingface_hub notes which commit the branch is at:
            # that is how the branch is found offline. Fetches nothing that is already there.
            self._fetch(CONFIG, self._asked)
        return directory

    def cached(self) -> Path:
        """Return the cached directory of the revision without touching the network."""
        try:
            config = hf_hub_download(
                self.repo_id,
                CONFIG,
                revision=self._asked,
                cache_dir=self.cache_dir,
                local_files_only=True,
            )
            _check_files(Path(config).parent, str(self))
        except HFValidationError as error:
            self._fail(error)
        except (LocalEntryNotFoundError, _MissingFileError) as error:
            found = "only in part" if isinstance(error, _MissingFileError) else "not"
            raise HubUnreachableError(
                f"{self} was asked for offline, and it is {found} in the cache "
                f"({self.cache_dir or constants.HF_HUB_CACHE}). Run `vistower export "
                f"{self.repo_id}{self._option}` once online (without --offline and "
                "HF_HUB_OFFLINE), or give a local checkpoint directory."
            ) from error
        return Path(config).parent

    @property
    def _asked(self) -> str:
        return self.revision or constants.DEFAULT_REVISION

    @property
    def _option(self) -> str:
        return f" --revision {self.revision}" if self.revision else ""

    def __str__(self) -> str:
        at = f" at revision {self.revision!r}" if self.revision else ""
        return f"Checkpoint {self.repo_id!r}{at}"

    def _list(self) -> tuple[str, frozenset[str]]:
        api = HfApi(token=self.token)
        info = self._attempt(
            lambda: api.model_info(
                self.repo_id, revision=self._asked, timeout=constants.HF_HUB_ETAG_TIMEOUT
            ),
            _is_transient,
        )
        if info.sha is None:
            raise HubUnreachableError(
                f"{self}: {constants.ENDPOINT} answered without a commit sha. "
                "Check that HF_ENDPOINT names a model hub."
            )
        return info.sha, frozenset(sibling.rfilename for sibling in info.siblings or ())

    def _fetch(self, name: str, revision: str) -> Path:
        return Path(
            self._attempt(
                lambda: hf_hub_download(
                    self.repo_id,
                    name,
                    revision=revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                ),
                _was_cut,
            )
        )

    def _require(self, present: bool, what: str, names: Iterable[str]) -> None:
        if not present:
            raise CheckpointError(
                f"{self} has no {what}. The repository holds: {_some(names)}. "
                "Choose one that holds a Hugging Face checkpoint."
            )

    def _attempt(self, request: Callable[[], _T], again: Callable[[Exception], bool]) -> _T:
        attempt = 0
        while True:
            attempt += 1
            try:
                return request()
            except _FAILURES as error:
                if attempt == _ATTEMPTS or not again(error):
                    self._fail(error)
            time.sleep(_PAUSE_SECONDS * attempt)

    def _fail(self, error: Exception) -> NoReturn:
        """Raise the exception of ours that tells the user what to do about this one."""
        response = _response_error(error)
        status = response.response.status_code if response is not None else None
        token = "the given token" if self.token else "the token of HF_TOKEN or of the saved login"
        if isinstance(error, HFValidationError):
            raise CheckpointNotFoundError(
                f"{self.repo_id!r} is neither an existing directory nor a valid hub id "
                f"(owner/name): {error}"
            ) from error
        if isinstance(response, GatedRepoError):
            raise CheckpointAccessError(
                f"{self} is gated and the hub refused it (HTTP {status}). Request access on the "
                f"model's page, {constants.ENDPOINT}/{self.repo_id}, and wait until it is "
                "granted; then give that account's token with --token or HF_TOKEN, or log in "
                "with `hf auth login`."
            ) from error
        if isinstance(response, RevisionNotFoundError):
            raise CheckpointNotFoundError(
                f"{self}: the repository exists, the revision does not. Give a branch, a tag or "
                "a full commit sha, or leave the revision out."
            ) from error
        if isinstance(response, RepositoryNotFoundError):
            raise CheckpointNotFoundError(
                f"{self}: the hub has no such repository, or it is private (HTTP {status}). Check "
                "the spelling; for a private one give a token with --token or HF_TOKEN, or log "
                "in with `hf auth login`."
            ) from error
        if status == 401:
            raise CheckpointAccessError(
                f"{self}: the hub refused {token} (HTTP 401); it is wrong or has expired. Make a "
                "new one in the account's settings and give it with --token or HF_TOKEN, or log "
                "in again with `hf auth login`."
            ) from error
        if status == 403:
            raise CheckpointAccessError(
                f"{self}: the hub refused access (HTTP 403); {token} may lack the permission to "
                "read this repository. Give one that has it with --token or HF_TOKEN."
            ) from error
        if isinstance(error, OSError) and error.errno is not None and _is_local(error):
            raise ExportError(
                f"{self} cannot be saved in the cache ({self.cache_dir or constants.HF_HUB_CACHE}):"
                f" {error}. Free some space, or choose another place with HF_HOME."
            ) from error
        found = f"HTTP {status}" if status is not None else _summary(error)
        raise HubUnreachableError(
            f"{self}: {constants.ENDPOINT} could not be reached, cut the connection or failed "
            f"({found}). Nothing incomplete is used. Check the network and HF_ENDPOINT and run "
            "the same command again: what was already fetched is kept. If the checkpoint is in "
            "the cache, --offline uses it."
        ) from error


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response_error(error: Exception) -> Any:
    """The error in the chain that carries the server's answer (``.response``), or None."""
    # huggingface_hub hides the answer to a file's HEAD request behind a LocalEntryNotFoundError,
    # and below 1.0 leaves a 503 it gave up on as the client's own error.
    for link in _chain(error):
        if isinstance(link, _CLIENT_ERROR) and getattr(link, "response", None) is not None:
            return link
    return None


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OfflineModeIsEnabled | HFValidationError):
        return False
    if (response := _response_error(error)) is not None:
        return bool(response.response.status_code >= 500)
    return not (isinstance(error, OSError) and error.errno is not None and _is_local(error))


def _was_cut(error: Exception) -> bool:
    """Tell whether a download may be resumed that huggingface_hub has not resumed itself."""
    return not _HUB_RETRIES and _response_error(error) is None and _is_transient(error)


def _is_local(error: OSError) -> bool:
    return not isinstance(error, ConnectionError | TimeoutError | _CLIENT_ERROR)


def _summary(error: Exception) -> str:
    *_, root = _chain(error)
    return f"{type(root).__name__}: {str(root).strip() or 'no details'}".splitlines()[0]


def _with_shards(weights: str, path_of: Callable[[str], Path]) -> Sequence[str]:
    """Names of the files that make up ``weights``: itself, or an index and its shards."""
    if not weights.endswith(".index.json"):
        return (weights,)
    index = _read_json(path_of(weights))
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise _damaged(path_of(weights), "names no shards (no weight_map)")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{weights} names a shard outside its directory: {name!r}. Do not use this "
                "checkpoint."
            )
    return (weights, *names)


def _check_files(directory: Path, what: str) -> dict[str, Any]:
    """Check that a directory holds a complete checkpoint; return its ``config.json``."""
    names = sorted(entry.name for entry in directory.iterdir())

    def require(name: str) -> Path:
        if name not in names:
            raise _MissingFileError(
                f"{what} has no {name}. It holds: {_some(names)}. Complete it, or give another "
                "checkpoint."
            )
        return directory / name

    config = _read_json(require(CONFIG))
    processors = [name for name in PROCESSOR_CONFIGS if name in names]
    for name in processors:
        _read_json(directory / name)
    if not processors:
        require(_NO_PROCESSOR)
    weights = next((name for name in WEIGHTS if name in names), None)
    if weights is None:
        raise _MissingFileError(
            f"{what} has no weights: none of {', '.join(WEIGHTS)}. It holds: {_some(names)}. "
            "Complete it, or give another checkpoint."
        )
    for name in _with_shards(weights, require):
        _check_weights(require(name))
    return config


def _check_weights(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(b"version "):
            raise CheckpointError(
                f"{str(path)!r} is a Git LFS pointer, not weights. Run `git lfs pull` there."
            )
        if size == 0:
            raise _damaged(path, "is empty")
        if path.suffix != ".safetensors":
            return
        # The format: an unsigned 64-bit length, a JSON header of that length, the tensors' bytes.
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > size - 8:
            raise _damaged(path, f"has {size} bytes, too few for its header of {length}")
        try:
            header = json.loads(file.read(length))
            tensors = [entry for key, entry in header.items() if key != "__metadata__"]
            expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _damaged(path, f"has an unreadable header ({error})") from error
    if size != expected:
        raise _damaged(path, f"has {size} bytes and its header promises {expected}")


def _damaged(path: Path, found: str) -> CheckpointError:
    # Resolved: in the hub's cache the file to delete is the one behind the symbolic link.
    return CheckpointError(
        f"{str(path.resolve())!r} {found}: it was cut off or changed. Delete it and fetch the "
        "checkpoint again."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"should hold a JSON object and holds a {type(content).__name__}")
    return content


def _some(names: Iterable[str], limit: int = 12) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (", ".join(ordered[:limit]) or "nothing") + more
