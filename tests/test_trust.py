"""A bundle is untrusted input: nothing in it is believed that a file can contradict."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import forged
import mutations
from command_line import run
from vistower import VisionEncoder
from vistower.bundle import Bundle
from vistower.errors import (
    BundleCorruptError,
    NonFiniteError,
    ProcessorConfigError,
    VistowerError,
)
from vistower.golden import replay
from vistower.tokens import TokenLayout
from vistower_export.pictures import SAMPLES


@pytest.fixture
def bundle(clip_bundle: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return forged.copied(clip_bundle, tmp_path / "bundle")


def opened(bundle: Path, graph: str = "ort") -> VisionEncoder:
    return VisionEncoder.open(bundle, device="cpu", graph=graph)


@pytest.mark.parametrize(
    ("place", "value", "config"),
    [
        ("layout.num_register_tokens", 4, {}),
        ("layout.patch_size", 16, {}),
        ("layout.hidden_size", 128, {}),
        ("model_type", "dinov3_vit", {}),
        ("layout.image_size", [448, 448], {}),
        ("layout.image_size", [448, 448], {"image_size": 448}),
        ("graphs.ort.pixels", "uint8", {}),
        # Both edited alike: the graph still knows.
        ("layout.hidden_size", 128, {"hidden_size": 128}),
        ("layout.patch_size", 16, {"patch_size": 16}),
        ("layout.num_register_tokens", 4, {"num_register_tokens": 4}),
        # 1 + 0 + 49 tokens of 32 pixels, or 1 + 33 + 16 of 56.
        ("layout", {"patch_size": 56, "num_register_tokens": 33}, {}),
    ],
)
def test_the_layout_is_compared_with_config_and_graph(
    place: str, value: Any, config: dict[str, Any], bundle: Path
) -> None:
    if isinstance(value, dict):
        config = value
        for key, one in value.items():
            forged.put(bundle, f"{place}.{key}", one)
    else:
        forged.put(bundle, place, value)
    forged.config(bundle, "config.json", **config)
    if place == "layout.image_size":
        forged.put(bundle, "graphs.portable.image_size", value)
    with pytest.raises(BundleCorruptError, match=r"says|is said to"):
        opened(bundle, "ort")
    # And where the shapes of the outputs agree with the forged layout.
    layout = TokenLayout(**json.loads((bundle / "vistower.json").read_text())["layout"])
    for name in ("ort", "portable"):
        shape = [layout.num_tokens, layout.hidden_size]
        if place != "layout.image_size":
            forged.put(bundle, f"graphs.{name}.outputs.last_hidden_state", shape)
    with pytest.raises(BundleCorruptError, match=r"says|is said to"):
        opened(bundle, "ort")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"crop_size": {"height": 192, "width": 192}}, BundleCorruptError),
        ({"do_center_crop": False}, BundleCorruptError),
        ({"size": {"shortest_edge": 10**9}}, ProcessorConfigError),
        ({"size": "224"}, ProcessorConfigError),
        ({"size": {"height": [], "width": 3}}, ProcessorConfigError),
        ({"image_processor_type": ["CLIPImageProcessor"]}, ProcessorConfigError),
        ({"resample": [3]}, ProcessorConfigError),
        ({"rescale_factor": "x"}, ProcessorConfigError),
        ({"image_std": [0, 1, 1]}, ProcessorConfigError),
        ({"image_mean": [True, 1, 1]}, ProcessorConfigError),
        ({"do_resize": "yes"}, ProcessorConfigError),
        ({"crop_size": -224}, ProcessorConfigError),
    ],
)
def test_the_processor_is_checked_and_compared(
    values: dict[str, Any], error: type[Exception], bundle: Path, tmp_path: Path
) -> None:
    forged.config(bundle, "preprocessor_config.json", **values)
    with pytest.raises(error, match=r"preprocessor_config\.json"):
        Bundle.load(bundle)
    with pytest.raises(VistowerError):
        Bundle.load(forged.foreign(bundle))


@pytest.mark.parametrize(
    ("graph", "said"), [("int8", "fp32"), ("ort", "int8"), ("fp16", "fp32"), ("ort", "bf16")]
)
def test_the_precision_is_what_the_graph_holds(
    graph: str, said: str, reduced: Path, tmp_path: Path
) -> None:
    bundle = forged.put(forged.copied(reduced, tmp_path / "b"), f"graphs.{graph}.precision", said)
    with pytest.raises(BundleCorruptError, match=f"is said to be {said}"):
        opened(bundle, graph)


@pytest.fixture(scope="module")
def reduced(clip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an int8 and an fp16 graph."""
    from vistower_export.source import resolve_checkpoint
    from vistower_export.steps import export_bundle

    output = tmp_path_factory.mktemp("reduced") / "bundle"
    checkpoint = resolve_checkpoint(str(clip_checkpoint))
    return export_bundle(checkpoint, output, precisions=["int8", "fp16"]).directory


