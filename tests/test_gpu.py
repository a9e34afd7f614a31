"""What only a GPU can show: real CUDA sessions against the CPU's numbers. See docs/gpu.md.

Run by scripts/gpu, with --require-gpu. Real architectures with random weights, because kernels are
chosen by head size and sequence length.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vistower import SessionOptions, VisionEncoder
from vistower.bundle import Bundle, BundleGraph
from vistower.doctor import diagnose
from vistower.errors import BatchMemoryError, DeviceMemoryError, NoSuchDeviceError
from vistower.execution.cuda_machine import Driver, compute_capability, driver
from vistower.execution.cuda_problems import problems
from vistower.execution.device import Device
from vistower.execution.session import Session
from vistower.precision import REDUCED
from vistower.tolerance import GraphPrecision
from vistower_export.checkpoint import write_random_checkpoint
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

pytestmark = pytest.mark.gpu

NAMES = ("clip-vit-base-patch32", "dinov3-vits16")

FP32 = 1e-4
"""Allowed difference over a token's norm, as for every fp32 graph."""

HALF = 2e-2

FAST_ATTENTION = {"FLASH_ATTENTION", "CUDNN_FLASH_ATTENTION"}
"""What half precision must take; MATH and EFFICIENT_ATTENTION mean a condition is broken."""

Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=NAMES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a released architecture with random weights."""
    folder = tmp_path_factory.mktemp("gpu")
    checkpoint = folder / request.param
    write_random_checkpoint(request.param, checkpoint)
    precisions: list[GraphPrecision] = ["bf16"] if "dinov3" in request.param else ["fp16", "bf16"]
    return export_bundle(
        resolve_checkpoint(str(checkpoint)),
        folder / "bundle",
        precisions=precisions,
        uint8="clip" in request.param,
    ).directory


def pixels(count: int, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, 3, 224, 224), dtype=np.float32)


@pytest.fixture(scope="module")
def expected(bundle: Path) -> Array:
    """Tokens of `pixels(9)` by the CPU."""
    return VisionEncoder.open(bundle, device="cpu").forward(pixels(9))


def on_cuda(bundle: Path, options: SessionOptions | None = None) -> VisionEncoder:
    """The fp32 graph on the first GPU."""
    return VisionEncoder.open(bundle, device="cuda", precision="fp32", options=options)


def off(have: Array, want: Array) -> float:
    """Largest difference over the token's norm."""
    return float((np.abs(have - want).max(-1) / np.linalg.norm(want, axis=-1)).max())


def half_graphs(bundle: Path) -> list[BundleGraph]:
    """The bundle's half-precision graphs with ONNX Runtime's own operators."""
    found = Bundle.load(bundle)
    assert found.manifest is not None
    graphs = [found.graph(name) for name in found.manifest.graphs]
    return [one for one in graphs if one.precision in REDUCED and not one.portable]


def test_the_doctor_finds_every_gpu_working() -> None:
    found = diagnose("cuda")
    assert found.problem is None
    assert found.gpus
    gpus = [one for one in found.checks if one.device.startswith("cuda")]
    assert len(gpus) == len(found.gpus)
    assert all(one.works and not one.cpu_nodes for one in gpus)
    cuda = [library for library in found.cuda_libraries if not library.name.startswith("libnv")]
    assert [library.name for library in cuda if library.error] == []


def test_fp32_is_the_cpus_numbers_and_no_node_is_on_the_cpu(bundle: Path, expected: Array) -> None:
    encoder = on_cuda(bundle, SessionOptions(strict=True))
    assert encoder.device == "cuda:0"
    assert off(encoder.forward(pixels(9)), expected) <= FP32
    have = encoder.encode(SAMPLES)
    want = VisionEncoder.open(bundle, device="cpu").encode(SAMPLES)
    assert off(have.cls, want.cls) <= FP32


def test_any_batch_size_and_any_thread(bundle: Path, expected: Array) -> None:
    encoder = on_cuda(bundle)
    for count in (1, 9, 3, 2):
        assert off(encoder.forward(pixels(9)[:count]), expected[:count]) <= FP32
    with ThreadPoolExecutor(8) as pool:
        parts = [pixels(9)[index : index + 1] for index in range(9)]
        have = np.concatenate(list(pool.map(encoder.forward, parts)))
    assert off(have, expected) <= FP32


