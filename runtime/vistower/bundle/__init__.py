"""The artifact on disk.

- `vistower.bundle.manifest`: what a bundle says of itself, ``vistower.json``, by rules made of
  `vistower.schema`; `vistower.bundle.configs`: transformers' files in it;
- `vistower.bundle.contents`: what it holds and whether it is whole;
- `vistower.bundle.graphs`: one graph, checked against what the bundle says of it, from what
  `vistower.bundle.graph_file` reads of an ONNX file by `vistower.bundle.wire`;
- `vistower.bundle.hashes`, `vistower.bundle.reading`: files, hashed once and read with care;
- `vistower.bundle.lookup`: where bundles are found; `vistower.bundle.source_files`: whether the
  checkpoint they were made from is still the same.
"""

from vistower.bundle.contents import Bundle
from vistower.bundle.graphs import BundleGraph, Loadable, checked_file
from vistower.bundle.hashes import sha256
from vistower.bundle.lookup import (
    cache_directory,
    cache_path,
    cached_bundles,
    find_bundle,
)
from vistower.bundle.manifest import PROCESSOR_FILE
from vistower.bundle.source_files import record_source

__all__ = [
    "PROCESSOR_FILE",
    "Bundle",
    "BundleGraph",
    "Loadable",
    "cache_directory",
    "cache_path",
    "cached_bundles",
    "checked_file",
    "find_bundle",
    "record_source",
    "sha256",
]
