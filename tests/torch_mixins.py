"""The torch mixins the contract describes: the reference of the drop-in replacements.

Nothing here comes from vistower: a reference that shares its assumptions proves nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPVisionModel

RESOLUTION = {
    "clip-vit-base-patch32": (224, 32),
    "clip-vit-base-patch16": (224, 16),
    "clip-vit-large-patch14": (224, 14),
    "clip-vit-large-patch14-336": (336, 14),
    "dinov3-vits16-pretrain-lvd1689m": (224, 16),
    "dinov3-vitb16-pretrain-lvd1689m": (224, 16),
    "dinov3-vitl16-pretrain-lvd1689m": (224, 16),
}


def processor_options(backend: str | None) -> dict[str, Any]:
    """How this transformers is asked for a backend, ``torchvision`` or ``pil``."""
    if backend is None:
        return {}
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"backend": backend}
    return {"use_fast": backend == "torchvision"}


def last_component(model_path: str) -> str:
    return model_path.rstrip("/").split("/")[-1]


def automatic() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class TorchCLIPMixin:
    backend: str | None = None
    """Of the processor; None for what transformers takes, as the original does."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.device = kwargs.get("device", automatic())
        model_path = kwargs.get("model_path", "openai/clip-vit-base-patch32")
        name = last_component(model_path)
        self.img_input_size, self.patch_size = RESOLUTION.get(name, (224, 32))
        options = processor_options(self.backend)
        self.processor = AutoProcessor.from_pretrained(model_path, **options)
        self.model = CLIPVisionModel.from_pretrained(model_path).to(self.device).eval()

    @torch.no_grad()
    def get_features(self, image: Any, mask: Any = None) -> torch.Tensor:
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        embeddings = self.model(**inputs).last_hidden_state[:, 1:, :].detach().squeeze(0)
        if mask is not None:
            embeddings = embeddings[mask, :]
        return embeddings

    @torch.no_grad()
    def get_cls_feature(self, image: Any) -> torch.Tensor:
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        return self.model(**inputs).last_hidden_state[:, 0, :].detach().squeeze(0)


class TorchDINOv3Mixin:
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.device = kwargs.get("device", automatic())
        model_path = kwargs.get("model_path")
        name = last_component(model_path)
        self.input_image_size, self.patch_size = RESOLUTION.get(name, (224, 16))
        self.processor = AutoImageProcessor.from_pretrained(model_path)
        self.model = AutoModel.from_pretrained(model_path).to(self.device).eval()

    @torch.no_grad()
    def get_features(self, image: Any, mask: Any = None) -> torch.Tensor:
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        first = 1 + self.model.config.num_register_tokens
        embeddings = self.model(**inputs).last_hidden_state[:, first:, :].detach().squeeze(0)
        if mask is not None:
            embeddings = embeddings[mask, :]
        return embeddings

    @torch.no_grad()
    def get_cls_feature(self, image: Any) -> torch.Tensor:
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        return self.model(**inputs).last_hidden_state[:, 0, :].detach().squeeze(0)


class _Root:
    """What ends the chain of keywords where a torch mixin stands alone: ``object`` takes none."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


class TorchCLIP(TorchCLIPMixin, _Root):
    """The mixin by itself."""


class TorchDINOv3(TorchDINOv3Mixin, _Root):
    """The mixin by itself."""
