"""What ``vistower.json`` must be, whatever is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import forged
from vistower.bundle import Bundle
from vistower.errors import BundleCorruptError, BundleUnsupportedError


@pytest.fixture
def bundle(clip_bundle: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return forged.copied(clip_bundle, tmp_path / "bundle")


MANIFESTS: list[tuple[str, Any]] = [
    *(("layout.image_size", x) for x in ([-224, 224], [10**9, 10**9], ["224", 224], [224], 224)),
    *(("layout.image_size", x) for x in ([224.0, 224], [True, 224], [0, 0], None, [220, 220])),
    *(("layout.patch_size", x) for x in (0, -32, "32", 32.0, True, 10**30, None, [32, 32], 33)),
    *(("layout.num_register_tokens", x) for x in (-1, "0", 0.0, False, None, 10**9)),
    *(("layout.hidden_size", x) for x in (0, -64, "64", 64.5, [64], 10**12)),
    *(("graphs.ort.image_size", x) for x in ([224, 225], [0, 224], "224x224", [112])),
    *(("graphs.ort.precision", x) for x in ("fp8", "", None, 1, "FP32", ["fp32"])),
    *(("graphs.ort.pixels", x) for x in ("int8", "float16", None, 0)),
    *(("graphs.ort.domains", x) for x in (["custom"], [], "", ["com.microsoft"], [None], [""] * 9)),
    *(("graphs.ort.nodes", x) for x in (0, -1, 1.5, "64")),
    *(("graphs.ort.opset", x) for x in (0, "20", None)),
    *(("graphs.ort.parity.cosine", x) for x in ("1", None, 7, [])),
    *(("graphs.ort.parity", x) for x in ({}, None, 3)),
    *(("graphs.ort.file", x) for x in ("/etc/passwd", "../model.onnx", "onnx/../onnx/model.onnx")),
    *(
        ("graphs.ort.file", x)
        for x in ("onnx\\model.onnx", "C:/model.onnx", "", ".", "onnx/", None)
    ),
    *(("graphs.ort.file", x) for x in ("onnx/other.onnx", "onnx/./model.onnx", "a" * 5000)),
    *(("graphs", x) for x in ({}, None, [], {"ort": None}, {"x\x1b[2J": {}})),
    *(("files", x) for x in ({}, None, [], {"config.json": {}})),
    ("files", {f"f{n}": {"size": 0, "sha256": "0" * 64} for n in range(5000)}),
    *(("files/config.json/size", x) for x in (-1, "470", 1e3, True, 2**40)),
    *(("files/config.json/sha256", x) for x in ("0" * 63, "G" * 64, None, "../../x")),
    *(("source.random_weight", x) for x in (0, 1, "false", None)),
    *(("source.name", x) for x in ("\x1b[31mred", "two\nlines", "\u202egnp", "a\x00b", 5, None)),
    *(("source.model", x) for x in ("\x9b2J", ["x"], "x" * 10_000)),
    *(("preprocessing.backend", x) for x in ("numpy", None, 1)),
    *(("preprocessing.transparency", x) for x in ("black", None)),
    *(("made_with", x) for x in ({"a": 1}, {"\x07": "1"}, None, [])),
    *(("made_with", x) for x in ({}, {"torch": "2.14.1"})),
    *(("made_with.transformers", x) for x in ("../../x", "", "five", "5", "x5.23.0", "\u0665.1")),
    *(("weight_bytes", x) for x in (-1, 1.0, "1", None)),
    *((key, 1) for key in ("extra", "graphs.ort.extra", "layout.extra", "source.extra")),
]
"""Places of the manifest, and values that must not be there."""


@pytest.mark.parametrize(("place", "value"), MANIFESTS)
def test_the_manifest_keeps_its_schema(place: str, value: Any, bundle: Path) -> None:
    forged.put(bundle, place, value)
    with pytest.raises(BundleCorruptError, match=r"vistower\.json") as caught:
        Bundle.load(bundle)
    assert str(caught.value).isprintable()
    named = place.replace("/", ".").split(".")[0]
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "place", ["model_type", "layout", "graphs.ort.parity.cls", "files", "golden"]
)
def test_every_field_of_the_manifest_is_needed(place: str, bundle: Path) -> None:
    def remove(whole: dict[str, Any]) -> None:
        *way, last = place.split(".")
        for key in way:
            whole = whole[key]
        # `golden` is no field: it is known by its path.
        whole.pop(last, None)
        if last == "golden":
            del whole["files"]["golden/golden.npz"]

    forged.manifest(bundle, remove)
    with pytest.raises(BundleCorruptError, match=place.rpartition(".")[2]):
        Bundle.load(bundle)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"format_version": 1' + "0" * 100_000 + "}",
        '{"format_version": NaN}',
        '{"format_version": 1, "format_version": 1}',
        '{"format_version": 1} {}',
        "null",
        '"text"',
        "",
        "\ufeff{}",
        '{"x": "' + "y" * (9 << 20) + '"}',
        # One pass, not one from each of two million quotes.
        '{"x": "' + '\\"' * 4_000_000,
    ],
    ids=lambda text: text[:20],
)
def test_json_of_any_depth_and_length_is_one_error(text: str, bundle: Path) -> None:
    (bundle / "vistower.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleCorruptError, match=r"vistower\.json"):
        Bundle.load(bundle)
    for name in ("config.json", "preprocessor_config.json"):
        (bundle / name).write_text(text, encoding="utf-8")
    (bundle / "vistower.json").unlink()
    with pytest.raises(BundleCorruptError, match=r"config\.json"):
        Bundle.load(bundle)


@pytest.mark.parametrize("version", [1, 3, 0, "1", 1.0, True, None, [1], "\x1b[2J"])
def test_another_format_version_is_unsupported(version: Any, bundle: Path) -> None:
    forged.put(bundle, "format_version", version)
    with pytest.raises(BundleUnsupportedError, match="format version") as caught:
        Bundle.load(bundle)
    assert str(caught.value).isprintable()


def test_another_model_type_is_unsupported(bundle: Path) -> None:
    forged.put(bundle, "model_type", "swin")
    with pytest.raises(BundleUnsupportedError, match=r"'swin', and no family .* entry point"):
        Bundle.load(bundle)
