"""A model hub on loopback: the part of the hub's HTTP protocol that huggingface_hub speaks.

What it answers follows the real hub: a gated repository's listing is public and its files are
not; weights are redirected to a second address, as to a CDN, with their size and ETag in
``X-Linked-*`` headers; errors carry ``X-Error-Code``; a token it does not know is refused for
every repository. It lives for a bounded time and a bounded number of requests.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

Content = bytes | Path
LFS_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx")
ALWAYS = 10**9


def commit_sha(label: str) -> str:
    """A sha that looks like a commit's, the same for the same label."""
    return hashlib.sha1(label.encode()).hexdigest()


@dataclass
class Repo:
    """A repository: its commits, and which of them its branches and tags are at."""

    commits: dict[str, Mapping[str, Content]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False

    @classmethod
    def of(
        cls,
        files: Mapping[str, Content],
        *,
        label: str = "first",
        gated: bool = False,
        private: bool = False,
    ) -> Repo:
        """A repository with one commit, which its branch ``main`` is at."""
        sha = commit_sha(label)
        return cls({sha: files}, {"main": sha}, gated, private)

    @classmethod
    def of_directory(cls, directory: Path, *, gated: bool = False) -> Repo:
        """A repository that holds the files of a directory, read when they are asked for."""
        paths = [path for path in directory.rglob("*") if path.is_file()]
        files = {path.relative_to(directory).as_posix(): path for path in paths}
        return cls.of(files, gated=gated)

    def find(self, revision: str) -> tuple[str, Mapping[str, Content]] | None:
        """The commit a revision names, and its files."""
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass(frozen=True)
class Request:
    """One request the server got."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Faults:
    """What goes wrong; may be changed while the server runs.

    Attributes:
        status: path fragment → HTTP status of every answer to a path that has it.
        cuts: file name → how many more times its body is cut in the middle.
        silent: take requests and answer none.
        page: answer everything with an HTML page, as a captive portal does.
    """

    status: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    silent: bool = False
    page: bool = False


class HubServer:
    """The hub; a context manager.

    Args:
        repos: hub id → repository.
        tokens: each valid token → the gated and private repositories it may read.
        lifetime: seconds after which it stops by itself.
        max_requests: after these, every request is refused.
    """

    def __init__(
        self,
        repos: Mapping[str, Repo],
        *,
        tokens: Mapping[str, Iterable[str]] | None = None,
        lifetime: float = 120.0,
        max_requests: int = 1000,
    ) -> None:
        self.repos = dict(repos)
        self.tokens = {token: frozenset(granted) for token, granted in (tokens or {}).items()}
        self.max_requests = max_requests
        self.faults = Faults()
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.stopped = threading.Event()

        class Handler(_Handler):
            pass

        Handler.hub = self
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._timer = threading.Timer(lifetime, self.stop)
        self._timer.daemon = True

    @property
    def endpoint(self) -> str:
        """The address to set ``HF_ENDPOINT`` to."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering and close the port; a second call does nothing."""
        with self.lock:
            if self.stopped.is_set():
                return
            self.stopped.set()
        self._timer.cancel()
        self._http.shutdown()
        # Not joined: a connection kept alive by a client would hold its thread until it closes.
        self._http.block_on_close = False
        self._http.server_close()

    def downloaded(self) -> list[str]:
        """Names of the files whose bytes were asked for, in order, once for each time."""
        return [
            request.path.rpartition("/")[2]
            for request in self.requests
            if request.method == "GET"
            and (
                request.path.startswith("/cdn/")
                or ("/resolve/" in request.path and not request.path.endswith(LFS_SUFFIXES))
            )
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the test run's output clean; the log is ``HubServer.requests``."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
            count = len(self.hub.requests)
        faults = self.hub.faults
        fault = next((code for part, code in faults.status.items() if part in path), None)
        if faults.silent:
            self.hub.stopped.wait(20)
            self.close_connection = True
        elif count > self.hub.max_requests:
            self._error(503, None, "more requests than the test allows")
        elif faults.page:
            self._send(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
        elif fault is not None:
            self._error(fault, None, "a fault of the test")
        elif token is not None and token not in self.hub.tokens:
            self._error(401, None, "Invalid credentials in Authorization header")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._info(match[1], match[2], token)
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            self._file(self.hub.repos[match[1]].commits[match[2]][match[3]], match[3], {})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)", path):
            revision, name = self._split(match[1], match[2])
            self._resolve(match[1], revision, name, token)
        else:
            self._error(404, None, "Not Found")

    def _info(self, repo_id: str, revision: str, token: str | None) -> None:
        repo = self._visible(repo_id, token)
        if repo is None:
            return
        if (found := repo.find(revision)) is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        sha, files = found
        info = {
            "id": repo_id,
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "siblings": [{"rfilename": name} for name in sorted(files)],
        }
        self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _split(self, repo_id: str, path: str) -> tuple[str, str]:
        """A revision and a file's path; both may have slashes."""
        repo = self.hub.repos.get(repo_id)
        for revision in (*repo.refs, *repo.commits) if repo else ():
            if path.startswith(f"{revision}/"):
                return revision, path.removeprefix(f"{revision}/")
        revision, _, name = path.rpartition("/")
        return revision, name

    def _visible(self, repo_id: str, token: str | None) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        granted = self.hub.tokens.get(token or "", frozenset())
        if repo is None or (repo.private and repo_id not in granted):
            # Without a token the real hub does not tell whether a repository exists.
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _resolve(self, repo_id: str, revision: str, name: str, token: str | None) -> None:
        repo = self._visible(repo_id, token)
        if repo is None:
            return
        if repo.gated and repo_id not in self.hub.tokens.get(token or "", frozenset()):
            message = f"Access to model {repo_id} is restricted."
            self._error(403 if token else 401, "GatedRepo", message)
            return
        if (found := repo.find(revision)) is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        sha, files = found
        if name not in files:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_digest(files[name])}"'}
        if name.endswith(LFS_SUFFIXES):
            headers["X-Linked-ETag"] = headers["ETag"]
            headers["X-Linked-Size"] = str(_size(files[name]))
            # By another host name, as a CDN has: huggingface_hub follows redirects to the hub's own
            # itself, and sends its token to no other.
            cdn = self.hub.endpoint.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{cdn}/cdn/{repo_id}/{sha}/{name}"
            self._send(302, headers, b"")
        else:
            self._file(files[name], name, headers)

    def _file(self, content: Content, name: str, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else content.read_bytes()
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        with self.hub.lock:
            cut = self.command == "GET" and self.hub.faults.cuts.get(name, 0) > 0
            if cut:
                self.hub.faults.cuts[name] -= 1
        # Never past the middle of the file, so that resuming does not outwit a lasting fault.
        end = max(start, len(data) // 2) if cut else len(data)
        self._send(206 if start else 200, headers, data[start:], sent=end - start)

    def _error(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None
    ) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"} | (headers or {})
        if code is not None:
            headers["X-Error-Code"] = code
        self._send(status, headers, json.dumps({"error": message}).encode())

    def _send(
        self, status: int, headers: Mapping[str, str], body: bytes, *, sent: int | None = None
    ) -> None:
        with suppress(ConnectionError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body if sent is None else body[:sent])
        if sent is not None and sent < len(body):
            self.close_connection = True


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _digest(content: Content) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha256(data).hexdigest()
