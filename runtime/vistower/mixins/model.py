"""What code written for ``CLIPVisionModel`` or ``DINOv3ViTModel`` reads and calls of a mixin's
``model``, over a `VisionEncoder`.

What changes nothing works: ``config``, ``device``, ``dtype``, ``eval()``, ``to(its own device)``,
``requires_grad_(False)``, and the call. What cannot be (weights, gradients, training, another
device or dtype) is a `TorchOnlyError`, an ``AttributeError`` that says what this object is; so
``hasattr`` tells the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vistower.encoder import VisionEncoder
from vistower.errors import ImageFormatError, OptionError, TorchOnlyError
from vistower.execution.device import CPU, Device
from vistower.families.record import LAST_HIDDEN_STATE, POOLER_OUTPUT
from vistower.mixins.devices import dtype_name, is_dtype, parsed, torch_name
from vistower.mixins.results import imported_torch, to_output

_TORCH = (
    "Weights and training are transformers': load the checkpoint with it. The VisionEncoder behind "
    "this object is model.encoder."
)
_PRECISION = "Set VISTOWER_PRECISION (fp32, tf32, fp16, bf16, int8) before the mixin is made."
_DEVICE = "Make the mixin with device=... to run it elsewhere."
_OUTPUT = "Its graph gives the tokens of the last layer, and what is made of them."
_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("half", "bfloat16", "double", "type"), _PRECISION),
    **dict.fromkeys(("cpu", "cuda", "xpu", "mps"), _DEVICE),
}
"""What only the torch models have → what to do instead, where it is not `_TORCH`."""

_INERT: Mapping[str, tuple[Any, ...]] = {
    "bool_masked_pos": (None,),
    "interpolate_pos_encoding": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "return_dict": (None, True),
}
"""Keywords of the models' ``forward`` → values that change nothing."""


class TowerModel:
    """The mixins' ``model``. ``encoder`` is the `VisionEncoder` behind it. Thread-safe; picklable.

    ``training`` is always False.
    """

    main_input_name = "pixel_values"
    training = False

    def __init__(self, encoder: VisionEncoder) -> None:
        """Answer for an encoder of one device."""
        self.encoder = encoder
        self.config = TowerConfig(encoder)

    def __reduce__(self) -> tuple[Any, ...]:
        return TowerModel, (self.encoder,)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.encoder.bundle.name!r}, device={self.encoder.device!r})"
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("cpu", "cuda") and self._device.on_gpu is (name == "cuda"):
            return self.to
        raise _refused(name, _HINTS.get(name, _TORCH))

    @property
    def device(self) -> Any:
        """Where it runs: a ``torch.device`` where torch is imported, else a `Device`.

        Results are in host memory all the same.
        """
        torch, device = imported_torch(), self._device
        if torch is None:
            return Device("cuda", device.index) if device.on_gpu else CPU
        return torch.device(torch_name(device))

    @property
    def dtype(self) -> Any:
        """Float32, whatever the graph computes in: torch's where torch is imported."""
        torch = imported_torch()
        return np.dtype(np.float32) if torch is None else torch.float32

    @property
    def _device(self) -> Device:
        return self.encoder.session.devices[0]

    def eval(self) -> TowerModel:
        """Itself: it is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> TowerModel:
        """Itself, for ``train(False)``.

        Raises:
            TorchOnlyError: training.
        """
        if mode:
            raise _refused("train(True)", _TORCH)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> TowerModel:
        """Itself, for ``requires_grad_(False)``.

        Raises:
            TorchOnlyError: gradients.
        """
        if requires_grad:
            raise _refused("requires_grad_(True)", _TORCH)
        return self

    def float(self) -> TowerModel:
        """Itself: what it takes and gives is float32."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> TowerModel:
        """Itself, for its own device and dtype, in any way that torch's ``to`` is called.

        Raises:
            TorchOnlyError: another device or dtype.
        """
        for value in (*args, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("tensor")):
            if value is None or isinstance(value, bool):
                continue
            if hasattr(value, "device") and hasattr(value, "dtype"):
                self.to(value.device, value.dtype)
            elif is_dtype(value):
                if dtype_name(value) != "float32":
                    raise _refused(f"to({value})", _PRECISION)
            else:
                device = parsed(value)
                if device is None or torch_name(device) != torch_name(self._device):
                    raise _refused(f"to({value!r})", _DEVICE)
        return self

    def __call__(self, pixel_values: Any = None, **options: Any) -> TowerOutput:
        """Run the tower: ``pixel_values`` (B, 3, H, W) → every output of its graph.

        Args:
            pixel_values: torch tensor or array of any numeric dtype, cast to float32 as the torch
                models cast it; what the mixin's ``processor`` gives.
            options: keywords of the torch models' ``forward``, at values that change nothing.

        Raises:
            ImageFormatError: another shape, or no numbers.
            InferenceError: ONNX Runtime failed.
            OptionError: no pixels, or an option that asks for other outputs.
        """
        for name, value in options.items():
            if not any(value is inert for inert in _INERT.get(name, ())):
                raise OptionError(f"{name}={value!r} was asked of {self!r}. {_OUTPUT}")
        if pixel_values is None:
            raise OptionError("You have to specify pixel_values: what the mixin's processor gives.")
        outputs = dict.fromkeys(self.encoder.session.outputs)
        found = self.encoder.compute(as_float32(pixel_values), outputs)
        if POOLER_OUTPUT not in found and "pooled" in self.encoder.outputs:
            # A graph of another exporter, of a family whose pooler takes the first token.
            found[POOLER_OUTPUT] = self.encoder.layout.cls(found[LAST_HIDDEN_STATE])
        return TowerOutput({name: to_output(values) for name, values in found.items()})

    forward = __call__


