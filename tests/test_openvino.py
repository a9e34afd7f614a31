"""``device="openvino"``: faked where its wheel is not installed, and one run with the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fake_gpu import FakeGpu
from vistower import CLIPMixin, SessionOptions, VisionEncoder
from vistower.bundle import find_bundle
from vistower.doctor import diagnose
from vistower.errors import DeviceError, NodePlacementError, PrecisionError, ProviderMissingError
from vistower.execution.cuda_problems import problems
from vistower.execution.device import Device
from vistower.golden import replay
from vistower_export.pictures import SAMPLES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def machine(gpu: FakeGpu) -> FakeGpu:
    """A machine with the OpenVINO wheel and no GPU; the numbers are the CPU provider's."""
    gpu.providers = ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    gpu.wheels = {"onnxruntime-openvino": "1.24.1"}
    gpu.gpus, gpu.missing = [], {"libcuda.so.1"}
    return gpu


def test_it_takes_the_portable_graph_in_float32_on_the_threads_given(
    machine: FakeGpu, clip_bundle: Path
) -> None:
    encoder = VisionEncoder.open(clip_bundle, device="openvino", threads=3)
    assert (encoder.device, encoder.graph.name) == ("openvino", "portable")
    assert encoder.session.provider == "OpenVINOExecutionProvider"  # type: ignore[union-attr]
    assert encoder.session.placement.nodes["OpenVINOExecutionProvider"] == 9  # type: ignore[union-attr]
    (providers,) = machine.opened
    assert list(providers) == ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    options = providers["OpenVINOExecutionProvider"]
    assert options["device_type"] == "CPU"
    properties = json.loads(options["load_config"])["CPU"]
    assert properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert properties["INFERENCE_NUM_THREADS"] == 3
    expected = VisionEncoder.open(clip_bundle, device="cpu").encode(SAMPLES[0])
    assert np.allclose(encoder.encode(SAMPLES[0]).cls, expected.cls, atol=1e-5)
    assert CLIPMixin(model_path=str(clip_bundle), device="openvino").device == "openvino"


def test_options_of_the_user_win(machine: FakeGpu, clip_bundle: Path) -> None:
    own = ("OpenVINOExecutionProvider", {"load_config": "{}"})
    encoder = VisionEncoder.open(clip_bundle, providers=[own], graph="portable")
    assert encoder.device == "openvino"
    assert machine.opened[0]["OpenVINOExecutionProvider"] == {
        "device_type": "CPU",
        "load_config": "{}",
    }


def test_auto_never_takes_it(machine: FakeGpu, clip_bundle: Path) -> None:
    encoder = VisionEncoder.open(clip_bundle)
    assert (encoder.device, encoder.graph.name) == ("cpu", "ort")
    assert "onnxruntime-openvino" in encoder.session.reason  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16", "int8"])
def test_it_computes_in_fp32_only(machine: FakeGpu, clip_bundle: Path, precision: str) -> None:
    with pytest.raises(PrecisionError, match="openvino computes in fp32"):
        VisionEncoder.open(clip_bundle, device="openvino", precision=precision)


def test_the_wheel_without_it_is_named_with_the_remedy(clip_bundle: Path) -> None:
    says = r"wheel onnxruntime 1\.\S+ is built without OpenVINO.*'vistower\[openvino\]'"
    with pytest.raises(ProviderMissingError, match=says):
        VisionEncoder.open(clip_bundle, device="openvino")


def test_two_wheels(machine: FakeGpu, clip_bundle: Path) -> None:
    machine.wheels = {"onnxruntime": "1.32.0", "onnxruntime-openvino": "1.24.1"}
    with pytest.raises(
        ProviderMissingError,
        match="both onnxruntime and onnxruntime-openvino are installed, and they overwrite",
    ):
        VisionEncoder.open(clip_bundle, device="openvino")
    (problem,) = problems(Device("openvino"))
    assert problem.remedy == (
        "pip uninstall onnxruntime onnxruntime-openvino, then pip install 'vistower[openvino]'"
    )
    machine.wheels |= {"onnxruntime-gpu": "1.31.1"}
    assert str(problems(Device("cuda"))[0]).startswith("all of onnxruntime and ")


