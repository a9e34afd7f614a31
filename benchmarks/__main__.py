"""``python -m benchmarks``: run the benchmark, or draw again what a run has left."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import report
from benchmarks.models import DEFAULT_MODELS, MODELS
from benchmarks.results import Run
from benchmarks.run import (
    REPOSITORY,
    Plan,
    ResumeError,
    UnknownBackendError,
    begin,
    default_pythons,
    make_artifacts,
    run,
)

RESULTS = REPOSITORY / "benchmarks" / "results"
ARTIFACTS = REPOSITORY / "artifacts" / "benchmarks"
BATCHES = {"cpu": (1, 8, 32), "cuda": (1, 8, 32, 128, 512)}


def _comma(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=_comma, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--backends", type=_comma, help="all; `vistower` is every graph of ours")
    parser.add_argument("--batches", type=_numbers, help="1,8,32; on the GPU 1,8,32,128,512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="per batch size and process")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one process")
    parser.add_argument("--threads", type=int, help="CPU cores for every backend; all usable ones")
    parser.add_argument("--quick", action="store_true", help="one short round, batches 1 and 8")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--report-only", action="store_true", help="draw the last run again")
    parser.add_argument("--artifacts", type=Path, default=ARTIFACTS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="ENVIRONMENT=PATH",
        help="main, optimum, openvino",
    )
    return parser.parse_args()


def _plan(arguments: argparse.Namespace) -> Plan:
    from vistower.threads import available_cpus

    device, quick = arguments.device, arguments.quick
    return Plan(
        device=device,
        models=arguments.models or DEFAULT_MODELS[device],
        backends=arguments.backends,
        batches=arguments.batches or ((1, 8) if quick else BATCHES[device]),
        rounds=1 if quick else arguments.rounds,
        seconds=0.5 if quick else arguments.seconds,
        calls=2,
        timeout=arguments.timeout,
        threads=arguments.threads or available_cpus(),
        tries=1 if quick else 3,
    )


def main() -> None:
    """Run, then write the table and the plots beside the JSON."""
    arguments = _arguments()
    name = f"{arguments.device}-quick" if arguments.quick else arguments.device
    output = arguments.output / f"{name}.json"
    if arguments.report_only:
        done = Run.load(output)
    else:
        plan = _plan(arguments)
        pythons = default_pythons() | dict(pair.split("=", 1) for pair in arguments.python)
        try:
            if not begin(plan, arguments.artifacts, resume=arguments.resume):
                make_artifacts(plan, arguments.artifacts, pythons)
            done = run(plan, arguments.artifacts, pythons, output)
        except (ResumeError, UnknownBackendError) as error:
            raise SystemExit(str(error)) from error
    table = report.markdown(done)
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    from benchmarks import plots

    for path in plots.draw(done, arguments.output, name):
        print(path)


if __name__ == "__main__":
    main()
