"""What is installed, which devices there are, what is wrong with the others, and a real run.

Every device that can be had ends with an inference of a tiny graph (attention between two matrix
products, compared with NumPy), or of a bundle's golden vectors.
"""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vistower.bundle import cache_directory, find_bundle
from vistower.errors import VistowerError
from vistower.execution.cpu import cpu_flags
from vistower.execution.cuda_machine import (
    LOADED_LATER,
    Driver,
    Gpu,
    Library,
    driver,
    look_for,
    provider_libraries,
)
from vistower.execution.cuda_problems import choose_device, problems
from vistower.execution.device import CPU, Device, parse_device
from vistower.execution.ort import (
    CUDA_PROVIDER,
    OPENVINO_PROVIDER,
    TENSORRT_PROVIDER,
    installed_wheels,
    onnxruntime,
)
from vistower.execution.providers import SessionOptions
from vistower.execution.session import Session
from vistower.golden import replay
from vistower.threads import available_cpus

RUNTIME_LIBRARIES = ("vistower", "numpy", "pillow")
EXPORT_LIBRARIES = ("torch", "torchvision", "transformers", "onnx", "onnx-ir")
GRAPH = Path(__file__).with_name("doctor.onnx")
"""The tiny graph: ``pixel_values`` (B, 3, 4, 8) → rows (B, 3, 32) → product, multi-head attention
with 2 heads, product → ``last_hidden_state``. ``tests/doctor_graph.py`` writes it."""

TOLERANCE = 1e-4
"""Largest difference from NumPy, on numbers of about 1."""

