"""Runs of the command line in fresh processes, started in milliseconds, and stopped at any moment.

A process that has done the imports forks one child a run. The child sets its own limits, and is
the command line from its start to its end: handlers, exit code, standard error. Only the time
its imports take is missing; `started` runs it without a nursery, imports and all.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

EXPORTER = ("torch", "transformers", "vistower.cli", "vistower_export.steps")


@dataclass(frozen=True)
class Ended:
    """A run: its exit code (minus the number of what killed it), standard error, seconds."""

    code: int
    errors: str
    seconds: float

    @property
    def quiet(self) -> bool:
        """Whether it ended as one that was asked to: no traceback, no "bug"."""
        return "Traceback" not in self.errors and "bug" not in self.errors


class Run:
    """A run that goes on."""

    def __init__(self, pid: int, errors: int, started: float) -> None:
        self.pid = pid
        self._errors = errors
        self._started = started

    def stop(self, number: int) -> None:
        """Send a signal, if it is not over yet."""
        os.kill(self.pid, number)

    def ended(self, code: int) -> Ended:
        seconds = time.monotonic() - self._started
        text = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._errors, 65536):
                text += part
        os.close(self._errors)
        return Ended(code, text.decode(errors="replace"), seconds)


class Nursery:
    """Starts runs; one line of JSON asks for one, and the answer is its process id or exit code."""

    def __init__(self, *modules: str) -> None:
        """Import some modules beforehand; none is the whole exporter."""
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, *(modules or EXPORTER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._folder.cleanup()

    def start(self, *arguments: object, file_size: int | None = None, code: str = "") -> Run:
        """Start the command line, at most ``file_size`` bytes a file; ``code`` runs before it.

        Without arguments only ``code`` runs.
        """
        self._count += 1
        # A pipe, because a limit on files, and a full disk, would be one for a file of messages.
        errors = Path(self._folder.name) / str(self._count)
        os.mkfifo(errors)
        end = os.open(errors, os.O_RDWR | os.O_NONBLOCK)
        request = {
            "arguments": [str(argument) for argument in arguments],
            "errors": str(errors),
            "file_size": file_size,
            "code": code,
        }
        return Run(int(self._ask({"start": request})), end, time.monotonic())

    def wait(self, run: Run) -> Ended:
        """Wait for the end of a run."""
        return run.ended(int(self._ask({"wait": run.pid})))

    def run(self, *arguments: object, file_size: int | None = None, code: str = "") -> Ended:
        """Run to the end."""
        return self.wait(self.start(*arguments, file_size=file_size, code=code))

    def stopped(self, number: int, after: float, *arguments: object) -> Ended:
        """Run, and send a signal after so many seconds."""
        run = self.start(*arguments)
        time.sleep(after)
        # A child that has ended is there until it is waited for.
        run.stop(number)
        return self.wait(run)

    def _ask(self, request: object) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def started(arguments: Sequence[object], number: int | None = None, after: float = 0) -> Ended:
    """Run ``python -m vistower`` in a process of its own, and send it a signal."""
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "vistower", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    time.sleep(after)
    if number is not None:
        process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    return Ended(process.returncode, errors, time.monotonic() - begin)


def _serve() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = _child(**request["start"])
        answers.write(f"{answer}\n")
        answers.flush()


def _child(arguments: list[str], errors: str, file_size: int | None, code: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        target = os.open(errors, os.O_WRONLY)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor, new in ((nothing, 0), (nothing, 1), (target, 2)):
            os.dup2(descriptor, new)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        if code:
            exec(code, {})
        status = _command_line(arguments) if arguments else 0
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
    return 0


def _command_line(arguments: list[str]) -> int:
    from vistower.cli import main

    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    _serve()
