"""Copies of a bundle with something in them changed, and the manifest made to agree or not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


def copied(bundle: Path, to: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(bundle, to)
    return to


def reseal(bundle: Path, *names: str) -> None:
    """Write the hashes of files into the manifest, as whoever forges them would."""
    manifest = json.loads((bundle / "vistower.json").read_text())
    for name in names:
        data = (bundle / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][name] = {"size": len(data), "sha256": digest}
    (bundle / "vistower.json").write_text(json.dumps(manifest))


def manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the manifest."""
    path = bundle / "vistower.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return bundle


def put(bundle: Path, place: str, value: Any) -> Path:
    """Set a value of the manifest, by its place: ``layout.patch_size``."""

    def change(whole: dict[str, Any]) -> None:
        *way, last = place.split("/") if "/" in place else place.split(".")
        for key in way:
            whole = whole[key]
        whole[last] = value

    return manifest(bundle, change)


def config(bundle: Path, name: str, **values: Any) -> Path:
    """Change a configuration file, and reseal it."""
    path = bundle / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if (bundle / "vistower.json").exists():
        reseal(bundle, name)
    return bundle


def graph(
    bundle: Path, change: Callable[[onnx.ModelProto], None], name: str = "onnx/model_ort.onnx"
) -> Path:
    """Change a graph's file, and reseal it, its number of nodes and its domains too."""
    # Tests of the runtime alone have no onnx.
    import onnx

    model = onnx.load(bundle / name, load_external_data=False)
    change(model)
    (bundle / name).write_bytes(model.SerializeToString())
    if not (bundle / "vistower.json").exists():
        return bundle

    def agree(whole: dict[str, Any]) -> None:
        for record in whole["graphs"].values():
            if record["file"] == name:
                record["nodes"] = len(model.graph.node)

    reseal(bundle, name)
    return manifest(bundle, agree)


def foreign(bundle: Path) -> Path:
    """Make it a bundle of another exporter: without a manifest, and only the portable graph."""
    (bundle / "vistower.json").unlink()
    return bundle