TF32_TOLERANCE = 2e-2
"""The same for TensorRT, which rounds to TF32 unless the environment forbids it."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Check:
    """One device: a run on it, or why it cannot be had.

    ``problems`` are empty where it can be had; ``seconds`` is from opening to the first result,
    ``difference`` the largest from the expected numbers.
    """

    device: str
    works: bool
    problems: tuple[str, ...] = ()
    ran: str | None = None
    seconds: float | None = None
    difference: float | None = None
    cpu_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """The findings; ``problem`` is None where the device looked for (or any) works."""

    python: str
    platform: str
    libraries: dict[str, str | None]
    onnxruntime_wheels: dict[str, str]
    providers: tuple[str, ...]
    cuda_libraries: tuple[Library, ...]
    driver_cuda_version: str | None
    gpus: tuple[Gpu, ...]
    cpus: int
    cpu_flags: tuple[str, ...]
    cache_directory: str
    device: str | None
    device_reason: str
    checks: tuple[Check, ...]
    problem: str | None


def diagnose(required: str | None = None, bundle: str | None = None) -> Diagnosis:
    """Look at this machine; imports ONNX Runtime and nothing of the exporter.

    Args:
        required: a device that must work, e.g. ``cuda:0``; None where any will do.
        bundle: run this bundle's golden vectors instead of the tiny graph.
    """
    providers: tuple[str, ...] = ()
    libraries: tuple[Library, ...] = ()
    checks: tuple[Check, ...] = ()
    found = driver()
    device, problem = None, None
    try:
        providers = tuple(onnxruntime().get_available_providers())
        compiled = [name for name in (CUDA_PROVIDER, TENSORRT_PROVIDER) if name in providers]
        linked = [library for name in compiled for library in provider_libraries(name)]
        loaded_later = [look_for(name) for name in LOADED_LATER] if compiled else []
        libraries = tuple(dict.fromkeys((*linked, *loaded_later)))
        choice = choose_device(required or "auto") if required in (None, "auto") else None
        device, reason = (str(choice.device), choice.reason) if choice else (required, "required")
        gpus = found.gpus if isinstance(found, Driver) else ()
        checks = tuple(check(one, bundle) for one in _devices(providers, len(gpus), required))
        problem = _problem(checks, required)
    except VistowerError as error:
        problem = reason = str(error)
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        libraries={name: _version(name) for name in (*RUNTIME_LIBRARIES, *EXPORT_LIBRARIES)},
        onnxruntime_wheels=installed_wheels(),
        providers=providers,
        cuda_libraries=libraries,
        driver_cuda_version=(
            ".".join(map(str, found.cuda_version)) if isinstance(found, Driver) else None
        ),
        gpus=found.gpus if isinstance(found, Driver) else (),
        cpus=available_cpus(),
        cpu_flags=cpu_flags(),
        cache_directory=str(cache_directory()),
        device=device,
        device_reason=reason,
        checks=checks,
        problem=problem,
    )


def _devices(providers: tuple[str, ...], gpus: int, required: str | None) -> Iterator[Device]:
    """The CPU, every GPU (the first in any case: to say what is wrong), and what is required.

    OpenVINO and TensorRT are there where the wheel has them.
    """
    cpu = [CPU, Device("openvino")] if OPENVINO_PROVIDER in providers else [CPU]
    devices = [*cpu, *(Device("cuda", index) for index in range(max(gpus, 1)))]
    if TENSORRT_PROVIDER in providers:
        devices.append(Device("tensorrt"))
    wanted = parse_device(required or "auto")
    if wanted is not None and wanted not in devices:
        devices.append(wanted)
    yield from devices


def _problem(checks: tuple[Check, ...], required: str | None) -> str | None:
    wanted = parse_device(required or "auto")
    if wanted is None:
        return None if any(one.works for one in checks) else "no device works"
    found = next(one for one in checks if one.device == str(wanted))
    return None if found.works else f"{wanted} does not work: {'; '.join(found.problems)}"


def check(device: Device, bundle: str | None = None) -> Check:
    """Run something small on a device, or say why that cannot be done; raises nothing."""
    if found := problems(device):
        return Check(str(device), works=False, problems=tuple(map(str, found)))
    start = time.perf_counter()
    try:
        if bundle is not None:
            difference = max(
                one.difference for one in replay(find_bundle(bundle), device=str(device))
            )
            seconds = time.perf_counter() - start
            return Check(str(device), True, (), f"golden vectors of {bundle}", seconds, difference)
        return _tiny_run(device)
    except VistowerError as error:
        return Check(str(device), works=False, problems=(str(error),))


def _tiny_run(device: Device) -> Check:
    start = time.perf_counter()
    tensorrt = device.type == "tensorrt"
    with tempfile.TemporaryDirectory() as engines:
        options = SessionOptions(tf32=tensorrt, engine_cache=Path(engines))
        session = Session(GRAPH, str(device), options=options)
        have = session.run(tiny_pictures())
        seconds = time.perf_counter() - start
        difference = float(np.abs(have - tiny_tokens(tiny_pictures())).max())
    nodes = session.placement.on_cpu if session.placement else ()
    allowed = TF32_TOLERANCE if tensorrt else TOLERANCE
    wrong = (f"wrong numbers: off by {difference:.1e}, allowed {allowed:.0e}",)
    works = difference <= allowed
    return Check(
        str(device), works, () if works else wrong, "tiny graph", seconds, difference, nodes
    )


def tiny_pictures() -> Array:
    """Two pictures (2, 3, 4, 8) for the tiny graph."""
    return np.random.RandomState(0).standard_normal((2, 3, 4, 8)).astype(np.float32)


def tiny_weights(which: int) -> Array:
    """The matrix (32, 32) of the tiny graph's first (1) or second (2) product."""
    # RandomState, because its numbers never change between releases of NumPy.
    return (np.random.RandomState(which).standard_normal((32, 32)) / 4).astype(np.float32)


def tiny_tokens(pictures: Array) -> Array:
    """What the tiny graph computes, in NumPy: (B, 3, 4, 8) → (B, 3, 32)."""
    rows = pictures.reshape(len(pictures), 3, 32) @ tiny_weights(1)
    heads = rows.reshape(len(rows), 3, 2, 16).transpose(0, 2, 1, 3)
    scores = heads @ heads.transpose(0, 1, 3, 2) / 4
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    context = (weights @ heads).transpose(0, 2, 1, 3).reshape(rows.shape)
    tokens: Array = (context @ tiny_weights(2)).astype(np.float32)
    return tokens


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
