"""Named outputs: what torch calls them, each compared with torch, each asked for by name."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from transformers.image_utils import load_image

import forged
import vistower_export.graph as graph_module
from command_line import run
from conftest import tiny_checkpoint
from fake_gpu import FakeGpu
from vistower import CLIPMixin, DynamicBatcher, SessionOptions, VisionEncoder
from vistower.bundle import Bundle
from vistower.errors import (
    BundleCorruptError,
    GoldenMismatchError,
    NoSuchOutputError,
    OptionError,
    ParityError,
)
from vistower.families.clip import FAMILY as CLIP
from vistower.golden import replay
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

PICTURES = list(SAMPLES[:3])
VECTORS = ("cls", "pooled", "projected")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with its projection, of another width than a token."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("projected") / "checkpoint",
        CLIP,
        hf_class="CLIPVisionModelWithProjection",
    )


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    return export_bundle(
        resolve_checkpoint(str(checkpoint)), checkpoint.with_name("bundle"), precisions=["int8"]
    )


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, np.ndarray]:
    """What transformers says of `PICTURES`."""
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint, use_fast=True)
    inputs = processor(images=[load_image(str(path)) for path in PICTURES], return_tensors="pt")
    projected = transformers.CLIPVisionModelWithProjection.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        state = projected.vision_model(**inputs)
        return {
            "cls": state.last_hidden_state[:, 0].numpy(),
            "patches": state.last_hidden_state[:, 1:].numpy(),
            "pooled": state.pooler_output.numpy(),
            "projected": projected(**inputs).image_embeds.numpy(),
        }


def close(have: np.ndarray, want: np.ndarray, rel: float = 1e-4) -> bool:
    norm = np.linalg.norm(want, axis=-1, keepdims=True)
    return have.shape == want.shape and bool((np.abs(have - want) <= rel * norm).all())


@pytest.mark.parametrize("graph", ["ort", "portable"])
def test_every_output_is_transformers(
    graph: str, bundle: Bundle, expected: dict[str, np.ndarray]
) -> None:
    encoder = VisionEncoder.open(bundle.directory, device="cpu", graph=graph)
    assert encoder.outputs == ("cls", "patches", "pooled", "projected")
    found = encoder.encode(PICTURES, batch_size=2)
    for name, want in expected.items():
        assert close(getattr(found, name), want)
    assert close(found.mean_patches, expected["patches"].mean(axis=1))
    assert found.projected.shape == (3, 24)


def test_clip_of_both_towers_gives_its_image_features(tmp_path: Path) -> None:
    """The whole model's projection has the whole model's width, whatever the vision part says."""
    vision = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    text = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 99}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config=vision | {"intermediate_size": 128, "projection_dim": 512},
        text_config=text | {"intermediate_size": 64, "eos_token_id": 2},
        projection_dim=48,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    fast = (
        transformers.CLIPImageProcessorFast
        if hasattr(transformers, "CLIPImageProcessorFast")
        else transformers.CLIPImageProcessor
    )
    fast().save_pretrained(tmp_path / "clip")
    bundle = export_bundle(resolve_checkpoint(str(tmp_path / "clip")), tmp_path / "bundle")
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "clip", use_fast=True)(
        images=load_image(str(SAMPLES[0])), return_tensors="pt"
    )
    with torch.no_grad():
        want = model.get_image_features(**inputs)
    want = getattr(want, "pooler_output", want).numpy()
    have = VisionEncoder.open(bundle.directory, device="cpu").encode(SAMPLES[0]).projected
    assert want.shape == (1, 48)
    assert close(have, want)


def test_a_pooler_of_another_token_does_not_pass(
    clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def third(writer: Any, dialect: Any, value: Any, pooler: Any) -> Any:
        index = writer.constant("shape.first", np.array(3, np.int64))
        pooled = writer.op("Gather", "head.first", value, index, axis=1)
        return writer.norm("head", pooled, pooler.norm, dialect.eps)

    monkeypatch.setattr(graph_module, "pool", third)
    with pytest.raises(ParityError, match="pooler_output of the portable graph disagrees"):
        export_bundle(resolve_checkpoint(str(clip_checkpoint)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_output_that_torch_has_and_the_graph_not_is_refused(
    clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = graph_module._outputs

    def one(*given: Any) -> Any:
        return list(outputs(*given))[:1]

    monkeypatch.setattr(graph_module, "_outputs", one)
    with pytest.raises(ParityError, match=r"last_hidden_state, and torch gives .*pooler_output"):
        export_bundle(resolve_checkpoint(str(clip_checkpoint)), tmp_path / "bundle")


def test_the_manifest_lists_and_certifies_every_output(bundle: Bundle) -> None:
    assert bundle.manifest is not None
    for record in bundle.manifest.graphs.values():
        assert record.outputs == {
            "last_hidden_state": (50, 64),
            "pooler_output": (64,),
            "image_embeds": (24,),
        }
        assert record.parity.vectors.keys() == {"pooler_output", "image_embeds"}
        limit = 0.999 if record.precision == "int8" else 0.99999
        assert all(vector.cosine >= limit for vector in record.parity.vectors.values())
    assert bundle.manifest.hf_class == "CLIPVisionModelWithProjection"
    said = {replayed.what for replayed in replay(bundle)}
    assert "int8 graph, image_embeds of eye-137x91@224x224" in said
    assert "portable graph, pooler_output of eye-137x91@224x224" in said


@pytest.mark.parametrize("output", ["pooler_output", "image_embeds"])
def test_golden_vectors_hold_every_output(output: str, bundle: Bundle, tmp_path: Path) -> None:
    copy = forged.copied(bundle.directory, tmp_path / "copy")
    golden = copy / "golden/golden.npz"
    with np.load(golden) as loaded:
        arrays = dict(loaded)
    arrays[f"eye-137x91@224x224/{output}"][0, 5] += 1
    np.savez(golden, **arrays)
    forged.reseal(copy, "golden/golden.npz")
    with pytest.raises(GoldenMismatchError, match=rf"portable graph, {output} of eye"):
        list(replay(Bundle.load(copy)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("graphs.ort.outputs.pooler_output", [65]),
        ("graphs.ort.outputs.pooler_output", [64, 1]),
        ("graphs.ort.outputs.last_hidden_state", [49, 64]),
        ("graphs.ort.outputs.other", [64]),
        ("graphs.ort.outputs.pooler_output", 64),
        ("graphs.ort.parity.vectors", {}),
        ("graphs.ort.outputs", {"last_hidden_state": [50, 64]}),
        ("layout.num_cls_tokens", 0),
        ("native_size", [448, 448]),
    ],
)
def test_outputs_of_the_manifest_are_checked(
    place: str, value: Any, bundle: Bundle, tmp_path: Path
) -> None:
    copy = forged.put(forged.copied(bundle.directory, tmp_path / "copy"), place, value)
    with pytest.raises(BundleCorruptError):
        VisionEncoder.open(copy, device="cpu", graph="ort")


@pytest.mark.parametrize("change", ["renamed", "removed"])
def test_outputs_of_the_graph_are_compared_with_the_manifest(
    change: str, bundle: Bundle, tmp_path: Path
) -> None:
    copy = forged.copied(bundle.directory, tmp_path / "copy")

    def edit(model: onnx.ModelProto) -> None:
        index = [x.name for x in model.graph.output].index("pooler_output")
        if change == "removed":
            del model.graph.output[index]
            return
        model.graph.output[index].name = "pooled"
        for node in model.graph.node:
            for names in (node.output, node.input):
                names[:] = ["pooled" if name == "pooler_output" else name for name in names]

    forged.graph(copy, edit)
    with pytest.raises(BundleCorruptError, match=r"has the outputs .* but is said to have"):
        VisionEncoder.open(copy, device="cpu", graph="ort")


def test_what_is_not_there_says_why(clip_bundle: Path, dinov3_bundle: Path, bundle: Bundle) -> None:
    clip = VisionEncoder.open(clip_bundle, device="cpu").encode(PICTURES[0])
    with pytest.raises(NoSuchOutputError, match="its checkpoint held no projection"):
        _ = clip.projected
    with pytest.raises(NoSuchOutputError, match="no register tokens"):
        _ = clip.registers
    assert not hasattr(clip, "projected")
    dinov3 = VisionEncoder.open(dinov3_bundle, device="cpu")
    found = dinov3.encode(PICTURES[0])
    assert found.registers.shape == (1, 4, 64)
    assert np.array_equal(found.pooled, found.cls)
    with pytest.raises(NoSuchOutputError, match="a dinov3_vit has no projection"):
        dinov3.encode(PICTURES[0], outputs="projected")
    encoder = VisionEncoder.open(bundle.directory, device="cpu")
    with pytest.raises(NoSuchOutputError, match="was not asked for"):
        _ = encoder.encode(PICTURES[0], outputs=["cls"]).patches
    for wrong in ([], "token", ["cls", "last_hidden_state"], 7, [None]):
        with pytest.raises(OptionError, match="it is one or several of cls, patches"):
            encoder.encode(PICTURES[0], outputs=wrong)  # type: ignore[arg-type]
        with pytest.raises(OptionError):
            encoder.encode_stream([], outputs=wrong)  # type: ignore[arg-type]


def test_unit_vectors_are_torchs(bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    encoder = VisionEncoder.open(bundle.directory, device="cpu")
    found = encoder.encode(PICTURES, normalize=True)
    for name, want in expected.items():
        unit = torch.nn.functional.normalize(torch.from_numpy(want), dim=-1).numpy()
        assert np.abs(getattr(found, name) - unit).max() <= 1e-4
    again = encoder.encode(PICTURES, outputs=VECTORS, normalize=True)
    for name in VECTORS:
        assert np.allclose(getattr(again, name), getattr(found, name), atol=1e-6)


def test_streams_and_batchers_give_the_same_by_the_same_names(
    bundle: Bundle, expected: dict[str, np.ndarray]
) -> None:
    encoder = VisionEncoder.open(bundle.directory, device="cpu")
    stream = list(encoder.encode_stream(PICTURES, batch_size=2, outputs=VECTORS))
    with DynamicBatcher(encoder, outputs=("projected", "patches"), normalize=True) as batcher:
        answers = [batcher.encode(picture) for picture in PICTURES]
    for index, (one, answer) in enumerate(zip(stream, answers, strict=True)):
        for name in VECTORS:
            assert close(getattr(one, name), expected[name][index])
            assert getattr(one, name).base is None
        with pytest.raises(NoSuchOutputError, match="not asked for"):
            _ = one.patches
        assert np.allclose(np.linalg.norm(answer.patches, axis=-1), 1, atol=1e-5)
        assert answer.projected.shape == (1, 24)
    again = pickle.loads(pickle.dumps(stream[0]))
    assert np.array_equal(again.pooled, stream[0].pooled)


def test_vectors_keep_no_patches(dinov3_bundle: Path) -> None:
    """600 pictures of 196 patches would be 30 MB; their vectors are less than 1."""
    code = f"""
