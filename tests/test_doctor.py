"""`vistower doctor`: what is wrong is named, what works has run, and it is a health check."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from doctor_graph import doctor_graph
from fake_gpu import FakeGpu
from vistower.cli import main
from vistower.doctor import GRAPH, check, diagnose, tiny_pictures, tiny_tokens
from vistower.execution.device import Device
from vistower.execution.session import Session

ROOT = Path(__file__).parents[1]


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = 0
    try:
        main(["doctor", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().out


def test_the_tiny_graph_is_what_its_source_says() -> None:
    assert onnx.load(GRAPH) == doctor_graph()
    onnx.checker.check_model(onnx.load(GRAPH))


def test_the_tiny_graph_computes_what_numpy_computes() -> None:
    have = Session(GRAPH, "cpu").run(tiny_pictures())
    want = tiny_tokens(tiny_pictures())
    assert want.std() > 0.5
    assert np.abs(have - want).max() <= 1e-5


def test_a_machine_with_gpus(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.needed = ("libcublas.so.13", "libnvinfer.so.10", "libcuda.so.1")
    code, text = doctor(capsys, "--json")
    found = json.loads(text)
    assert code == 0
    assert [one["device"] for one in found["checks"]] == ["cpu", "cuda:0", "cuda:1", "tensorrt:0"]
    assert all(one["works"] for one in found["checks"])
    assert all(one["difference"] < 1e-5 and one["seconds"] > 0 for one in found["checks"])
    assert found["device"] == "cuda:0"
    assert found["driver_cuda_version"] == "13.0"
    assert found["gpus"][1]["name"] == "NVIDIA T4"
    assert found["gpus"][1]["compute_capability"] == [7, 5]
    code, text = doctor(capsys)
    assert code == 0
    assert "NVIDIA H200, 80,000 MB, sm 9.0" in text
    assert "cuda:1         works: tiny graph in" in text


def test_it_is_a_health_check(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.missing = {"libcublasLt.so.13"}
    code, text = doctor(capsys)
    assert code == 0
    assert "device auto    cpu: no CUDA: the provider needs libcublasLt.so.13" in text
    code, text = doctor(capsys, "--device", "cuda")
    assert code == 1
    assert "problem        cuda:0 does not work: the provider needs libcublasLt.so.13" in text
    gpu.missing = set()
    assert doctor(capsys, "--device", "cuda:1")[0] == 0
    code, text = doctor(capsys, "--device", "cuda:2", "--json")
    assert code == 1
    assert "there is no GPU 2" in json.loads(text)["problem"]
    assert doctor(capsys, "--device", "cpu")[0] == 0


def test_wrong_numbers_are_found(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vistower.doctor.tiny_tokens", lambda pictures: tiny_tokens(pictures) + 1)
    found = check(Device("cuda"))
    assert not found.works
    assert found.problems[0].startswith("wrong numbers: off by 1.0e+00")


def test_nodes_left_on_the_cpu_are_listed(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.nodes_on_cpu = [("MatMul", "product.2")]
    assert "on the CPU: MatMul product.2" in doctor(capsys)[1]


def test_a_bundles_golden_vectors(clip_bundle: Path, tmp_path: Path) -> None:
    found = diagnose("cpu", str(clip_bundle))
    assert found.problem is None
    assert found.checks[0].ran == f"golden vectors of {clip_bundle}"
    damaged = tmp_path / "bundle"
    shutil.copytree(clip_bundle, damaged)
    (damaged / "onnx/model_ort.onnx").write_bytes(b"")
    problem = diagnose("cpu", str(damaged)).problem
    assert problem is not None
    assert "model_ort.onnx" in problem


def test_without_onnxruntime() -> None:
    program = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from vistower.cli import main\n"
        "main(['doctor'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'vistower[cpu]'" in done.stdout


@pytest.fixture(scope="module")
def gpu_extra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment with `vistower[gpu]` from the registry: 2.5 GB, so removed afterwards."""
    folder = tmp_path_factory.mktemp("gpu") / "venv"
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", f"{ROOT}[gpu]"], check=True)
    yield folder / "bin"
    shutil.rmtree(folder)


