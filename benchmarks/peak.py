"""What the machine can do at most: the fastest matrix product any of its libraries reaches.

On the CPU float32 products of several sizes with torch, NumPy's BLAS and ONNX Runtime, the best
of all; on the GPU torch's 8192³ product per precision. Run as a process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

CPU_SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (400, 768, 3072), (1608, 384, 1536))
"""(M, N, K): two cubes, and the largest products of CLIP B/32 and DINOv3 S/16 at batch 8."""

GPU_SIZE = 8192


def _gflops(flop: float, call: Callable[[], Any], seconds: float) -> float:
    """From the median call: what is compared with it is a median too."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return flop / statistics.median(times) / 1e9


def cpu(threads: int, seconds: float) -> dict[str, Any]:
    """GFLOP/s by library and size, and the best of them; ``seconds`` for each."""
    import onnxruntime
    import torch

    torch.set_num_threads(threads)
    results: dict[str, dict[str, float]] = {"torch": {}, "numpy": {}, "onnxruntime": {}}
    random = np.random.default_rng(0)
    for m, n, k in CPU_SIZES:
        a = random.standard_normal((m, k)).astype(np.float32)
        b = random.standard_normal((k, n)).astype(np.float32)
        flop, size = 2.0 * m * n * k, f"{m}x{n}x{k}"
        left, right = torch.from_numpy(a), torch.from_numpy(b)
        out, out_torch = np.empty((m, n), np.float32), torch.empty(m, n)

        def with_torch() -> None:
            torch.mm(left, right, out=out_torch)  # noqa: B023

        def with_numpy() -> None:
            np.matmul(a, b, out=out)  # noqa: B023

        results["torch"][size] = _gflops(flop, with_torch, seconds)
        results["numpy"][size] = _gflops(flop, with_numpy, seconds)
        session = _matmul_session(onnxruntime, b, threads)

        def with_ort() -> None:
            session.run(None, {"a": a})  # noqa: B023, F821

        results["onnxruntime"][size] = _gflops(flop, with_ort, seconds)
        del session
    best = max(value for sizes in results.values() for value in sizes.values())
    return {"gflops": best, "by_library": results, "numpy_blas": _numpy_blas()}


def gpu(seconds: float) -> dict[str, Any]:
    """GFLOP/s of torch's 8192³ product by precision."""
    import torch

    results = {}
    for precision, dtype in (
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        a = torch.randn(GPU_SIZE, GPU_SIZE, device="cuda").to(dtype)
        b = torch.randn(GPU_SIZE, GPU_SIZE, device="cuda").to(dtype)

        def product() -> None:
            torch.mm(a, b)  # noqa: B023
            torch.cuda.synchronize()

        results[precision] = _gflops(2.0 * GPU_SIZE**3, product, seconds)
    return {"gflops": results["fp32"], "by_precision": results}


def _matmul_session(onnxruntime: Any, weight: Any, threads: int) -> Any:
    """ONNX Runtime with one constant-weight MatMul, as a graph has it."""
    import onnx
    from onnx import helper, numpy_helper

    k, n = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(weight, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _numpy_blas() -> str:
    """Which kernel NumPy's OpenBLAS runs here, as it reports itself; ``unknown`` if it does not."""
    import ctypes
    from pathlib import Path

    folder = Path(np.__file__).parent.parent / "numpy.libs"
    for library in sorted(folder.glob("*openblas*")):
        loaded = ctypes.CDLL(str(library))
        for prefix in ("scipy_openblas", "openblas"):
            for suffix in ("64_", ""):
                function = getattr(loaded, f"{prefix}_get_corename{suffix}", None)
                if function is not None:
                    function.restype = ctypes.c_char_p
                    return str(function().decode())
    return "unknown"