import tracemalloc
import numpy as np
from vistower import VisionEncoder

encoder = VisionEncoder.open({str(dinov3_bundle)!r}, device="cpu")
picture = np.zeros((8, 8, 3), np.uint8)
encoder.encode(picture)
tracemalloc.start()
kept = encoder.encode([picture] * 600, batch_size=4, outputs=("cls", "registers", "pooled"))
streamed = [r.pooled for r in encoder.encode_stream([picture] * 600, outputs="pooled")]
held, _ = tracemalloc.get_traced_memory()
print(held)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10e6


def test_asking_for_vectors_alone_copies_no_patches_from_a_gpu(
    bundle: Bundle, expected: dict[str, np.ndarray], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SessionOptions(buckets=(1, 2), cuda_graphs=True)
    encoder = VisionEncoder.open(bundle.directory, device="cuda", graph="ort", options=options)
    assert [warmed.graph for warmed in encoder.warmup()] == [True, True]
    session: Any = encoder.session
    copied: list[int] = []
    copy = type(session._memory).copy

    def counted(self: Any, to: int, start: int, size: int, kind: str) -> None:
        if kind == "out":
            copied.append(size)
        copy(self, to, start, size, kind)

    monkeypatch.setattr(type(session._memory), "copy", counted)
    found = encoder.encode(PICTURES, outputs=VECTORS)
    for name in VECTORS:
        assert close(getattr(found, name), expected[name])
    assert sum(copied) == 3 * 4 * (64 + 64 + 24)
    copied.clear()
    everything = encoder.encode(PICTURES)
    assert close(everything.patches, expected["patches"])
    assert sum(copied) == 3 * 4 * (50 * 64 + 64 + 24)
    pooled = encoder.forward_on_device(encoder.preprocess(PICTURES), "pooler_output")
    assert close(pooled.numpy(), expected["pooled"])
    with pytest.raises(NoSuchOutputError, match="has no output 'pooled'"):
        encoder.forward_on_device(encoder.preprocess(PICTURES), "pooled")


def test_several_devices_give_every_output(bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    encoder = VisionEncoder.open(bundle.directory, devices=["cpu", "cpu"], threads=2)
    found = encoder.encode(PICTURES)
    assert all(close(getattr(found, name), want) for name, want in expected.items())


def test_the_mixins_encoder_has_them_and_its_model_answers_as_torchs(
    bundle: Bundle, expected: dict[str, np.ndarray]
) -> None:
    clip = CLIPMixin(model_path=str(bundle.directory), device="cpu")
    found = clip.model.encoder.encode(PICTURES, outputs="projected", normalize=True)
    assert np.allclose(np.linalg.norm(found.projected, axis=-1), 1, atol=1e-6)
    output = clip.model(**clip.processor(images=PICTURES, return_tensors="pt"))
    assert close(np.asarray(output.pooler_output), expected["pooled"])
    assert close(np.asarray(output.image_embeds), expected["projected"])
    assert close(np.asarray(output[1]), expected["pooled"])


def test_embed_writes_the_vectors_asked_for(
    bundle: Bundle,
    expected: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "o.npz"
    code, text, _ = run(
        *(capsys, "embed", bundle.directory, *PICTURES, "--output", output, "--device", "cpu"),
        *("--vector", "projected", "--vector", "pooled", "--patches"),
    )
    assert code == 0
    assert "3 pictures, projected of 24 numbers each" in text
    with np.load(output) as loaded:
        assert sorted(loaded) == ["names", "patches", "pooled", "projected"]
        assert all(close(loaded[x], expected[x]) for x in ("patches", "pooled", "projected"))
    output = tmp_path / "o.npy"
    code, _, _ = run(
        *(capsys, "embed", bundle.directory, *PICTURES, "--output", output, "--device", "cpu"),
        *("--vector", "projected", "--normalize"),
    )
    assert code == 0
    unit = expected["projected"] / np.linalg.norm(expected["projected"], axis=1, keepdims=True)
    assert np.allclose(np.load(output), unit, atol=1e-5)
    for wrong in (("--vector", "patches"), ("--vector", "cls", "--vector", "pooled")):
        code, _, errors = run(
            *(capsys, "embed", bundle.directory, PICTURES[0], "--output", output, *wrong)
        )
        assert code == 2
        assert "--vector" in errors
