"""A repository on the hub, through huggingface_hub: what a checkpoint needs of it, in the cache.

The hub is the one huggingface_hub is configured for (``HF_ENDPOINT``), as are its cache and saved
login.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
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

from vistower.errors import (
    CheckpointAccessError,
    CheckpointNotFoundError,
    ExportError,
    HubUnreachableError,
)
from vistower_export.files import CONFIG, lacking, needed, refuse_adapter

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


@dataclass(frozen=True, repr=False)  # No repr: it would show the token.
class Hub:
    """One repository at one revision."""

    repo_id: str
    revision: str | None
    subfolder: str
    token: str | None
    cache_dir: Path | None

    def download(self) -> tuple[Path, str]:
        """Bring the needed files into the cache; return their directory and the commit.

        Raises:
            CheckpointNotFoundError, CheckpointAccessError, HubUnreachableError, CheckpointError,
            ExportError: see `vistower_export.source.resolve_checkpoint`.
        """
        commit, names = self._list()
        refuse_adapter(str(self), names)
        files, missing = needed(names, lambda name: self._fetch(name, commit))
        if missing:
            raise lacking(str(self), missing, names)
        directory = self._fetch(CONFIG, commit).parent
        for name in files:
            self._fetch(name, commit)
        if not _COMMIT_SHA.fullmatch(self._asked):
            # By its branch's name, so that huggingface_hub notes which commit the branch is at:
            # that is how the branch is found offline. Fetches nothing that is already there.
            self._fetch(CONFIG, self._asked)
        return directory, commit

    def cached(self) -> tuple[Path, str]:
        """Return the cached directory of the revision, and its commit, without any network.

        Raises:
            HubUnreachableError: it is not in the cache, or only in part.
        """
        try:
            config = hf_hub_download(
                self.repo_id,
                self._path(CONFIG),
                revision=self._asked,
                cache_dir=self.cache_dir,
                local_files_only=True,
            )
        except HFValidationError as error:
            self._fail(error)
        except LocalEntryNotFoundError as error:
            raise self._uncached("not") from error
        directory = Path(config).parent
        names = {entry.name for entry in directory.iterdir()}
        _, missing = needed(names, lambda name: directory / name)
        if missing:
            raise self._uncached("only in part") from lacking(str(self), missing, names)
        return directory, (directory, *directory.parents)[len(Path(self.subfolder).parts)].name

    def _uncached(self, found: str) -> HubUnreachableError:
        return HubUnreachableError(
            f"{self} was asked for offline, and it is {found} in the cache "
            f"({self.cache_dir or constants.HF_HUB_CACHE}). Run `vistower export "
            f"{self.repo_id}{self._options}` once online (without --offline and "
            "HF_HUB_OFFLINE), or give a local checkpoint directory."
        )

    @property
    def _asked(self) -> str:
        return self.revision or constants.DEFAULT_REVISION

    @property
    def _options(self) -> str:
        revision = f" --revision {self.revision}" if self.revision else ""
        return revision + (f" --subfolder {self.subfolder}" if self.subfolder else "")

    def __str__(self) -> str:
        at = f" at revision {self.revision!r}" if self.revision else ""
        folder = f", folder {self.subfolder!r}," if self.subfolder else ""
        return f"Checkpoint {self.repo_id!r}{at}{folder}"

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

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
        paths = [sibling.rfilename for sibling in info.siblings or ()]
        start = self._path("")
        return info.sha, frozenset(x.removeprefix(start) for x in paths if x.startswith(start))

    def _fetch(self, name: str, revision: str) -> Path:
        return Path(
            self._attempt(
                lambda: hf_hub_download(
                    self.repo_id,
                    self._path(name),
                    revision=revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                ),
                _was_cut,
            )
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
