"""Exports real-size random-weight checkpoints, and writes their parity to docs/parity.{json,md}.

scripts/families.py NAME...: these backbones, added to what the JSON file has; with no name the
table is written again. One process exports one after the other; a base tower takes a minute or two
and 2 GB.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "parity.json"
TABLE = ROOT / "docs" / "parity.md"

HEAD = """\
# Parity of the released architectures

Random-weight checkpoints of the released sizes (`vistower checkpoint NAME`), exported, and every
output compared with torch + transformers over eight pictures, from the file on. Off by: the largest
difference of a value over the L2 norm of its token or vector; the limit of float32 is 1e-4 and
cosine 0.99999. Both dialects; the worse one is shown. `scripts/families.py` writes this page from
`parity.json`. "not run" is a tower that has not been exported at its real size yet, for want of
time, or, of the largest, of memory; its family's tests export it small. An empty int8 column was
not asked for.

| checkpoint | family | transformers | output | off by | cosine | int8: cosine |
|---|---|---|---|---|---|---|
"""


def measured(name: str) -> dict[str, Any]:
    from vistower_export.checkpoint import write_random_checkpoint
    from vistower_export.source import resolve_checkpoint
    from vistower_export.steps import export_bundle

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_random_checkpoint(name, Path(folder) / "checkpoint")
        bundle = export_bundle(
            resolve_checkpoint(str(checkpoint)),
            Path(folder) / "bundle",
            precisions=[] if "--fp32" in sys.argv else ["int8"],
        )
    manifest = bundle.manifest
    if manifest is None:
        raise ValueError(name)
    graphs = {
        graph: {
            output: {"off_by": parity.max_rel, "cosine": parity.cosine}
            for output, parity in record.parity.compared.items()
        }
        for graph, record in manifest.graphs.items()
    }
    return {
        "family": manifest.model_type,
        "transformers": manifest.made_with["transformers"],
        "onnxruntime": manifest.made_with["onnxruntime"],
        "graphs": graphs,
    }


def table(known: dict[str, Any]) -> str:
    from vistower.backbones import BACKBONES

    lines = []
    for name, backbone in BACKBONES.items():
        found = known.get(name)
        if found is None:
            lines.append(f"| {name} | {backbone.family} | | not run | | | |")
            continue
        graphs = found["graphs"]
        for output in graphs["ort"]:
            both = [graphs[graph][output] for graph in ("portable", "ort")]
            off, cosine = max(x["off_by"] for x in both), min(x["cosine"] for x in both)
            int8 = f"{graphs['int8'][output]['cosine']:.4f}" if "int8" in graphs else ""
            lines.append(
                f"| {name} | {found['family']} | {found['transformers']} | {output} | {off:.1e} | "
                f"{cosine:.7f} | {int8} |"
            )
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    from vistower.backbones import find_backbone

    known: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in sys.argv[1:]:
        if name.startswith("--"):
            continue
        found = find_backbone(name).name
        known[found] = measured(found)
        RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(found, flush=True)
    TABLE.write_text(table(known))


if __name__ == "__main__":
    main()
