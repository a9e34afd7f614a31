"""Fuzz one target with atheris: ``python tests/fuzz/run.py TARGET SECONDS [libFuzzer option...]``.

New inputs go to ``artifacts/fuzz/TARGET``; what fails is written to ``artifacts/fuzz/TARGET-*`` and
ends the run with an error. Reruns an input with ``python tests/fuzz/run.py TARGET 0 FILE``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
FOUND = HERE.parent.parent / "artifacts" / "fuzz"

with atheris.instrument_imports(include=["vistower"]):
    sys.path.insert(0, str(HERE))
    import targets


def main() -> None:
    name, seconds, *options = sys.argv[1:]
    target = targets.TARGETS[name]
    new = FOUND / name
    new.mkdir(parents=True, exist_ok=True)
    arguments = [sys.argv[0], *options]
    if not any(Path(option).is_file() for option in options):
        arguments += [
            f"-max_total_time={seconds}",
            "-max_len=65536",
            "-timeout=60",
            "-rss_limit_mb=4096",
            "-print_final_stats=1",
            "-verbosity=0",
            f"-artifact_prefix={FOUND / name}-",
            str(new),
            str(HERE / "corpus" / name),
        ]
    atheris.Setup(arguments, target)
    try:
        atheris.Fuzz()
    finally:
        targets.remove_folder()


if __name__ == "__main__":
    main()