@pytest.mark.parametrize("key", ["nodes", "opset", "ir_version"])
def test_the_graphs_own_numbers_are_compared(key: str, bundle: Path) -> None:
    forged.put(bundle, f"graphs.ort.{key}", 9)
    with pytest.raises(BundleCorruptError, match=f"has {key} .* is said to have 9"):
        opened(bundle)
    opened(bundle, "portable")


def test_another_graph_in_place_of_one(bundle: Path, dinov3_bundle: Path) -> None:
    """Its domains are those of the record; the tokens are not."""
    (bundle / "onnx/model_ort.onnx").write_bytes((bundle / "onnx/model.onnx").read_bytes())
    forged.reseal(bundle, "onnx/model_ort.onnx")
    with pytest.raises(BundleCorruptError, match=r"nodes|domains"):
        opened(bundle)


def insert(model: onnx.ModelProto, op_type: str, domain: str) -> None:
    """A node between the tower and its output."""
    last = next(n for n in model.graph.node if "last_hidden_state" in n.output)
    last.output[:] = ["before"]
    model.graph.node.append(
        helper.make_node(op_type, ["before"], ["last_hidden_state"], domain=domain)
    )


def of_its_own_function(model: onnx.ModelProto, inner: str, domain: str) -> None:
    insert(model, "Same", "local")
    body = [helper.make_node(inner, ["x"], ["y"], domain=domain)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("x", 1)]
    model.functions.append(helper.make_function("local", "Same", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))


def in_a_branch(model: onnx.ModelProto, op_type: str, domain: str) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node(op_type, ["before"], ["y"], domain=domain)
    branch = helper.make_graph([node], "branch", [], [value])
    insert(model, "If", "")
    model.graph.node[-1].attribute.append(helper.make_attribute("then_branch", branch))


@pytest.mark.parametrize(
    ("place", "op_type", "domain", "says"),
    [
        (insert, "Anything", "custom.domain", "domain 'custom.domain'"),
        (insert, "EPContext", "com.microsoft", "opens a compiled model"),
        (insert, "PythonOp", "com.microsoft", "runs Python"),
        (insert, "Loop", "", "as often as it likes"),
        (in_a_branch, "Scan", "", "as often as it likes"),
        (of_its_own_function, "Run", "x", "domain 'x'"),
        (of_its_own_function, "EPContext", "com.microsoft", "opens a compiled model"),
        (in_a_branch, "Anything", "custom.domain", "domain 'custom.domain'"),
    ],
)
def test_only_known_operators_run(
    place: Any, op_type: str, domain: str, says: str, bundle: Path
) -> None:
    name = "onnx/model.onnx"
    forged.graph(bundle, lambda model: place(model, op_type, domain), name)
    with pytest.raises(BundleCorruptError, match=says):
        opened(bundle, "portable")
    with pytest.raises(BundleCorruptError, match=says):
        opened(forged.foreign(bundle), "portable")


def test_a_graph_brings_no_settings_for_its_session(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(model: onnx.ModelProto) -> None:
        entry = model.metadata_props.add()
        entry.key, entry.value = "ort_config", '{"session_options": {"enable_profiling": true}}'

    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    monkeypatch.chdir(bundle)
    with pytest.raises(BundleCorruptError, match="ort_config"):
        opened(forged.graph(bundle, settings))
    assert not list(bundle.glob("onnxruntime_profile*"))


def located(model: onnx.ModelProto, **values: str) -> None:
    tensor = next(x for x in model.graph.initializer if x.external_data)
    for entry in tensor.external_data:
        entry.value = values.pop(entry.key, entry.value)
    for key, value in values.items():
        tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"location": "/etc/passwd"}, "no relative path inside"),
        ({"location": "../config.json"}, "no relative path inside"),
        ({"location": "../../outside"}, "no relative path inside"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "no relative path inside"),
        ({"location": ""}, "no relative path inside"),
        ({"location": "a\x1b[2J"}, "not printable"),
        ({"location": "unlisted"}, "not among the files"),
        ({"location": "nowhere"}, "does not exist"),
        ({"location": "directory"}, "is a directory"),
        ({"offset": "999999999999"}, "wants bytes up to"),
        ({"offset": "-1"}, "offset"),
        ({"length": "1e3"}, "length"),
        ({"length": "99999999999999999999"}, "length"),
        ({"prepacked_0": "x"}, "prepacked_0"),
    ],
)
def test_weights_lie_inside_the_bundle(values: dict[str, str], says: str, bundle: Path) -> None:
    (bundle.parent / "outside").write_bytes(bytes(3 << 20))
    (bundle / "onnx/unlisted").write_bytes(bytes(3 << 20))
    (bundle / "onnx/directory").mkdir()
    forged.graph(bundle, lambda model: located(model, **dict(values)), "onnx/model.onnx")
    with pytest.raises(BundleCorruptError, match=says):
        opened(bundle, "portable")
    forged.foreign(bundle)
    if values != {"location": "unlisted"}:
        with pytest.raises(BundleCorruptError, match=says):
            opened(bundle, "portable")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "directory"])
