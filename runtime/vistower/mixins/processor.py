"""What code written for a Hugging Face image processor reads and calls of a mixin's ``processor``.

The call, with the mapping it returns, and the options of its ``preprocessor_config.json``. What
would give other pixels is refused: a bundle agrees with one setting of one processor.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable
from typing import Any

import numpy as np

from vistower.encoder import VisionEncoder
from vistower.errors import OptionError, TorchOnlyError
from vistower.mixins.devices import parsed, torch_name
from vistower.mixins.results import to_output
from vistower.preprocess.images import ImageInput


class TowerProcessor:
    """The mixins' ``processor``. Thread-safe; picklable.

    The options of the bundle's ``preprocessor_config.json`` are its attributes (``size``,
    ``image_mean``, ...); of CLIP it is its own ``image_processor`` too, as a ``CLIPProcessor``
    has one. ``encoder.processor`` is the `Preprocessor` that does the work.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, encoder: VisionEncoder) -> None:
        """Preprocess for an encoder."""
        self.encoder = encoder

    def __reduce__(self) -> tuple[Any, ...]:
        return TowerProcessor, (self.encoder,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and name != "encoder":
            bundle = self.encoder.bundle
            if name in bundle.processor_config:
                return bundle.processor_config[name]
            if name == "image_processor" and bundle.family.has_text:
                return self
        raise TorchOnlyError(
            f"The mixin's processor has no {name}: it is the image processor of a bundle, without "
            f"a tokenizer, and its options are those of its preprocessor_config.json."
        )

    def to_dict(self) -> dict[str, Any]:
        """A copy of its options."""
        return dict(self.encoder.bundle.processor_config)

    def __call__(
        self,
        images: ImageInput | Iterable[ImageInput] | None = None,
        text: None = None,
        *,
        return_tensors: str | None = None,
        device: Any = None,
        **options: Any,
    ) -> PixelBatch:
        """Pictures → a mapping with ``pixel_values`` (B, 3, H, W) float32.

        Args:
            images: as for `VisionEncoder.preprocess`.
            text: only None: there is no tokenizer.
            return_tensors: ``pt`` for what the mixins return (tensors where torch is imported),
                ``np`` for a plain array, None for a list of what ``pt`` gives, one a picture.
            device: where the tensors go, see `PixelBatch.to`.
            options: of the processor's config, at the values it has.

        Raises:
            EmptyInputError: no picture.
            ImageDecodeError, ImageFormatError: a picture cannot be used.
            OptionError: text, another type of tensor, or an option that is not the bundle's.
        """
        if images is None or text is not None:
            raise OptionError("A mixin's processor takes pictures (images=...), and no text.")
        if return_tensors not in (None, "pt", "np"):
            raise OptionError(f"return_tensors={return_tensors!r} is not known. Use pt or np.")
        config = self.encoder.bundle.processor_config
        for name, value in options.items():
            if value is not None and not (name in config and _same(config[name], value)):
                raise OptionError(
                    f"{name}={value!r} was asked for, and {self.encoder.bundle.name} was exported "
                    f"with {config.get(name, 'no such option')!r}. Export it again from a "
                    f"checkpoint whose preprocessor_config.json says so."
                )
        pixel_values: Any = self.encoder.preprocess(images)
        if return_tensors == "pt":
            pixel_values = to_output(pixel_values)
        elif return_tensors is None:
            pixel_values = [to_output(one) for one in pixel_values]
        batch = PixelBatch({"pixel_values": pixel_values})
        return batch if device is None else batch.to(device)

    preprocess = __call__


class PixelBatch(UserDict[str, Any]):
    """What a `TowerProcessor` gives, as transformers' ``BatchFeature``: a mapping with attributes.

    ``model(**batch)``, ``batch["pixel_values"]``, ``batch.pixel_values``, ``batch.to(device)``.
    """

    def __getattr__(self, name: str) -> Any:
        entries = vars(self).get("data", {})
        if name not in entries:
            raise TorchOnlyError(f"The batch has no {name}. It has {', '.join(entries)}.")
        return entries[name]

    def to(self, *args: Any, **kwargs: Any) -> PixelBatch:
        """Itself, its tensors taken to a device or dtype by their own ``to``; arrays stay.

        vistower's own devices are taken for the memory they compute in: ``openvino`` for the CPU,
        ``tensorrt:N`` for ``cuda:N``.

        Raises:
            TorchOnlyError: NumPy arrays cannot go to another device.
        """
        places = [_torch_device(value) for value in args]
        named = {name: _torch_device(value) for name, value in kwargs.items()}
        for name, value in self.data.items():
            self.data[name] = _moved(value, places, named)
        return self


def _moved(value: Any, places: list[Any], named: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_moved(one, places, named) for one in value]
    return value if type(value) is np.ndarray else value.to(*places, **named)


def _torch_device(value: Any) -> Any:
    """A device for torch; other values as they are."""
    if isinstance(value, str) and value.startswith(("openvino", "tensorrt")):
        device = parsed(value)
        return value if device is None else torch_name(device)
    return value


def _same(ours: Any, theirs: Any) -> bool:
    """Whether a config's value is the one asked for; JSON knows lists, Python also tuples."""
    if isinstance(ours, list) and isinstance(theirs, tuple):
        return ours == list(theirs)
    return bool(ours == theirs)
