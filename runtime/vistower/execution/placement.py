"""Which execution provider each node of a loaded graph went to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistower.errors import NodePlacementError
from vistower.execution.device import Device
from vistower.execution.ort import CPU_PROVIDER

logger = logging.getLogger("vistower")

SHAPE_OPERATORS = frozenset(
    {"Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor"}
    | {"Gather", "Mod", "Mul", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice"}
    | {"Squeeze", "Sub", "Unsqueeze", "Where"}
)
"""ONNX Runtime itself puts these on the CPU where they only compute a shape, as in the graphs of
other exporters; vistower's graphs compute no shapes."""

NAMED = 5
"""Nodes that a message names."""


@dataclass(frozen=True)
class NodePlacement:
    """Nodes per execution provider, and the compute nodes left on the CPU (``operator name``)."""

    nodes: Mapping[str, int]
    on_cpu: tuple[str, ...]


def can_read_placement(session: Any) -> bool:
    """Whether this ONNX Runtime tells where nodes went, of a session or of its class."""
    return hasattr(session, "get_provider_graph_assignment_info")


def read_placement(
    session: Any, device: Device, graph: Path, *, strict: bool
) -> NodePlacement | None:
    """Read where the nodes went; None for a CPU session, or where ONNX Runtime cannot tell.

    The session must have been made with ``session.record_ep_graph_assignment_info``. Compute nodes
    on the CPU are logged as a warning.

    Raises:
        NodePlacementError: strict, and compute nodes are on the CPU; or not one node is on the
            device.
    """
    if device.provider == CPU_PROVIDER or not can_read_placement(session):
        return None
    nodes: dict[str, int] = {}
    on_cpu: list[str] = []
    for part in session.get_provider_graph_assignment_info():
        found = part.get_nodes()
        nodes[part.ep_name] = nodes.get(part.ep_name, 0) + len(found)
        if part.ep_name == CPU_PROVIDER:
            on_cpu += [f"{x.op_type} {x.name}" for x in found if x.op_type not in SHAPE_OPERATORS]
    if nodes and not nodes.get(device.provider):
        raise NodePlacementError(
            f"{device.provider} is active, but took not one node of {graph} ({nodes}). Take "
            f"another graph of the bundle, or another device."
        )
    if on_cpu:
        names = ", ".join(on_cpu[:NAMED]) + (", ..." if len(on_cpu) > NAMED else "")
        provider = "" if device.on_gpu else " provider"
        text = (
            f"{len(on_cpu)} compute nodes of {graph} run on the CPU{provider}, not on {device}: "
            f"{names}"
        )
        if strict:
            raise NodePlacementError(
                f"strict: {text}. Take another graph of the bundle, or a newer ONNX Runtime."
            )
        logger.warning("%s", text)
    return NodePlacement(nodes, tuple(on_cpu))
