"""Devices are had or refused, with the cause; on a machine faked at its edges (`fake_gpu`)."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fake_gpu import OUT_OF_MEMORY, FakeGpu
from vistower import CLIPMixin, SessionOptions, VisionEncoder
from vistower.errors import (
    BatchMemoryError,
    BundleCorruptError,
    CudaLibraryError,
    DeviceError,
    DeviceMemoryError,
    DriverError,
    InferenceError,
    NodePlacementError,
    NoSuchDeviceError,
    PrecisionError,
    ProviderMissingError,
)
from vistower.execution.cuda_machine import load_library, needed_libraries
from vistower.execution.cuda_problems import choose_device, problems
from vistower.execution.device import Device, parse_device, parse_providers
from vistower.execution.ort import installed_wheels
from vistower.execution.providers import cuda_options
from vistower.execution.replicas import Replicas
from vistower.execution.session import Session
from vistower.execution.tensorrt import EngineKey, tensorrt_options
from vistower.families import find_family
from vistower.precision import choose_precision
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

# What may be asked for


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("auto", None),
        ("cpu", Device("cpu")),
        ("cuda", Device("cuda", 0)),
        ("cuda:3", Device("cuda", 3)),
        ("tensorrt", Device("tensorrt", 0)),
        ("tensorrt:1", Device("tensorrt", 1)),
        ("openvino", Device("openvino")),
        (torch.device("cpu"), Device("cpu")),
        (torch.device("cpu", 0), Device("cpu")),
        ("cpu:0", Device("cpu")),
        ("cpu:1", Device("cpu")),
        (0, Device("cuda", 0)),
        (np.int64(1), Device("cuda", 1)),
        (torch.device(1), Device("cuda", 1)),
        (torch.device("cuda"), Device("cuda", 0)),
        (torch.device("cuda", 2), Device("cuda", 2)),
        (SimpleNamespace(type="cuda", index=1), Device("cuda", 1)),
    ],
)
def test_devices(given: Any, means: Device | None) -> None:
    assert parse_device(given) == means


@pytest.mark.parametrize(
    "given",
    [
        *("gpu", "openvino:0", "", torch.device("meta"), None),
        # torch takes none of these either.
        *("0", -1, True, 0.0, "CUDA", "cuda:", "cuda:-1", "cuda:a", "cuda:00", "cuda:\u0663"),
        *("cpu:", "cpu:-1", "cpu:01"),
    ],
)
def test_unknown_devices(given: Any) -> None:
    with pytest.raises(DeviceError, match="Use 'auto'"):
        parse_device(given)


@pytest.mark.parametrize("given", ["cpu:0", "cpu:1", torch.device("cpu", 0)])
def test_an_index_of_the_cpu_is_ignored_as_torch_does(given: Any, clip_bundle: Path) -> None:
    assert torch.zeros(1, device=given).device == torch.device("cpu")
    assert VisionEncoder.open(clip_bundle, device=given).device == "cpu"


def test_an_integer_is_a_cuda_device_or_refused(clip_bundle: Path) -> None:
    if not problems(Device("cuda")):
        assert VisionEncoder.open(clip_bundle, device=0).device == "cuda:0"
        return
    with pytest.raises(DeviceError, match="device='cuda:0'"):
        VisionEncoder.open(clip_bundle, device=0)


def test_providers_as_onnxruntime_takes_them() -> None:
    cuda = ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": True})
    device, pairs = parse_providers([cuda, "CPUExecutionProvider"])
    assert device == Device("cuda", 1)
    options = {"device_id": "1", "use_tf32": "True"}
    assert pairs == (("CUDAExecutionProvider", options), ("CPUExecutionProvider", {}))
    assert parse_providers(["OpenVINOExecutionProvider"])[0].provider == "OpenVINOExecutionProvider"
    both = ["AzureExecutionProvider", "CPUExecutionProvider"]
    assert parse_providers(both) == parse_providers(["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="computes nothing"):
        parse_providers(["AzureExecutionProvider"])
    for wrong in ([], "CPUExecutionProvider", [3], [("CPUExecutionProvider",)]):
        with pytest.raises(DeviceError, match="not a list of providers"):
            parse_providers(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [True, False])
def test_providers_of_a_session(every: bool, clip_bundle: Path) -> None:
    if every and onnxruntime.get_available_providers()[-2:-1] not in (
        [],
        ["AzureExecutionProvider"],
    ):
        pytest.skip("this wheel has more than the CPU's providers")
    providers = onnxruntime.get_available_providers() if every else ["CPUExecutionProvider"]
    encoder = VisionEncoder.open(clip_bundle, providers=providers)
    assert encoder.device == "cpu"
    expected = VisionEncoder.open(clip_bundle, device="cpu").encode(SAMPLES[0])
    again = pickle.loads(pickle.dumps(encoder))
    assert np.array_equal(again.encode(SAMPLES[0]).cls, expected.cls)
    for both in ({"device": "cpu"}, {"devices": ["cpu"]}):
        with pytest.raises(DeviceError, match="Give one of"):
            VisionEncoder.open(clip_bundle, providers=["CPUExecutionProvider"], **both)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="were both given"):
        Session(encoder.session.graph, "cpu", providers=["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="OpenVINO"):
        VisionEncoder.open(clip_bundle, providers=["OpenVINOExecutionProvider"])


# Causes


def bend(gpu: FakeGpu, how: str) -> None:
    match how:
        case "wheel without CUDA":
            gpu.providers, gpu.wheels = ["CPUExecutionProvider"], {"onnxruntime": "1.32.0"}
        case "both wheels":
            gpu.wheels = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
        case "library missing":
            gpu.missing = {"libcublasLt.so.13"}
        case "another CUDA major":
            gpu.missing, gpu.only = {"libcublasLt.so.13"}, {"libcublasLt.so.12"}
        case "no driver":
            gpu.missing = {"libcuda.so.1"}
        case "driver without GPU":
            gpu.cu_init = 100
        case "driver and module differ":
            gpu.cu_init = 803
        case "driver too old":
            gpu.cuda_version = 12080
        case "index":
            gpu.gpus = []
        case "out of memory":
            gpu.fails_to_open = OUT_OF_MEMORY
        case "driver, found out late":
            gpu.fails_to_open = "CUDA failure 35: CUDA driver version is insufficient ; GPU=0"
        case "GPU too old":
            gpu.fails_to_open = "CUDA failure 209: no kernel image is available for execution"
        case "fell back":
            gpu.falls_back = True


CAUSES = [
    ("wheel without CUDA", ProviderMissingError, r"onnxruntime 1\.\d+\.\d+ is built without CUDA"),
    ("both wheels", ProviderMissingError, "both onnxruntime and onnxruntime-gpu are installed"),
    ("library missing", CudaLibraryError, r"needs libcublasLt\.so\.13, which cannot be loaded"),
    ("another CUDA major", CudaLibraryError, r"this machine has libcublasLt\.so\.12, of another"),
    ("no driver", DriverError, r"no NVIDIA driver \(libcuda\.so\.1"),
    ("driver without GPU", DriverError, "it finds no GPU: start the container with GPUs"),
    ("driver and module differ", DriverError, "kernel module and user library differ"),
    ("driver too old", DriverError, r"serves CUDA 12\.8, and this wheel needs CUDA 13"),
    ("index", NoSuchDeviceError, "there is no GPU 0; there are: none"),
    ("out of memory", DeviceMemoryError, "Failed to allocate memory for requested buffer"),
    ("driver, found out late", DriverError, "update the NVIDIA driver"),
    ("GPU too old", DriverError, "no code for so old or so new a GPU"),
    ("fell back", DeviceError, "made a session with CPUExecutionProvider"),
]


@pytest.mark.parametrize(("how", "error", "says"), CAUSES, ids=[cause[0] for cause in CAUSES])
def test_the_cause_is_named(
    how: str,
    error: type[DeviceError],
    says: str,
    gpu: FakeGpu,
    clip_bundle: Path,
) -> None:
    bend(gpu, how)
    for device in ("cuda", torch.device("cuda", 0)):
        with pytest.raises(error, match=says) as caught:
            VisionEncoder.open(clip_bundle, device=device)
        assert type(caught.value) is error
    with pytest.raises(error, match=says):
        CLIPMixin(model_path=str(clip_bundle), device="cuda")
    with pytest.raises(error, match=says):
        VisionEncoder.open(clip_bundle, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


CUDA_CALL = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, "
    "void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, int) [with "
    "ERRTYPE = cudaError; bool THRW = true] CUDA failure 100: no CUDA-capable device is detected ; "
    "GPU=-1 ; hostname=vm ; file=cuda_execution_provider.cc ; line=282 ; expr=cudaSetDevice(0); \n"
)
"""As onnxruntime-gpu 1.31.1 says it."""


def test_errors_are_shown_without_their_signatures(gpu: FakeGpu, clip_bundle: Path) -> None:
    gpu.fails_to_open = CUDA_CALL
    with pytest.raises(DriverError) as caught:
        VisionEncoder.open(clip_bundle, device="cuda")
    assert "onnx: CUDA failure 100: no CUDA-capable device is detected: start the" in str(
        caught.value
    )
    assert "THRW" not in str(caught.value)


@pytest.mark.parametrize("same_place", [True, False])
def test_two_wheels_collide_only_in_one_place(
    same_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / "front", tmp_path / ("front" if same_place else "behind")]
    for name, place in zip(("onnxruntime-gpu", "onnxruntime"), places, strict=True):
        (place / "onnxruntime").mkdir(parents=True, exist_ok=True)
        (place / "onnxruntime/__init__.py").touch()
        metadata = place / f"{name.replace('-', '_')}-1.31.1.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n")
    for place in reversed(places):
        monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    expected = ["onnxruntime", "onnxruntime-gpu"] if same_place else ["onnxruntime-gpu"]
    assert list(installed_wheels()) == expected
    monkeypatch.setattr(sys, "path", [])
    assert installed_wheels() == {}


def test_every_problem_is_reported(gpu: FakeGpu) -> None:
    gpu.missing, gpu.needed = {"libcublas.so.13", "libcuda.so.1"}, ("libcublas.so.13",)
    assert [problem.error for problem in problems(Device("cuda"))] == [
        CudaLibraryError,
        DriverError,
    ]
    gpu.missing, gpu.needed = {"libnvinfer.so.10"}, ("libnvinfer.so.10", "libcuda.so.1")
    (only,) = problems(Device("tensorrt"))
    assert "TensorRT provider needs libnvinfer.so.10" in str(only)


def test_a_gpu_that_is_not_there(gpu: FakeGpu, clip_bundle: Path) -> None:
    with pytest.raises(NoSuchDeviceError, match=r"no GPU 2; there are: 0 \(NVIDIA H200\), 1"):
        VisionEncoder.open(clip_bundle, device="cuda:2")


def test_auto_says_what_it_took_and_why(
    gpu: FakeGpu,
    clip_bundle: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="vistower"):
        encoder = VisionEncoder.open(clip_bundle)
        assert encoder.device == "cuda:0"
        gpu.missing = {"libcublasLt.so.13"}
        encoder = VisionEncoder.open(clip_bundle)
        assert encoder.device == "cpu"
        assert "libcublasLt.so.13" in encoder.session.reason  # type: ignore[union-attr]
    first, second = (record.getMessage() for record in caplog.records)
    assert "on cuda:0 (CUDAExecutionProvider); auto: a CUDA device can be used; fp32:" in first
    assert "on cpu (CPUExecutionProvider); auto: no CUDA: the provider needs libcubl" in second


def test_a_damaged_graph_is_not_blamed_on_the_device(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleCorruptError, match="cannot be loaded"):
        Session(tmp_path / "model.onnx", "cpu")


def test_linked_libraries_are_read_from_the_file(tmp_path: Path) -> None:
    capi = Path(onnxruntime.__file__).parent / "capi"
    (binding,) = capi.glob("onnxruntime_pybind11_state*.so")
    found = needed_libraries(binding)
    assert "libc.so.6" in found
    assert all(name.startswith(("lib", "ld-")) for name in found)
    (tmp_path / "text").write_text("no library")
    assert needed_libraries(tmp_path / "text") == ()


def test_libraries_of_nvidias_wheels_are_found_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=r"libcufake\.so\.13: cannot open"):
        load_library("libcufake.so.13")
    for folder in ("nvidia/cu13/lib", "tensorrt_libs"):
        (tmp_path / folder).mkdir(parents=True)
    # Any loadable library will do.
    (binding,) = (Path(onnxruntime.__file__).parent / "capi").glob("*shared.so")
    shutil.copy(binding, tmp_path / "nvidia/cu13/lib/libcufake.so.13")
    shutil.copy(binding, tmp_path / "tensorrt_libs/libnvfake.so.10")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("nvidia", "tensorrt_libs"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    load_library("libcufake.so.13")
    load_library("libnvfake.so.10")


# Node placement


def test_compute_nodes_on_the_cpu(
    gpu: FakeGpu,
    clip_bundle: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu.nodes_on_cpu = [("Shape", "s"), ("Gather", "g"), ("LayerNormalization", "layers.1.norm1")]
    session = VisionEncoder.open(clip_bundle, device="cuda").session
    assert session.placement.on_cpu == ("LayerNormalization layers.1.norm1",)  # type: ignore[union-attr]
    assert session.placement.nodes["CUDAExecutionProvider"] == 9  # type: ignore[union-attr]
    assert "1 compute nodes" in caplog.text
    strict = SessionOptions(strict=True)
    with pytest.raises(NodePlacementError, match=r"LayerNormalization layers\.1\.norm1"):
        VisionEncoder.open(clip_bundle, device="cuda", options=strict)
    gpu.nodes_on_cpu = [("Shape", "s")]
    assert VisionEncoder.open(clip_bundle, device="cuda", options=strict).device == "cuda:0"
    assert gpu.config[-1]["session.record_ep_graph_assignment_info"] == "1"


def test_strict_where_onnxruntime_cannot_tell(
    gpu: FakeGpu,
    clip_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vistower.execution.loading.can_read_placement", lambda session: False)
    monkeypatch.setattr("vistower.execution.placement.can_read_placement", lambda session: False)
    encoder = VisionEncoder.open(clip_bundle, device="cuda", options=SessionOptions(strict=True))
    assert encoder.session.placement is None  # type: ignore[union-attr]
    assert gpu.config[-1]["session.disable_cpu_ep_fallback"] == "1"
    gpu.fails_to_open = (
        "This session contains graph nodes that are assigned to the default CPU EP, but fallback "
        "to CPU EP has been explicitly disabled by the user."
    )
    with pytest.raises(NodePlacementError, match="would run on the CPU"):
        VisionEncoder.open(clip_bundle, device="cuda", options=SessionOptions(strict=True))


# Options


def test_cuda_options() -> None:
    assert cuda_options(Device("cuda", 1), SessionOptions()) == {
        "device_id": "1",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    options = SessionOptions(
        tf32=True, memory_limit=2**31, buckets=(1, 8), cuda_graphs=True, stream=94
    )
    more = cuda_options(Device("cuda"), options)
    assert more["use_tf32"] == more["enable_cuda_graph"] == "1"
    assert more["gpu_mem_limit"] == "2147483648"
    assert more["user_compute_stream"] == "94"


@pytest.mark.parametrize(
    "wrong",
    [
        {"buckets": (8, 1)},
        {"buckets": (0, 4)},
        {"buckets": (4, 4)},
        {"cuda_graphs": True},
        {"cuda_graphs": True, "buckets": (1,), "shrink": True},
        {"memory_limit": 0},
    ],
)
def test_options_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(DeviceError):
        SessionOptions(**wrong)


def test_the_users_options_win(gpu: FakeGpu, clip_bundle: Path) -> None:
    cuda = ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 1})
    encoder = VisionEncoder.open(clip_bundle, providers=[cuda, "CPUExecutionProvider"])
    assert encoder.device == "cuda:1"
    asked = gpu.opened[-1]["CUDAExecutionProvider"]
    assert asked["use_tf32"] == "1"
    assert asked["arena_extend_strategy"] == "kSameAsRequested"


def test_tensorrt_takes_the_portable_graph_and_keeps_its_engine(
    gpu: FakeGpu,
    clip_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu.needed = (*gpu.needed, "libnvinfer.so.10")
    options = SessionOptions(engine_cache=tmp_path, buckets=(1, 16))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(DeviceError, match="NVIDIA_TF32_OVERRIDE=0"):
        VisionEncoder.open(clip_bundle, device="tensorrt", options=options)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    encoder = VisionEncoder.open(clip_bundle, device="tensorrt", options=options)
    assert encoder.device == "tensorrt:0"
    assert encoder.session.graph.name == "model.onnx"  # type: ignore[union-attr]
    asked = gpu.opened[-1]
    assert list(asked) == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    (engines,) = tmp_path.iterdir()
    tensorrt = asked["TensorrtExecutionProvider"]
    assert tensorrt["trt_engine_cache_path"] == tensorrt["trt_timing_cache_path"] == str(engines)
    assert tensorrt["trt_profile_min_shapes"] == "pixel_values:1x3x224x224"
    assert tensorrt["trt_profile_max_shapes"] == "pixel_values:16x3x224x224"
    assert "NVIDIA_H200-sm90-ort" in engines.name
    assert "trt101300-batch16" in engines.name
    graphs = SessionOptions(engine_cache=tmp_path, buckets=(1,), cuda_graphs=True)
    with pytest.raises(DeviceError, match="cuda_graphs is for device='cuda'"):
        VisionEncoder.open(clip_bundle, device="tensorrt", options=graphs)


def test_an_engine_belongs_to_one_model_gpu_and_version() -> None:
    key = {"model": "a" * 64, "gpu": "NVIDIA A100-SXM4/80GB-sm80", "versions": "ort1.31-trt10"}
    keys = [EngineKey(**key, batch=8, tf32=False)]
    keys += [
        EngineKey(**(key | {name: "other"}), batch=8, tf32=False)
        for name in ("model", "gpu", "versions")
    ]
    keys += [EngineKey(**key, batch=9, tf32=False), EngineKey(**key, batch=8, tf32=True)]
    names = {one.directory for one in keys}
    assert len(names) == len(keys)
    assert not any(set(name) & set("/ \\:") for name in names)
    shape, options = (3, 224, 224), SessionOptions(tf32=True)
    made = tensorrt_options(Device("tensorrt", 1), options, shape, Path("/engines"))
    assert made["device_id"] == "1"


# Precision


@pytest.mark.parametrize(
    ("wanted", "device", "family", "capability", "takes"),
    [
        ("auto", "cpu", "clip_vision_model", None, ("fp32", "fp32", False)),
        ("auto", "cpu", "dinov3_vit", None, ("fp32", "fp32", False)),
        ("auto", "cuda", "clip_vision_model", (9, 0), ("fp16", "fp16", False)),
        ("auto", "cuda", "dinov3_vit", (8, 0), ("bf16", "bf16", False)),
        ("auto", "cuda", "dinov3_vit", (7, 5), ("fp32", "fp32", False)),
        ("auto", "cuda", "dinov3_vit", None, ("fp32", "fp32", False)),
        ("auto", "cuda", "dinov2", (9, 0), ("fp32", "fp32", False)),
        ("tf32", "cuda", "dinov3_vit", (8, 0), ("tf32", "fp32", True)),
        ("fp16", "cuda", "dinov3_vit", (7, 5), ("fp16", "fp16", False)),
        ("int8", "cpu", "dinov3_vit", None, ("int8", "int8", False)),
    ],
)
def test_precision_rules(
    wanted: str, device: str, family: str, capability: Any, takes: tuple[str, str, bool]
) -> None:
    choice = choose_precision(
        wanted,
        parse_device(device) or Device("cpu"),
        family=find_family(family),
        available=("fp32", "fp16", "bf16", "int8"),
        compute_capability=capability,
    )
    assert (choice.precision, choice.graph, choice.tf32) == takes
    assert choice.reason


@pytest.mark.parametrize(
    ("wanted", "device", "capability", "says"),
    [
        ("bf16", "cpu", None, "cpu computes in fp32, int8"),
        ("tf32", "cpu", None, "cpu computes in fp32, int8"),
        ("int8", "cuda", (9, 0), "cuda computes in fp32, tf32, fp16, bf16"),
        ("bf16", "cuda", (7, 5), "needs compute capability 8.0, and the GPU's is 7.5"),
        ("fp16", "cuda", (9, 0), "no fp16 graph"),
        ("fp8", "cuda", (9, 0), "not known"),
    ],
)
def test_precision_is_had_or_refused(wanted: str, device: str, capability: Any, says: str) -> None:
    with pytest.raises(PrecisionError, match=says):
        choose_precision(
            wanted,
            parse_device(device) or Device("cpu"),
            family=find_family("dinov3_vit"),
            available=("fp32", "bf16"),
            compute_capability=capability,
        )


@pytest.fixture(scope="module")
def halves(clip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an fp16 graph beside the fp32 ones."""
    output = tmp_path_factory.mktemp("bundles") / "halves"
    checkpoint = resolve_checkpoint(str(clip_checkpoint))
    return export_bundle(checkpoint, output, precisions=["fp16"], uint8=True).directory


