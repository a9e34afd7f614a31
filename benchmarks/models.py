"""The models measured, and how much arithmetic one picture is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A vision tower's architecture; ``tokens`` counts CLS, registers and patches."""

    name: str
    label: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    tokens: int
    patch: int

    @property
    def gflop(self) -> float:
        """GFLOP of one picture: a multiply-add is two, only matrix products are counted.

        Patch embedding, then per layer Q, K, V and output (4 T D²), scores and context (2 T² D)
        and the MLP (2 T D I) multiply-adds, for T tokens of width D and an inner width I.
        """
        t, d, i = self.tokens, self.hidden, self.intermediate
        patches = (224 // self.patch) ** 2
        layer = 4 * t * d * d + 2 * t * t * d + 2 * t * d * i
        return 2 * (patches * 3 * self.patch**2 * d + self.layers * layer) / 1e9


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("clip-vit-base-patch32", "CLIP B/32", "clip", 12, 768, 3072, 50, 32),
        Model("clip-vit-base-patch16", "CLIP B/16", "clip", 12, 768, 3072, 197, 16),
        Model("clip-vit-large-patch14", "CLIP L/14", "clip", 24, 1024, 4096, 257, 14),
        Model("dinov3-vits16", "DINOv3 S/16", "dinov3", 12, 384, 1536, 201, 16),
        Model("dinov3-vitb16", "DINOv3 B/16", "dinov3", 12, 768, 3072, 201, 16),
        Model("dinov3-vitl16", "DINOv3 L/16", "dinov3", 24, 1024, 4096, 201, 16),
    )
}

DEFAULT_MODELS = {
    "cpu": ("clip-vit-base-patch32", "dinov3-vits16"),
    "cuda": tuple(MODELS),
}