def test_a_session_that_fell_back_is_refused(machine: FakeGpu, clip_bundle: Path) -> None:
    machine.falls_back = True
    with pytest.raises(DeviceError, match="'openvino' was asked for, but ONNX Runtime made a"):
        VisionEncoder.open(clip_bundle, device="openvino")


def test_strict(machine: FakeGpu, clip_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine.nodes_on_cpu = [("MultiHeadAttention", "layers.0.attention")]
    VisionEncoder.open(clip_bundle, device="openvino")
    assert "run on the CPU provider, not on openvino: MultiHeadAttention lay" in caplog.text
    with pytest.raises(NodePlacementError, match=r"MultiHeadAttention layers\.0\.attention"):
        VisionEncoder.open(clip_bundle, device="openvino", options=SessionOptions(strict=True))


def test_golden_vectors_are_replayed_on_the_portable_graph(
    machine: FakeGpu, clip_bundle: Path
) -> None:
    replayed = [one.what for one in replay(find_bundle(clip_bundle), device="openvino")]
    graphs = {what.partition(" graph")[0] for what in replayed if "tokens of" in what}
    assert graphs == {"portable"}


def test_the_doctor_tries_it_where_the_wheel_has_it(machine: FakeGpu) -> None:
    assert [one.device for one in diagnose().checks] == ["cpu", "openvino", "cuda:0"]
    machine.providers = ["CPUExecutionProvider"]
    assert [one.device for one in diagnose().checks] == ["cpu", "cuda:0"]
    found = diagnose("openvino")
    assert found.problem is not None
    assert "built without OpenVINO" in found.problem


# The real one


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment with `vistower[openvino]` from the registry: 450 MB, so removed afterwards."""
    folder = tmp_path_factory.mktemp("openvino") / "venv"
    if shutil.which("uv"):
        subprocess.run(["uv", "venv", "--quiet", folder], check=True)
        install = ["uv", "pip", "install", "--quiet", "--python", folder / "bin/python"]
    else:
        venv.create(folder, with_pip=True)
        install = [folder / "bin/pip", "install", "--quiet"]
    subprocess.run([*install, f"{ROOT}[openvino]"], check=True)
    yield folder / "bin"
    shutil.rmtree(folder)


def run(command: list[str | Path]) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from vistower import SessionOptions, VisionEncoder

bundle, *files = sys.argv[1:]
strict = SessionOptions(strict=True, buckets=(1, 4))
ours, other = (VisionEncoder.open(bundle, device=name) for name in ("cpu", "openvino"))
want = ours.encode(files)
norms = np.linalg.norm(want.patches, axis=-1, keepdims=True)
for encoder in (other, VisionEncoder.open(bundle, device="openvino", options=strict)):
    nodes = encoder.session.placement.nodes
    assert list(nodes) == ["OpenVINOExecutionProvider"], nodes
    for size in (1, 3, 2):
        have = encoder.encode(files, batch_size=size)
        assert np.abs(have.cls - want.cls).max() / norms.min() < 1e-5
        assert (np.abs(have.patches - want.patches) / norms).max() < 1e-5
with ThreadPoolExecutor(4) as pool:
    for have in pool.map(lambda _: other.encode(files), range(8)):
        assert (np.abs(have.patches - want.patches) / norms).max() < 1e-5
"""


@pytest.mark.slow
def test_the_openvino_extra_from_picture_files_to_the_golden_tokens(
    environment: Path, clip_bundle: Path, dinov3_bundle: Path
) -> None:
    found = json.loads(run([environment / "vistower", "doctor", "--json", "--device", "openvino"]))
    assert list(found["onnxruntime_wheels"]) == ["onnxruntime-openvino"]
    assert found["checks"][1]["works"]
    for bundle in (clip_bundle, dinov3_bundle):
        replayed = run([environment / "vistower", "verify", bundle, "--device", "openvino"])
        assert "portable graph, tokens of" in replayed
        assert "ort graph" not in replayed
        run([environment / "python", "-c", PROGRAM, bundle, *SAMPLES])
    assert run([environment / "vistower", "verify", clip_bundle, "--device", "cpu"])