def test_an_encoder_takes_half_precision_on_a_gpu_and_a_mixin_does_not(
    gpu: FakeGpu,
    halves: Path,
    clip_bundle: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with caplog.at_level("INFO", logger="vistower"):
        assert VisionEncoder.open(halves, device="cuda").graph.precision == "fp16"
        assert caplog.messages[-1].endswith("; fp16: auto on a GPU is fp16 for clip_vision_model")
        assert VisionEncoder.open(clip_bundle, device="cuda").graph.precision == "fp32"
        assert "; fp32: auto would take fp16, but the bundle has no fp16" in caplog.messages[-1]
    assert VisionEncoder.open(halves, device="cpu").graph.precision == "fp32"
    assert VisionEncoder.open(halves, devices=["cuda", "cpu"]).graph.precision == "fp32"
    assert gpu.opened[-1]["CUDAExecutionProvider"]["use_tf32"] == "0"
    assert VisionEncoder.open(halves, device="cuda", precision="tf32").graph.precision == "fp32"
    assert gpu.opened[-1]["CUDAExecutionProvider"]["use_tf32"] == "1"
    mixin = CLIPMixin(model_path=str(halves), device="cuda")
    assert mixin.model.encoder.graph.precision == "fp32"
    assert gpu.opened[-1]["CUDAExecutionProvider"]["use_tf32"] == "0"
    monkeypatch.setenv("VISTOWER_PRECISION", "fp16")
    assert CLIPMixin(model_path=str(halves), device="cuda").model.encoder.graph.precision == "fp16"


def test_uint8_pixels_are_what_is_uploaded(gpu: FakeGpu, halves: Path) -> None:
    options = SessionOptions(buckets=(2,))
    encoder = VisionEncoder.open(halves, device="cuda", graph="ort_uint8", options=options)
    assert encoder.session.input_dtype == np.uint8
    assert encoder.preprocess(SAMPLES).dtype == np.uint8
    want = VisionEncoder.open(halves, device="cpu").encode(SAMPLES)
    assert np.abs(encoder.encode(SAMPLES).cls - want.cls).max() <= 1e-3


# Running


def pixels(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, 3, 224, 224), dtype=np.float32)