class TowerConfig:
    """The mixins' ``model.config``: the vision tower's part of the bundle's ``config.json``.

    Its entries are attributes, as of ``CLIPVisionConfig`` and ``DINOv3ViTConfig``; it cannot be
    changed, because a change would not reach the graph.
    """

    def __init__(self, encoder: VisionEncoder) -> None:
        """Read the config of an encoder's bundle."""
        layout = encoder.layout
        known: dict[str, Any] = {
            "model_type": encoder.bundle.model_type,
            "hidden_size": layout.hidden_size,
            "patch_size": layout.patch_size,
            "image_size": layout.image_size[0],
        }
        if encoder.bundle.family.has_registers:
            known["num_register_tokens"] = layout.num_register_tokens
        # A bundle that vistower did not write may leave out what has a default.
        vars(self)["_entries"] = known | encoder.bundle.config

    def __getattr__(self, name: str) -> Any:
        entries = vars(self).get("_entries", {})
        if name in entries:
            return entries[name]
        raise TorchOnlyError(
            f"The model's config has no {name}: it is the vision tower's part of the bundle's "
            f"config.json, not a transformers config. It has {', '.join(sorted(entries))}."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise TorchOnlyError(
            f"The model's config cannot be given {name}={value!r}: a change would not reach the "
            f"graph."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"

    def to_dict(self) -> dict[str, Any]:
        """A copy of all entries."""
        return dict(vars(self)["_entries"])


class TowerOutput(dict[str, Any]):
    """What a `TowerModel` gives: a mapping with its entries as attributes, in order by number.

    ``last_hidden_state`` (B, T, D), ``pooler_output`` (B, D) and, of a CLIP with its projection,
    ``image_embeds`` (B, P); torch tensors or NumPy arrays as `vistower.mixins.results` says.
    """

    hidden_states = None
    attentions = None

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise TorchOnlyError(f"The output has no {name}: {_OUTPUT} It has {', '.join(self)}.")

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise TorchOnlyError(f"The output has no {key}: {_OUTPUT}")
            return super().__getitem__(key)
        values = self.to_tuple()
        if isinstance(key, int) and not -len(values) <= key < len(values):
            raise TorchOnlyError(f"The output has no number {key}: {_OUTPUT}")
        return values[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """All entries, in order."""
        return tuple(self.values())


def as_float32(pixel_values: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A tensor, on any device, or an array as float32 in host memory.

    Raises:
        ImageFormatError: it holds no numbers.
    """
    if hasattr(pixel_values, "detach"):
        # NumPy has no bfloat16, so torch casts.
        pixel_values = pixel_values.detach().float().cpu().numpy()
    array = np.asarray(pixel_values)
    if array.dtype.kind not in "biuf":
        raise ImageFormatError(
            f"pixel_values is a {type(pixel_values).__name__} of {array.dtype}: pass a tensor or "
            f"an array of numbers, (B, 3, H, W)."
        )
    return array.astype(np.float32, copy=False)


def _refused(what: str, hint: str) -> TorchOnlyError:
    return TorchOnlyError(
        f"The mixin's model has no {what}: it is a vision tower on ONNX Runtime, not a torch "
        f"module. {hint}"
    )
