"""How a vision transformer is read, arranged and written: the exporter of most families.

A family that is built otherwise names a module with these functions as its ``exporter``.
"""

from __future__ import annotations

from vistower.families import Family
from vistower_export.graph import write_vit as write
from vistower_export.quantize import smooth
from vistower_export.towers import tower_config
from vistower_export.weights import arrange
from vistower_export.weights import released_name as _released_name

__all__ = ["arrange", "released_name", "smooth", "tower_config", "write"]


def released_name(family: Family, name: str) -> str:
    """The name of a weight in the released files."""
    assert family.weights is not None  # noqa: S101
    return _released_name(name, family.weights)
