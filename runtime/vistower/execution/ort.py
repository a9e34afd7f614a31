"""ONNX Runtime, imported on first use; the only module that imports it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vistower.errors import MissingExtraError
from vistower.forks import exit_without_destructors, in_every_child, uncut

if TYPE_CHECKING:
    from types import ModuleType

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"
OPENVINO_PROVIDER = "OpenVINOExecutionProvider"

WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
"""Distributions that provide ``import onnxruntime``; two of them overwrite each other's files."""

LOG_ERRORS_ONLY = 3
"""ONNX Runtime's severity for errors; its warnings at every start leave nothing to be done."""


TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""Environment variable, read by ONNX Runtime when it is imported: 1 turns its telemetry off."""


def _may_have_telemetry() -> bool:
    """Whether ONNX Runtime was imported, by somebody else, with its telemetry on."""
    return "onnxruntime" in sys.modules and TELEMETRY not in os.environ


def _begin_child() -> None:
    if _may_have_telemetry():
        exit_without_destructors()


in_every_child(_begin_child)


@lru_cache(maxsize=1)
@uncut
def onnxruntime() -> ModuleType:
    """ONNX Runtime, with the CUDA libraries of nvidia wheels loaded where it was built for CUDA.

    Its telemetry is off unless the environment says otherwise. Builds that have it (1.32) start a
    thread for it when they are imported, write a database into the home directory, and crash or
    hang when a forked child exits.

    Raises:
        MissingExtraError: it is not installed, or it fails to import.
    """
    if _may_have_telemetry():
        in_every_child(exit_without_destructors)
    os.environ.setdefault(TELEMETRY, "1")
    try:
        import onnxruntime as module
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX Runtime cannot be imported ({error}). Install one of: "
            f"pip install 'vistower[cpu]', pip install 'vistower[gpu]', pip install "
            f"'vistower[openvino]'."
        ) from error
    module.set_default_logger_severity(LOG_ERRORS_ONLY)
    if CUDA_PROVIDER in module.get_available_providers() and hasattr(module, "preload_dlls"):
        # It prints what it misses to stdout, which is where `vistower doctor --json` writes.
        # What is missing is found again, by name, in vistower.execution.cuda_problems.
        with contextlib.redirect_stdout(io.StringIO()):
            module.preload_dlls()
    return cast("ModuleType", module)


def installed_wheels() -> dict[str, str]:
    """The distributions that wrote the ``onnxruntime`` folder in use, with their versions.

    One that lies elsewhere on the path, behind it, does no harm. None where the folder came
    without a distribution's metadata.
    """
    # Importing it takes a fifth of the time of `from vistower import VisionEncoder`.
    from importlib.metadata import PackageNotFoundError, distribution

    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent.resolve()
    found = {}
    for name in WHEELS:
        with contextlib.suppress(PackageNotFoundError):
            wheel = distribution(name)
            if Path(str(wheel.locate_file("onnxruntime"))).resolve() == folder:
                found[name] = wheel.version
    return found
