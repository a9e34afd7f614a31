"""The artifact on disk.

- `vistower.bundle.manifest`: what a bundle says of itself, ``vistower.json``;
- `vistower.bundle.contents`: what it holds and whether it is whole;
- `vistower.bundle.lookup`: where bundles are found.
"""

from vistower.bundle.contents import PROCESSOR_FILE, Bundle, BundleGraph, sha256
from vistower.bundle.lookup import (
    cache_directory,
    cache_path,
    cached_bundles,
    find_bundle,
    weight_files,
)

__all__ = [
    "PROCESSOR_FILE",
    "Bundle",
    "BundleGraph",
    "cache_directory",
    "cache_path",
    "cached_bundles",
    "find_bundle",
    "sha256",
    "weight_files",
]
