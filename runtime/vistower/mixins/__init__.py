"""`CLIPMixin` and `DINOv3Mixin`: drop-in replacements of the torch mixins of the same names.

- `features`: the two mixins and what they return
- `feature_cache`: both features of one picture cost one forward pass
- `masks`: ``embeddings[mask, :]``, as torch indexes
- `model`, `processor`: what code written for torch reads and calls of a mixin's ``model`` and
  ``processor``
- `results`: torch tensors to a consumer that has torch, NumPy arrays to others
"""

from vistower.mixins.features import CLIP_DEFAULT_MODEL, PRECISION_SETTING, CLIPMixin, DINOv3Mixin

__all__ = ["CLIP_DEFAULT_MODEL", "PRECISION_SETTING", "CLIPMixin", "DINOv3Mixin"]