def doctor_of(environment: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [environment / "vistower", "doctor", "--json", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean | {"LD_LIBRARY_PATH": ""}, check=False
    )
    return done.returncode, json.loads(done.stdout)


STUB_DRIVER = """
int cuInit(unsigned flags) { return 100; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuTensorMapEncodeTiled(void) { return 100; }
"""
"""The NVIDIA driver's library as far as the CUDA provider and the CUDA runtime need it to start."""

EVERY_OPTION = """
import vistower.execution.cuda_problems as cuda_problems
from vistower import SessionOptions
from vistower.execution.device import Device
from vistower.doctor import GRAPH
from vistower.execution.ort import onnxruntime
from vistower.execution.providers import cuda_options
from vistower.execution.session import Session

# Every option but the device, which fails before the others are read.
options = SessionOptions(
    strict=True, tf32=True, memory_limit=2**31, buckets=(1, 8), cuda_graphs=True, stream=94
)
every = cuda_options(Device("cuda"), options)
del every["device_id"]
try:
    cuda = ("CUDAExecutionProvider", every)
    onnxruntime().InferenceSession(str(GRAPH), providers=[cuda], enable_fallback=0)
except RuntimeError as error:
    assert "provider option" not in str(error), error
    assert "CUDA failure 100" in str(error), error
# And what becomes of ONNX Runtime's error where nothing was known to be wrong.
cuda_problems.problems = lambda device: ()
try:
    Session(GRAPH, "cuda", options=options)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_the_gpu_extra_on_a_machine_without_a_gpu(gpu_extra: Path) -> None:
    code, found = doctor_of(gpu_extra)
    assert code == 0
    assert list(found["onnxruntime_wheels"]) == ["onnxruntime-gpu"]
    assert found["device"] == "cpu"
    cpu, cuda, tensorrt = found["checks"]
    assert cpu["works"]
    assert [text.partition(" (")[0] for text in cuda["problems"]] == ["there is no NVIDIA driver"]
    assert "TensorRT provider needs libnvinfer.so.10" in tensorrt["problems"][0]
    linked = {x["name"]: x["error"] for x in found["cuda_libraries"]}
    assert {name for name, error in linked.items() if error} == {
        "libnvinfer.so.10",
        "libnvonnxparser.so.10",
    }
    code, found = doctor_of(gpu_extra, "--device", "cuda")
    assert code == 1
    assert "there is no NVIDIA driver" in found["problem"]

    # A driver that starts and finds no GPU, so that ONNX Runtime's own CUDA provider is asked.
    if compiler := shutil.which("cc"):
        source = gpu_extra.parent / "driver.c"
        source.write_text(STUB_DRIVER)
        library = gpu_extra.parent / "libcuda.so.1"
        stub = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library]
        subprocess.run([compiler, *stub, source], check=True)
        done = subprocess.run(
            [gpu_extra / "python", "-c", EVERY_OPTION],
            capture_output=True,
            text=True,
            env={"LD_LIBRARY_PATH": str(gpu_extra.parent)},
            check=True,
        )
        assert "CUDA failure 100: no CUDA-capable device" in done.stdout
        assert "DriverError" in done.stdout
        assert "start the container with GPUs" in done.stdout

    # A library gone, and then the CPU wheel on top.
    pip = [gpu_extra / "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "uninstall", "--yes", "nvidia-cublas"], check=True)
    problems = " ".join(doctor_of(gpu_extra)[1]["checks"][1]["problems"])
    assert re.search(r"needs libcublasLt\.so\.\d+, libcublas\.so\.\d+, which cannot", problems)
    subprocess.run([*pip, "install", "onnxruntime"], check=True)
    problems = " ".join(doctor_of(gpu_extra)[1]["checks"][1]["problems"])
    assert "both onnxruntime and onnxruntime-gpu are installed" in problems
