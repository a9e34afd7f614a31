"""The torch mixins the contract describes: the reference of the drop-in replacements."""

from __future__ import annotations

from typing import Any

import torch

from vistower_export.reference import load_processor
from vistower_export.towers import CLIP, DINOV3, TowerFamily


class _TorchFeatures:
    family: TowerFamily
    prefix: int

    def _load(self, kwargs: dict[str, Any]) -> None:
        import transformers

        path = kwargs["model_path"]
        self.device = kwargs.get("device", "cpu")
        self.processor = load_processor(path, "torchvision")
        model_class = getattr(transformers, self.family.hf_class)
        size = self.processor.crop_size if self.family is CLIP else self.processor.size
        self.img_input_size = self.input_image_size = size["height"]
        self.model = model_class.from_pretrained(path).to(self.device).eval()
        self.patch_size = self.model.config.patch_size

    def _forward(self, image: Any) -> Any:
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        with torch.no_grad():
            return self.model(**inputs)

    def get_features(self, image: Any, mask: Any = None) -> torch.Tensor:
        embeddings = self._forward(image).last_hidden_state[:, self.prefix :, :].squeeze(0)
        return embeddings if mask is None else embeddings[mask, :]

    def pooled(self, image: Any) -> torch.Tensor:
        return self._forward(image).pooler_output

    def get_cls_feature(self, image: Any) -> torch.Tensor:
        return self._forward(image).last_hidden_state[:, 0]


class TorchCLIPMixin(_TorchFeatures):
    family = CLIP
    prefix = 1

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._load(kwargs)


class TorchDINOv3Mixin(_TorchFeatures):
    family = DINOV3

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._load(kwargs)
        self.prefix = 1 + self.model.config.num_register_tokens