def test_nothing_but_regular_files_is_opened(
    kind: str, clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("vistower.json", "config.json", "golden/golden.npz", "onnx/model_ort.onnx")
    script = (
        "import sys; from vistower import VisionEncoder; from vistower.errors import *\n"
        "for path in sys.argv[1:]:\n"
        "    try: VisionEncoder.open(path, device='cpu', graph='ort')\n"
        "    except BundleCorruptError as error: print(error)\n"
    )
    bundles = []
    for index, name in enumerate((*names, "onnx/model.onnx_data")):
        bundle = forged.copied(clip_bundle, tmp_path / f"{index}")
        path = bundle / name
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            # By its name alone: an address has at most 107 characters.
            monkeypatch.chdir(path.parent)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        bundles.append(bundle)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *bundles],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(bundles), done.stdout
    for line, bundle, name in zip(lines, bundles, (*names, "onnx/model.onnx_data"), strict=True):
        assert f"{bundle / name} is a {kind}" in line


def test_nan_weights_are_an_error_in_float32_too(bundle: Path) -> None:
    weights = bundle / "onnx/model.onnx_data"
    data = bytearray(weights.read_bytes())
    data[1000:1004] = np.float32(np.nan).tobytes()
    weights.write_bytes(data)
    forged.reseal(bundle, "onnx/model.onnx_data")
    encoder = opened(bundle)
    for call in (encoder.encode, lambda x: next(encoder.encode_stream([x])).cls):
        with pytest.raises(NonFiniteError, match=r"in fp32 on cpu gave NaN .*weights are damaged"):
            call(SAMPLES[0])
    pixel_values = np.zeros((2, 3, 224, 224), np.float32)
    pixel_values[1, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="1 of the pixel_values hold some"):
        encoder.forward(pixel_values)


def test_escapes_in_names_never_reach_the_terminal(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("VISTOWER_CACHE", str(cache))
    name = "evil\x1b[2J\x07\u202e"
    forged.copied(bundle, cache / name)
    forged.foreign(forged.copied(bundle, cache / f"foreign{name}"))
    forged.put(forged.copied(bundle, cache / f"broken{name}"), "source.name", name)
    (bundle / "vistower.json").write_text("{}")
    texts = [
        run(capsys, "models"),
        run(capsys, "verify", cache / f"broken{name}"),
        run(capsys, "verify", cache / f"foreign{name}"),
        run(capsys, "embed", cache / f"missing{name}", SAMPLES[0], "--output", tmp_path / "x.npz"),
        run(capsys, "embed", cache / name, tmp_path / name, "--output", tmp_path / "x.npz"),
    ]
    shown = "".join(text for _, *both in texts for text in both)
    assert "evil\\x1b[2J\\x07\\u202e" in shown
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


def test_a_checkpoint_of_a_hostile_name_is_exported_under_an_escaped_one(
    clip_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = forged.copied(clip_checkpoint, tmp_path / "evil\x1b[2J\n")
    code, text, errors = run(capsys, "export", checkpoint, "--output", tmp_path / "bundle")
    assert code == 0, errors
    assert "evil\\x1b[2J\\n" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text + errors)
    assert Bundle.load(tmp_path / "bundle").name == "evil\\x1b[2J\\n"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(number=st.integers(0, 2**40))
def test_only_our_errors_come_out_of_a_damaged_bundle(
    number: int, clip_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = tmp_path_factory.mktemp("damaged") / "bundle"
    forged.copied(clip_bundle, bundle)
    mutations.mutate(bundle, number)
    with contextlib.suppress(VistowerError):
        mutations.use(bundle, np.zeros((30, 40, 3), np.uint8))


def test_the_untouched_bundle_passes(bundle: Path) -> None:
    mutations.use(bundle, SAMPLES[0])
    assert len(list(replay(Bundle.load(bundle)))) == 15
    assert json.loads((bundle / "vistower.json").read_text())["format_version"] == 2


@pytest.mark.parametrize("kind", ["itself", "each other", "laughs"])
def test_functions_do_not_write_out_without_end(kind: str, bundle: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        insert(model, "F0", "local")
        calls = {"itself": [[0]], "each other": [[1], [0]]}
        laughs = [[n + 1] * 10 for n in range(12)]
        for index, callees in enumerate(calls.get(kind, laughs)):
            body = [
                helper.make_node(f"F{callee}", ["x"], [f"y{n}"], domain="local")
                for n, callee in enumerate(callees)
            ]
            opsets = [helper.make_opsetid("local", 1)]
            function = helper.make_function("local", f"F{index}", ["x"], ["y0"], body, opsets)
            model.functions.append(function)
        body = [helper.make_node("Identity", ["x"], ["y0"])]
        opsets = [helper.make_opsetid("", 20)]
        model.functions.append(
            helper.make_function("local", f"F{len(laughs)}", ["x"], ["y0"], body, opsets)
        )
        model.opset_import.append(helper.make_opsetid("local", 1))

    forged.graph(bundle, change, "onnx/model.onnx")
    with pytest.raises(BundleCorruptError, match=r"calls itself|write out to more than"):
        opened(forged.foreign(bundle), "portable")