def graph(bundle: Path) -> Path:
    return bundle / "onnx/model_ort.onnx"


@pytest.fixture
def tokens(clip_bundle: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """`last_hidden_state` of `pixels(7)` by the plain CPU session."""
    return Session(graph(clip_bundle), "cpu").run(pixels(7))


def test_io_binding_gives_the_plain_sessions_numbers(
    clip_bundle: Path, tokens: np.ndarray[Any, Any]
) -> None:
    session = Session(graph(clip_bundle), "cpu", options=SessionOptions(buckets=(2, 4)))
    batch = pixels(7)
    for count in (7, 1, 2, 3, 4, 5):
        have = session.run(batch[:count])
        assert have.shape == (count, 50, 64)
        assert np.abs(have - tokens[:count]).max() <= 1e-5
    kept = session.run(batch[:2])
    session.run(batch[2:4])
    assert np.abs(kept - tokens[:2]).max() <= 1e-5


@pytest.fixture(scope="module")
def open_sizes(clip_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another exporter, whose graph leaves every size open but the last."""
    bundle = tmp_path_factory.mktemp("bundles") / "open-sizes"
    shutil.copytree(clip_bundle, bundle)
    (bundle / "vistower.json").unlink()
    model = onnx.load(bundle / "onnx/model.onnx")
    for value, names in (
        (model.graph.input[0], ("batch", "num_channels", "height", "width")),
        (model.graph.output[0], ("batch", "tokens")),
    ):
        for size, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            size.dim_param = name
    onnx.save(model, bundle / "onnx/model.onnx")
    return bundle


def test_a_graph_that_leaves_its_sizes_open(
    open_sizes: Path,
    gpu: FakeGpu,
    tokens: np.ndarray[Any, Any],
) -> None:
    for device in ("cpu", "cuda"):
        for options in (None, SessionOptions(buckets=(2, 4))):
            encoder = VisionEncoder.open(open_sizes, device=device, options=options)
            encoder = pickle.loads(pickle.dumps(encoder))
            assert np.abs(encoder.forward(pixels(7)) - tokens).max() <= 1e-4
            assert encoder.encode(SAMPLES[0]).patches.shape == (1, 49, 64)
            assert encoder.warmup((2,))
    with pytest.raises(BundleCorruptError, match="every size but the batch fixed"):
        Session(open_sizes / "onnx/model.onnx", "cpu")


def test_buckets_bound_the_shapes(gpu: FakeGpu, clip_bundle: Path) -> None:
    options = SessionOptions(buckets=(1, 4))
    session = Session(graph(clip_bundle), "cuda", options=options)
    for count in (1, 2, 3, 4, 5, 9):
        session.run(pixels(count))
    assert [run.size for run in gpu.runs] == [1, 4, 4, 4, 4, 1, 4, 4, 1]
    assert {run.thread for run in gpu.runs} == {"vistower-gpu-0_0"}


def test_padding_is_zeros_whatever_ran_before(clip_bundle: Path) -> None:
    batch = pixels(3)
    fresh = Session(graph(clip_bundle), "cpu", options=SessionOptions(buckets=(4,)))
    expected = fresh.run(batch)
    used = Session(graph(clip_bundle), "cpu", options=SessionOptions(buckets=(4,)))
    used.run(np.full((4, 3, 224, 224), np.nan, np.float32))
    assert np.array_equal(used.run(batch), expected)


def test_a_wrong_batch_is_refused_before_it_is_read_by_address(clip_bundle: Path) -> None:
    session = Session(graph(clip_bundle), "cpu", options=SessionOptions(buckets=(4,)))
    for wrong in (pixels(2).astype(np.float64), pixels(2)[..., :100]):
        with pytest.raises(InferenceError, match=r"takes \(B, 3, 224, 224\) of float32"):
            session.run(wrong)
    strided = pixels(4)[::2]
    assert np.abs(session.run(strided) - session.run(strided.copy())).max() == 0


def test_cuda_graphs_are_captured_in_warmup_and_replayed(
    gpu: FakeGpu,
    clip_bundle: Path,
    tokens: np.ndarray[Any, Any],
) -> None:
    options = SessionOptions(buckets=(1, 4), cuda_graphs=True)
    session = Session(graph(clip_bundle), "cuda", options=options)
    assert gpu.opened[-1]["CUDAExecutionProvider"]["enable_cuda_graph"] == "1"
    session.run(pixels(2))
    assert [run.graph for run in gpu.runs] == ["-1"]
    report = session.warmup()
    assert [(one.batch_size, one.graph) for one in report] == [(1, True), (4, True)]
    assert all(one.first > 0 and one.next > 0 for one in report)
    gpu.runs.clear()
    have = session.run(pixels(7))
    assert [(run.size, run.graph) for run in gpu.runs] == [(4, "2"), (4, "2")]
    assert np.abs(have - tokens).max() <= 1e-5
    session.run(pixels(1))
    assert gpu.runs[-1].graph == "1"
    assert {run.thread for run in gpu.runs} == {"vistower-gpu-0_0"}


def test_a_captured_graph_with_other_numbers_is_not_used(
    gpu: FakeGpu,
    clip_bundle: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def spoil(binding: Any) -> None:
        binding.get_outputs()[0].numpy()
        output = binding.get_outputs()[0]
        (output.update_inplace(output.numpy() * 2))

    gpu.replay = spoil
    options = SessionOptions(buckets=(2,), cuda_graphs=True)
    session = Session(graph(clip_bundle), "cuda", options=options)
    (report,) = session.warmup()
    assert not report.graph
    assert "is not used" in caplog.text
    session.run(pixels(2))
    assert gpu.runs[-1].graph == "-1"


def test_a_capture_that_fails_says_so(gpu: FakeGpu, clip_bundle: Path) -> None:
    def fail(binding: Any) -> None:
        raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")

    gpu.replay = fail
    options = SessionOptions(buckets=(2,), cuda_graphs=True)
    session = Session(graph(clip_bundle), "cuda", options=options)
    with pytest.raises(InferenceError, match="batch size 2 could not be captured: CUDA failure"):
        session.warmup()


def test_warmup_of_an_encoder(clip_bundle: Path) -> None:
    encoder = VisionEncoder.open(clip_bundle, device="cpu")
    report = encoder.warmup((1, 3))
    assert [(one.batch_size, one.graph) for one in report] == [(1, False), (3, False)]


def test_one_thread_serves_all_callers(gpu: FakeGpu, clip_bundle: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    session = Session(graph(clip_bundle), "cuda:1")
    batches = [pixels(1, seed) for seed in range(8)]
    expected = Session(graph(clip_bundle), "cpu")
    with ThreadPoolExecutor(4) as pool:
        for batch, have in zip(batches, pool.map(session.run, batches), strict=True):
            assert np.abs(have - expected.run(batch)).max() <= 1e-5
    assert {run.thread for run in gpu.runs} == {"vistower-gpu-1_0"}


def test_pinned_blocks_are_used_again(gpu: FakeGpu, clip_bundle: Path) -> None:
    session = Session(graph(clip_bundle), "cuda")
    pool = session._memory.pool  # type: ignore[attr-defined]
    for _ in range(5):
        batch = session.empty(2)
        batch[:] = pixels(2)
        view = session.run(batch)[0, 1:]
        del batch
    # One for the batches; two for results, because the last one lives while the next is made.
    assert sum(map(len, pool._free.values())) + 1 == len(session._memory.blocks) == 3  # type: ignore[attr-defined]
    before = view.copy()
    session.run(pixels(2, 1))
    assert np.array_equal(view, before)


def test_out_of_memory_halves_the_batch_once(
    gpu: FakeGpu,
    clip_bundle: Path,
    tokens: np.ndarray[Any, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = Session(graph(clip_bundle), "cuda")
    gpu.largest_batch = 4
    have = session.run(pixels(7))
    assert np.abs(have - tokens).max() <= 1e-5
    assert [run.size for run in gpu.runs] == [7, 4, 3]
    assert [run.shrink for run in gpu.runs] == [None, "cpu:0", "cpu:0"]
    assert "cuda:0 ran out of memory for a batch of 7" in caplog.text
    assert "halves of 4" in caplog.text
    gpu.largest_batch = 3
    with pytest.raises(BatchMemoryError, match="smaller batch_size") as caught:
        session.run(pixels(7))
    assert isinstance(caught.value, MemoryError)
    assert caught.value.__cause__ is not None
    gpu.largest_batch = 0
    with pytest.raises(BatchMemoryError):
        session.run(pixels(1))


def test_other_failures_are_not_retried(
    gpu: FakeGpu,
    clip_bundle: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = Session(graph(clip_bundle), "cuda")

    def fail(*arguments: Any) -> None:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered\nstack")

    session._session.run_with_iobinding = fail
    with pytest.raises(InferenceError, match=r"illegal memory access was encountered$"):
        session.run(pixels(2))
    assert not caplog.text


# Results on the device


def test_dlpack_shares_memory(clip_bundle: Path, tokens: np.ndarray[Any, Any]) -> None:
    encoder = VisionEncoder.open(clip_bundle, device="cpu")
    array = encoder.forward_on_device(pixels(7))
    assert array.shape == (7, 50, 64)
    assert array.device == "cpu"
    tensor = torch.from_dlpack(array)
    assert torch.from_dlpack(array).data_ptr() == tensor.data_ptr()
    assert np.shares_memory(np.from_dlpack(array), tensor.numpy())
    del array, encoder
    assert np.abs(tensor.numpy() - tokens).max() <= 1e-5


def test_dlpack_does_not_copy_or_move(clip_bundle: Path) -> None:
    array = VisionEncoder.open(clip_bundle, device="cpu").forward_on_device(pixels(1))
    for asked in ({"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            array.__dlpack__(**asked)  # type: ignore[arg-type]
    assert array.__dlpack__(stream=None, max_version=(1, 0), dl_device=(1, 0)) is not None


def test_a_result_on_the_device_is_the_callers_own(
    gpu: FakeGpu,
    clip_bundle: Path,
    tokens: np.ndarray[Any, Any],
) -> None:
    options = SessionOptions(buckets=(2, 4))
    encoder = VisionEncoder.open(clip_bundle, device="cuda", options=options)
    first = encoder.forward_on_device(pixels(7))
    encoder.forward_on_device(pixels(7, 1))
    assert np.abs(first.numpy() - tokens).max() <= 1e-5


# Several devices


def test_devices_share_a_batch(clip_bundle: Path, tokens: np.ndarray[Any, Any]) -> None:
    encoder = VisionEncoder.open(clip_bundle, devices=["cpu", "cpu", "cpu"], threads=3)
    assert isinstance(encoder.session, Replicas)
    assert encoder.device == "cpu,cpu,cpu"
    assert [session.threads for session in encoder.session.sessions] == [1, 1, 1]
    counted: list[int] = []
    for session in encoder.session.sessions:
        plain = session.compute
        session.compute = lambda batch, wanted, plain=plain: (  # type: ignore[method-assign]
            counted.append(len(batch)),
            plain(batch, wanted),
        )[1]
    assert np.abs(encoder.forward(pixels(7)) - tokens).max() <= 1e-5
    assert sorted(counted) == [2, 2, 3]
    assert len(encoder.warmup((2,))) == 3
    again = pickle.loads(pickle.dumps(VisionEncoder.open(clip_bundle, devices=["cpu", "cpu"])))
    assert np.abs(again.forward(pixels(7)) - tokens).max() <= 1e-5
    with pytest.raises(DeviceError, match="one encoder per device"):
        again.forward_on_device(pixels(1))


def test_two_gpus(gpu: FakeGpu, clip_bundle: Path, tokens: np.ndarray[Any, Any]) -> None:
    encoder = VisionEncoder.open(clip_bundle, devices=["cuda:0", "cuda:1"])
    assert np.abs(encoder.forward(pixels(7)) - tokens).max() <= 1e-5
    assert {(run.thread, run.size) for run in gpu.runs} in (
        {("vistower-gpu-0_0", 4), ("vistower-gpu-1_0", 3)},
        {("vistower-gpu-0_0", 3), ("vistower-gpu-1_0", 4)},
    )
    options = SessionOptions(buckets=(2,), cuda_graphs=True)
    both = VisionEncoder.open(clip_bundle, devices=["cuda:0", "cuda:1"], options=options)
    assert [one.graph for one in both.warmup()] == [True, True]


# Processes


def test_a_forked_child_is_told(gpu: FakeGpu, clip_bundle: Path) -> None:
    encoders = [
        VisionEncoder.open(clip_bundle, device="cuda"),
        VisionEncoder.open(clip_bundle, devices=["cpu", "cpu"]),
    ]
    encoders[0].forward(pixels(1))
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        said = []
        for encoder in encoders:
            for call in (encoder.forward, encoder.forward_on_device):
                try:
                    call(pixels(2))
                except Exception as error:
                    said.append(type(error).__name__)
        # One of its own works: the worker threads are the child's.
        said.append(str(VisionEncoder.open(clip_bundle, device="cuda").forward(pixels(1)).shape[1]))
        os.write(writer, " ".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100).decode().split() == [
        *["InferenceError"] * 3,
        "DeviceError",
        "50",
    ]


def test_an_encoder_travels_to_another_process(clip_bundle: Path, tmp_path: Path) -> None:
    import subprocess

    options = SessionOptions(buckets=(1, 2))
    encoder = VisionEncoder.open(clip_bundle, device="cpu", options=options)
    (tmp_path / "encoder").write_bytes(pickle.dumps(encoder))
    program = (
        f"import pickle; encoder = pickle.load(open({str(tmp_path / 'encoder')!r}, 'rb'))\n"
        f"print(encoder.session.options.buckets, encoder.encode({str(SAMPLES[0])!r}).cls.sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    expected = encoder.encode(SAMPLES[0]).cls.sum()
    assert done.stdout.startswith("(1, 2) ")
    assert float(done.stdout.split()[-1]) == pytest.approx(float(expected), abs=1e-3)


def test_auto_is_decided_once_by_what_the_machine_has(gpu: FakeGpu) -> None:
    assert choose_device().device == Device("cuda")
    gpu.gpus = []
    choice = choose_device()
    assert choice.device == Device("cpu")
    assert "there is no GPU 0" in choice.reason
