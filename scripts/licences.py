"""Lists the licences of a software bill of materials; ends with 1 where one is not permissive."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PERMISSIVE = frozenset(
    {
        *("0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT"),
        *("MIT-CMU", "PSF-2.0", "Python-2.0", "Zlib"),
    }
)
CLASSIFIERS = {
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD",
    "License :: OSI Approved :: MIT License": "MIT",
}
STATED_ELSEWHERE = {"protobuf": "BSD-3-Clause"}
"""Packages whose metadata names no licence: what the LICENSE file in their wheel is."""


def licences(component: dict[str, Any]) -> list[str]:
    found = []
    for entry in component.get("licenses", []):
        licence = entry.get("license", {})
        text = entry.get("expression") or licence.get("id") or licence.get("name")
        found += re.split(r" (?:AND|OR) ", CLASSIFIERS.get(text, text))
    return found or [STATED_ELSEWHERE.get(component["name"], "none stated")]


def main() -> int:
    components = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["components"]
    bad = []
    for component in components:
        found = licences(component)
        print(f"{component['name']:20} {component['version']:12} {', '.join(found)}")
        if not PERMISSIVE.issuperset(found):
            bad.append(component["name"])
    if bad:
        print(f"not known to be permissive: {', '.join(bad)}", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
