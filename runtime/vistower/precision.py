"""Which precision a device computes in: the rules, as a table.

========= ================ ====== =============================================================
precision graph            TF32   where
========= ================ ====== =============================================================
``fp32``  fp32             off    everywhere; what torch computes by default
``tf32``  fp32             on     GPUs of compute capability 8.0 and up
``fp16``  fp16             off    GPUs of compute capability 5.3 and up
``bf16``  bf16             off    GPUs of compute capability 8.0 and up
``int8``  int8             --     the CPU (its quantized operators have no CUDA kernels)
========= ================ ====== =============================================================

``auto`` takes fp32 on the CPU, through OpenVINO too, always: nothing lossy unasked. On a GPU it
takes what its family keeps its accuracy in, CLIP fp16 and DINOv3 bf16 (its authors do not support
fp16), where the bundle has that graph and the GPU that precision; else fp32 without TF32.

TF32 rounds the factors of a product to 10 bits of mantissa. ONNX Runtime turns it on by default
on GPUs that have it, torch does not, and so does vistower not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from vistower.errors import PrecisionError
from vistower.execution.device import PROVIDERS, Device
from vistower.families.record import Family
from vistower.tolerance import GraphPrecision

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class PrecisionRule:
    """What a precision needs: the graph's precision, the device types, a compute capability."""

    graph: GraphPrecision
    devices: tuple[str, ...]
    compute_capability: tuple[int, int] = (0, 0)
    tf32: bool = False


RULES: Mapping[Precision, PrecisionRule] = MappingProxyType(
    {
        "fp32": PrecisionRule("fp32", ("cpu", "openvino", "cuda", "tensorrt")),
        "tf32": PrecisionRule("fp32", ("cuda", "tensorrt"), (8, 0), tf32=True),
        "fp16": PrecisionRule("fp16", ("cuda", "tensorrt"), (5, 3)),
        "bf16": PrecisionRule("bf16", ("cuda", "tensorrt"), (8, 0)),
        "int8": PrecisionRule("int8", ("cpu",)),
    }
)

REDUCED = ("fp16", "bf16")
"""Precisions in which a sound tower can overflow to infinity."""


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision taken, the precision of its graph, whether TF32 is on, and why."""

    precision: Precision
    graph: GraphPrecision
    tf32: bool
    reason: str


def can_run(device: Device, precision: Precision, domains: Collection[str]) -> bool:
    """Whether a device takes a graph of this precision, with operators of these domains."""
    if device.standard_operators and set(domains) - {""}:
        return False
    return device.type in RULES[precision].devices


def choose_precision(
    wanted: str,
    device: Device,
    *,
    family: Family,
    available: Collection[str],
    compute_capability: tuple[int, int] | None = None,
) -> PrecisionChoice:
    """Apply the rules.

    Args:
        wanted: ``auto`` or a precision.
        device: where the session runs.
        family: of the tower.
        available: precisions of the graphs there are.
        compute_capability: the GPU's (major, minor); None where it is not known, which only an
            explicit request passes.

    Raises:
        PrecisionError: the precision is unknown, the device cannot, or there is no such graph.
    """
    if wanted == "auto":
        return _auto(device, family, available, compute_capability)
    if wanted not in get_args(Precision):
        raise PrecisionError(
            f"precision={wanted!r} is not known. Use auto, {', '.join(get_args(Precision))}."
        )
    precision: Precision = wanted  # type: ignore[assignment]
    if problem := _problem(precision, device, available, compute_capability):
        raise PrecisionError(f"precision={wanted!r} was asked for on {device}, but {problem}.")
    rule = RULES[precision]
    return PrecisionChoice(precision, rule.graph, rule.tf32, "asked for")


def _auto(
    device: Device,
    family: Family,
    available: Collection[str],
    compute_capability: tuple[int, int] | None,
) -> PrecisionChoice:
    best = family.auto_on_gpu if device.on_gpu else None
    if best is None:
        where = "the CPU" if device.type == "cpu" else f"{device}"
        return PrecisionChoice("fp32", "fp32", False, f"auto on {where} is fp32")
    problem = _problem(best, device, available, compute_capability or (0, 0))
    if problem is not None:
        return PrecisionChoice("fp32", "fp32", False, f"auto would take {best}, but {problem}")
    reason = f"auto on a GPU is {best} for {family.model_type}"
    return PrecisionChoice(best, best, False, reason)


def _problem(
    precision: Precision,
    device: Device,
    available: Collection[str],
    compute_capability: tuple[int, int] | None,
) -> str | None:
    rule = RULES[precision]
    # Other providers may have the kernels or not; whoever asks for one learns it from the session.
    if device.type in PROVIDERS and device.type not in rule.devices:
        can = ", ".join(name for name, rule in RULES.items() if device.type in rule.devices)
        return f"{device.type} computes in {can}"
    has = compute_capability if device.on_gpu else None
    if has is not None and has < rule.compute_capability:
        needs = "{}.{}".format(*rule.compute_capability)
        return f"that needs compute capability {needs}, and the GPU's is {has[0]}.{has[1]}"
    if rule.graph not in available:
        return (
            f"the bundle has no {rule.graph} graph (it has {', '.join(available)}): export the "
            f"checkpoint again with --precision {rule.graph}"
        )
    return None
