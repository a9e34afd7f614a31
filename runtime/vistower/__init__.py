"""Image embeddings from CLIP and DINOv3 vision towers on ONNX Runtime, without torch.

`VisionEncoder` embeds pictures; `CLIPMixin` and `DINOv3Mixin` replace the torch mixins of the
same names. ONNX Runtime is imported when the first encoder is opened, not with this package.
"""

from vistower import errors
from vistower.backbones import EMBED_MODEL_RESOLUTION
from vistower.encoder import Embeddings, VisionEncoder
from vistower.errors import VistowerError
from vistower.mixins import CLIPMixin, DINOv3Mixin

__all__ = [
    "EMBED_MODEL_RESOLUTION",
    "CLIPMixin",
    "DINOv3Mixin",
    "Embeddings",
    "VisionEncoder",
    "VistowerError",
    "errors",
]
