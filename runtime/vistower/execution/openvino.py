"""OpenVINO's execution provider on the CPU: its options."""

from __future__ import annotations

import json

from vistower.execution.ort import CPU_PROVIDER, OPENVINO_PROVIDER
from vistower.execution.providers import Providers


def openvino_providers(threads: int) -> Providers:
    """Execution providers for ``openvino``: it, then the CPU for what it leaves."""
    return (OPENVINO_PROVIDER, openvino_options(threads)), (CPU_PROVIDER, {})


def openvino_options(threads: int) -> dict[str, str]:
    """Options of OpenVINOExecutionProvider; ``load_config`` is JSON, properties by device.

    Args:
        threads: CPU threads inside one run. OpenVINO has threads of its own and does not heed
            ``intra_op_num_threads``.
    """
    properties = {
        # Where the CPU has bfloat16 instructions OpenVINO may take them for a float32 graph.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        # One run at a time, on all threads.
        "PERFORMANCE_HINT": "LATENCY",
        # Two processes, each pinned to the first cores, would share these and leave the others.
        "ENABLE_CPU_PINNING": False,
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": properties})}
