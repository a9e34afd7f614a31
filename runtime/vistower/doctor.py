"""What is installed, which execution providers there are, and which device ``auto`` picks."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

from vistower.bundle import cache_directory
from vistower.errors import MissingExtraError
from vistower.session import choose_device, installed_wheels, onnxruntime
from vistower.threads import available_cpus

RUNTIME_LIBRARIES = ("vistower", "numpy", "pillow")
EXPORT_LIBRARIES = ("torch", "torchvision", "transformers", "onnx", "onnx-ir")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
"""Instruction sets that decide the speed of ONNX Runtime on x86."""


@dataclass(frozen=True)
class Diagnosis:
    """The findings; ``problem`` is None where an encoder can run."""

    python: str
    platform: str
    libraries: dict[str, str | None]
    onnxruntime_wheels: dict[str, str]
    providers: tuple[str, ...]
    cpus: int
    cpu_flags: tuple[str, ...]
    cache_directory: str
    device: str | None
    device_reason: str
    problem: str | None


def diagnose() -> Diagnosis:
    """Look at this machine; imports ONNX Runtime and nothing of the exporter."""
    providers: tuple[str, ...] = ()
    device, problem = None, None
    try:
        providers = tuple(onnxruntime().get_available_providers())
        choice = choose_device()
        device, reason = str(choice.device), choice.reason
    except MissingExtraError as error:
        problem = reason = str(error)
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        libraries={name: _version(name) for name in (*RUNTIME_LIBRARIES, *EXPORT_LIBRARIES)},
        onnxruntime_wheels=installed_wheels(),
        providers=providers,
        cpus=available_cpus(),
        cpu_flags=_cpu_flags(),
        cache_directory=str(cache_directory()),
        device=device,
        device_reason=reason,
        problem=problem,
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> tuple[str, ...]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    present = set(line.partition(":")[2].split())
    return tuple(flag for flag in CPU_FLAGS if flag in present)