def test_cuda_graphs(bundle: Path, expected: Array) -> None:
    options = SessionOptions(strict=True, buckets=(1, 4, 8), cuda_graphs=True)
    encoder = on_cuda(bundle, options)
    report = encoder.warmup()
    assert [one.batch_size for one in report] == [1, 4, 8]
    assert all(one.graph for one in report)
    for _ in range(3):
        for count in (1, 2, 4, 5, 9):
            assert off(encoder.forward(pixels(9)[:count]), expected[:count]) <= FP32
    with ThreadPoolExecutor(4) as pool:
        for have in pool.map(encoder.forward, [pixels(9)] * 8):
            assert off(have, expected) <= FP32


def test_tokens_stay_on_the_device(bundle: Path, expected: Array) -> None:
    for options in (None, SessionOptions(buckets=(4,), cuda_graphs=True)):
        encoder = on_cuda(bundle, options)
        if options is not None:
            encoder.warmup()
        array = encoder.forward_on_device(pixels(9))
        tensor = torch.from_dlpack(array)
        assert tensor.device == torch.device("cuda", 0)
        assert torch.from_dlpack(array).data_ptr() == tensor.data_ptr()
        encoder.forward_on_device(pixels(9, 1))
        del array, encoder
        assert off(tensor.cpu().numpy(), expected) <= FP32


def test_the_users_stream(bundle: Path, expected: Array) -> None:
    stream = torch.cuda.Stream()
    options = SessionOptions(stream=stream.cuda_stream)
    encoder = on_cuda(bundle, options)
    tensor = torch.from_dlpack(encoder.forward_on_device(pixels(9)))
    with torch.cuda.stream(stream):
        doubled = tensor * 2
    stream.synchronize()
    assert off(doubled.cpu().numpy(), expected * 2) <= FP32


def test_a_captured_graph_pickles_to_a_session_of_its_own(bundle: Path, expected: Array) -> None:
    options = SessionOptions(buckets=(4,), cuda_graphs=True)
    encoder = on_cuda(bundle, options)
    encoder.warmup()
    again = pickle.loads(pickle.dumps(encoder))
    assert off(again.forward(pixels(9)), expected) <= FP32


def used_memory() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def test_buckets_bound_the_memory(bundle: Path) -> None:
    encoder = on_cuda(bundle, SessionOptions(buckets=(8, 32)))
    encoder.warmup()
    before = used_memory()
    for count in (*range(1, 33), 70, 5, 64, 31):
        encoder.forward(pixels(count))
    assert used_memory() - before <= 16 * 1024**2


