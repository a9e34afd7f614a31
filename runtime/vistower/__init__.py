"""Image embeddings from CLIP and DINOv3 vision towers on ONNX Runtime, without torch.

`VisionEncoder` embeds pictures, `DynamicBatcher` those of many callers; `CLIPMixin` and
`DINOv3Mixin` replace the torch mixins of the same names. Each name below is imported when it is
first used (PEP 562), and ONNX Runtime when the first encoder is opened, so that importing this
package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vistower import errors
    from vistower.backbones import EMBED_MODEL_RESOLUTION
    from vistower.batcher import DynamicBatcher
    from vistower.embeddings import Embeddings
    from vistower.encoder import VisionEncoder
    from vistower.errors import VistowerError
    from vistower.execution.providers import SessionOptions
    from vistower.mixins import CLIPMixin, DINOv3Mixin
    from vistower.stream import StreamResult

__all__ = [
    "EMBED_MODEL_RESOLUTION",
    "CLIPMixin",
    "DINOv3Mixin",
    "DynamicBatcher",
    "Embeddings",
    "SessionOptions",
    "StreamResult",
    "VisionEncoder",
    "VistowerError",
    "errors",
]

_MODULES = {
    "EMBED_MODEL_RESOLUTION": "vistower.backbones",
    "CLIPMixin": "vistower.mixins",
    "DINOv3Mixin": "vistower.mixins",
    "DynamicBatcher": "vistower.batcher",
    "Embeddings": "vistower.embeddings",
    "SessionOptions": "vistower.execution.providers",
    "StreamResult": "vistower.stream",
    "VisionEncoder": "vistower.encoder",
    "VistowerError": "vistower.errors",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("vistower.errors")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vistower.forks import uncut  # Whoever imports this package alone needs none of it.

    with uncut:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
