"""A family is one record, and another distribution can bring one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import towers
from conftest import tiny_checkpoint
from vistower.backbones import find_backbone
from vistower.bundle import Bundle
from vistower.errors import BundleUnsupportedError
from vistower.families import built_in, find_family
from vistower.families.clip import FAMILY as CLIP
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

RECORD = '''
"""Brings a family; imports neither torch nor transformers."""
from dataclasses import replace

from vistower.families.clip import FAMILY as CLIP
from vistower.families.record import Variant

FAMILY = replace(
    CLIP,
    model_type="stranger",
    config_class="CLIPVisionConfig",
    variants=(Variant(hf_class="CLIPVisionModel"),),
    accepts=(),
    backbones=(),
)
'''


def install(folder: Path, source: str, name: str = "stranger", value: str = "") -> Path:
    """A distribution as pip lays it out: a module and its ``.dist-info``."""
    folder.mkdir()
    (folder / "stranger_family.py").write_text(source)
    info = folder / "stranger_family-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-family\nVersion: 1.0\n")
    value = value or "stranger_family:FAMILY"
    (info / "entry_points.txt").write_text(f"[vistower.families]\n{name} = {value}\n")
    (info / "RECORD").write_text("")
    return folder


def python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, folders), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,
    )


@pytest.fixture(scope="module")
def strange_bundle(clip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a family that only another distribution knows, and that distribution."""
    folder = tmp_path_factory.mktemp("stranger")
    site = install(folder / "site", RECORD)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for path in clip_checkpoint.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "stranger"}))
    code = f"""
import transformers
from pathlib import Path
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

class StrangerConfig(transformers.CLIPVisionConfig):
    model_type = "stranger"

transformers.CLIPVisionModel.config_class = StrangerConfig
export_bundle(resolve_checkpoint({str(checkpoint)!r}), Path({str(folder / "bundle")!r}))
"""
    done = python(code, site)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_another_distribution_brings_a_family(strange_bundle: Path) -> None:
    manifest = json.loads((strange_bundle / "bundle/vistower.json").read_text())
    assert manifest["model_type"] == "stranger"
    code = f"""
import sys
import numpy as np
from vistower import VisionEncoder

encoder = VisionEncoder.open({str(strange_bundle / "bundle")!r}, device="cpu")
found = encoder.encode(np.zeros((9, 9, 3), np.uint8))
assert encoder.bundle.family.model_type == "stranger"
print(found.cls.shape, found.pooled.shape, "torch" in sys.modules)
"""
    done = python(code, strange_bundle / "site")
    assert done.stdout.strip() == "(1, 64) (1, 64) False", done.stderr[-2000:]


def test_a_bundle_of_a_family_that_is_missing_names_it(strange_bundle: Path) -> None:
    with pytest.raises(
        BundleUnsupportedError, match=r"'stranger', and no family .* group vistower\.families"
    ):
        Bundle.load(strange_bundle / "bundle")


@pytest.mark.parametrize(
    ("source", "value", "says"),
    [
        ("raise OSError('no')", "", "cannot be imported: OSError: no"),
        ("FAMILY = 7", "", "is no family of model type"),
        (RECORD.replace('"stranger"', '"other"'), "", "is no family of model type"),
        (RECORD, "stranger_family:NOTHING", "cannot be imported: AttributeError"),
        (RECORD, "nowhere:FAMILY", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_broken_distribution_is_named(
    source: str, value: str, says: str, strange_bundle: Path, tmp_path: Path
) -> None:
    site = install(tmp_path / "site", source, value=value)
    code = f"from vistower.bundle import Bundle; Bundle.load({str(strange_bundle / 'bundle')!r})"
    done = python(code, site)
    assert "BundleUnsupportedError" in done.stderr
    assert says in done.stderr


def test_no_distribution_takes_the_place_of_a_built_in_family(
    clip_bundle: Path, tmp_path: Path
) -> None:
    site = install(tmp_path / "site", "raise OSError('never')", name="clip_vision_model")
    code = f"from vistower.bundle import Bundle; Bundle.load({str(clip_bundle)!r})"
    assert python(code, site).returncode == 0


def test_records_import_nothing_but_data() -> None:
    code = (
        "import sys, vistower.families; vistower.families.built_in();"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'PIL',"
        "'importlib.metadata'} & set(sys.modules)))"
    )
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("model_type", built_in())
def test_a_record_is_found_by_every_type_it_accepts(model_type: str) -> None:
    family = built_in()[model_type]
    assert all(find_family(name) is family for name in (model_type, *family.accepts))
    assert all(backbone.family == model_type for backbone in family.backbones)
    assert (family.weights is None) != (family.exporter is None)
    assert find_family("resnet") is None


def test_no_model_type_is_compared_outside_the_records() -> None:
    import vistower
    import vistower_export

    names = [name for family in built_in().values() for name in (family.model_type,)]
    for package in (vistower, vistower_export):
        folder = Path(str(package.__file__)).parent
        for path in folder.rglob("*.py"):
            if path.parent.name == "families":
                continue
            text = path.read_text()
            found = [name for name in names if f'"{name}"' in text]
            assert not found, f"{path} names {found}"


def test_clip_with_another_activation_and_width(tmp_path: Path) -> None:
    """As others publish it: GELU in place of QuickGELU, heads of 80 as H/14 and of 104 as bigG."""
    for hidden, heads, act in ((160, 2, "gelu"), (104, 1, "gelu"), (64, 4, "quick_gelu")):
        checkpoint = tiny_checkpoint(
            tmp_path / f"{hidden}" / "checkpoint",
            CLIP,
            hidden_size=hidden,
            num_attention_heads=heads,
            hidden_act=act,
            patch_size=14,
        )
        bundle = export_bundle(resolve_checkpoint(str(checkpoint)), tmp_path / f"{hidden}/bundle")
        assert bundle.layout.hidden_size == hidden


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # open_clip's table of models, image towers without their projections.
        ("CLIP-ViT-B-32-laion2B-s34B-b79K", 87),
        ("CLIP-ViT-H-14-laion2B-s32B-b79K", 631),
        ("CLIP-ViT-bigG-14-laion2B-39B-b160k", 1843),
    ],
)
def test_clip_as_laion_publishes_it(name: str, millions: int) -> None:
    assert round(towers.parameters(find_backbone(name)) / 1e6) == millions