def test_out_of_memory_is_halved_and_then_an_error(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = on_cuda(bundle).forward(pixels(64))
    failed = 0
    # The smallest limit a batch of 64 passes with, in steps: the halves pass before it.
    for megabytes in range(16, 4096, 16):
        options = SessionOptions(memory_limit=megabytes * 1024**2)
        try:
            encoder = on_cuda(bundle, options)
            have = encoder.forward(pixels(64))
        except (DeviceMemoryError, BatchMemoryError):
            failed += 1
            continue
        assert failed
        assert "it is computed in halves of 32" in caplog.text
        assert off(have, want) <= FP32
        return
    pytest.fail("no limit was found at which the batch passes")


def test_tf32_is_off_unless_asked_for(bundle: Path, expected: Array) -> None:
    capability = compute_capability(Device("cuda"))
    if capability is None or capability < (8, 0):
        pytest.skip(f"TF32 needs compute capability 8.0; this GPU has {capability}")
    encoder = VisionEncoder.open(bundle, device="cuda", precision="tf32")
    difference = off(encoder.forward(pixels(9)), expected)
    exact = off(on_cuda(bundle).forward(pixels(9)), expected)
    assert 5 * exact < difference <= HALF


def test_half_precision(bundle: Path, expected: Array) -> None:
    graphs = half_graphs(bundle)
    assert graphs
    for graph in graphs:
        strict = SessionOptions(strict=True)
        encoder = VisionEncoder.open(bundle, device="cuda", graph=graph.name, options=strict)
        if graph.pixels == "uint8":
            want = VisionEncoder.open(bundle, device="cpu").encode(SAMPLES).cls
            have = encoder.encode(SAMPLES).cls
        else:
            want, have = expected, encoder.forward(pixels(9))
        assert off(have, want) <= HALF, graph.name
    assert VisionEncoder.open(bundle, device="cuda").graph.precision in REDUCED


KERNELS = """
import sys
import numpy as np
from pathlib import Path
from vistower.precision import REDUCED
from vistower.execution.session import Session
from vistower.tolerance import GraphPrecision
session = Session(Path(sys.argv[1]), "cuda")
shape = (int(sys.argv[2]), 3, 224, 224)
session.run(np.zeros(shape, session.input_dtype))
"""


def attention_kernels(graph: Path, batch_size: int) -> set[str]:
    """The kernels ONNX Runtime says its attention nodes took; it prints them to stdout."""
    environment = {**os.environ, "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, graph, str(batch_size)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return set(re.findall(r"SdpaKernel=([A-Z_]+)", done.stdout))


def test_the_attention_kernel(bundle: Path) -> None:
    fp32 = attention_kernels(Bundle.load(bundle).graph("ort").path, 8)
    assert fp32, "ONNX Runtime named no attention kernel"
    # fp32 has no flash kernel; which of these it is depends on the sequence length.
    assert fp32 <= {"EFFICIENT_ATTENTION", "MATH", "TRT_FUSED_ATTENTION"}
    for graph in half_graphs(bundle):
        for batch_size in (1, 32):
            found = attention_kernels(graph.path, batch_size)
            assert found, graph.name
            assert found <= FAST_ATTENTION, (graph.name, batch_size, found)


def test_a_gpu_that_is_not_there(bundle: Path) -> None:
    with pytest.raises(NoSuchDeviceError, match="there is no GPU 99"):
        VisionEncoder.open(bundle, device="cuda:99")


def test_several_gpus(bundle: Path, expected: Array) -> None:
    found = driver()
    assert isinstance(found, Driver)
    # One GPU twice is the same code with one worker.
    names = [f"cuda:{gpu.index}" for gpu in found.gpus]
    encoder = VisionEncoder.open(
        bundle, precision="fp32", devices=names if len(names) > 1 else names * 2
    )
    assert off(encoder.forward(pixels(9)), expected) <= FP32


def test_tensorrt(
    bundle: Path, expected: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if found := problems(Device("tensorrt")):
        pytest.skip("; ".join(map(str, found)))
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from vistower import SessionOptions, VisionEncoder\n"
        "options = SessionOptions(engine_cache=Path(sys.argv[2]), buckets=(1, 16))\n"
        "encoder = VisionEncoder.open(\n"
        "    sys.argv[1], device='tensorrt', precision='fp32', options=options)\n"
        "batch = np.load(sys.argv[3])\n"
        "np.save(sys.argv[4], encoder.forward(batch))\n"
    )
    np.save(tmp_path / "batch.npy", pixels(9))
    arguments = [bundle, tmp_path / "engines", tmp_path / "batch.npy", tmp_path / "tokens.npy"]
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, *arguments], env=environment, check=True)
        assert off(np.load(tmp_path / "tokens.npy"), expected) <= FP32
        engines = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.engine")}
        assert engines
        made = locals().get("made", engines)
        assert made == engines, "the second process built the engine again"


def test_a_session_leaves_torchs_current_device_alone(bundle: Path) -> None:
    found = driver()
    assert isinstance(found, Driver)
    if len(found.gpus) < 2:
        pytest.skip("one GPU")
    torch.cuda.set_device(1)
    calls: list[Callable[[], Any]] = [
        lambda: Session(VisionEncoder.open(bundle, device="cpu").session.graph, "cuda:0"),  # type: ignore[union-attr]
        lambda: VisionEncoder.open(bundle, precision="fp32", device="cuda:0").forward(pixels(2)),
    ]
    for call in calls:
        call()
        assert torch.cuda.current_device() == 1
