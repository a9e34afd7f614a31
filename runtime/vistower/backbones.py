"""The checkpoints vistower knows by name: those that the records of the families list.

A checkpoint that is not listed can be exported all the same: its own ``config.json`` decides.
This table serves names, metadata before anything is loaded, and random-weight checkpoints.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from vistower.errors import UnsupportedArchitectureError
from vistower.families import built_in
from vistower.families.record import Backbone

_RECORDS = tuple(backbone for family in built_in().values() for backbone in family.backbones)


def _names(backbone: Backbone) -> Iterator[str]:
    yield backbone.name
    yield from backbone.aliases


BACKBONES: Mapping[str, Backbone] = MappingProxyType({record.name: record for record in _RECORDS})
"""Name (last component of the hub id) → record, in the order of the families' sizes."""

_BY_NAME: Mapping[str, Backbone] = MappingProxyType(
    {name: record for record in _RECORDS for name in _names(record)}
)

EMBED_MODEL_RESOLUTION: Mapping[str, tuple[int, int]] = MappingProxyType(
    {name: (record.image_size, record.patch_size) for name, record in _BY_NAME.items()}
)
"""Every name and alias → (input size, patch size), pixels."""


def find_backbone(name: str) -> Backbone:
    """Return the record of a known checkpoint.

    Args:
        name: a hub id, its last component, a path ending in that, or an alias such as
            ``dinov3-vits16`` (trailing slashes do not matter).

    Raises:
        UnsupportedArchitectureError: the name is not known; the message has the closest one.
    """
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if (found := _BY_NAME.get(last)) is not None:
        return found
    close = difflib.get_close_matches(last, _BY_NAME, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnsupportedArchitectureError(
        f"{name!r} is not a checkpoint vistower knows by name.{hint} Known names: "
        f"{', '.join(BACKBONES)}."
    )
