"""What may be asked for as a device: names, ``torch.device``, or ONNX Runtime's providers."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

from vistower.errors import DeviceError
from vistower.execution.ort import CPU_PROVIDER, CUDA_PROVIDER, OPENVINO_PROVIDER, TENSORRT_PROVIDER

PROVIDERS: Mapping[str, str] = MappingProxyType(
    {
        "cpu": CPU_PROVIDER,
        "openvino": OPENVINO_PROVIDER,
        "cuda": CUDA_PROVIDER,
        "tensorrt": TENSORRT_PROVIDER,
    }
)
"""Device type → the execution provider that must be active for it."""


_REMOTE = "AzureExecutionProvider"
"""Calls endpoints for operators that no vision tower has, and so computes nothing of one. It comes
first in ``onnxruntime.get_available_providers()`` of the CPU's wheel."""


class TorchDevice(Protocol):
    """What is read of a ``torch.device``; torch itself is never imported."""

    type: str
    index: int | None


DeviceLike: TypeAlias = str | int | TorchDevice
ProviderLike: TypeAlias = str | tuple[str, Mapping[str, Any]]
"""An execution provider as ONNX Runtime takes it: its name, or its name and options."""


@dataclass(frozen=True)
class Device:
    """Where a session runs: ``cpu``, ``openvino``, or ``cuda`` or ``tensorrt`` with a device index.

    ``openvino`` is the CPU too, through OpenVINO's kernels instead of ONNX Runtime's.
    For a provider that has no such name, ``type`` is the provider's name.
    """

    type: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.type}:{self.index}" if self.on_gpu else self.type

    @property
    def provider(self) -> str:
        """The execution provider that must be active."""
        return PROVIDERS.get(self.type, self.type)

    @property
    def on_gpu(self) -> bool:
        """Whether it is an NVIDIA GPU, whichever provider drives it."""
        return self.type in ("cuda", "tensorrt")

    @property
    def standard_operators(self) -> bool:
        """Whether its provider reads ONNX's own operators only, not ONNX Runtime's."""
        return self.type in ("openvino", "tensorrt")


CPU = Device("cpu")


def parse_device(device: DeviceLike) -> Device | None:
    """Read ``auto`` (None), ``cpu``, ``openvino``, ``cuda[:N]``, ``tensorrt[:N]``, or torch's.

    As torch reads them: an integer is the index of a CUDA device, and ``cpu:N`` is the CPU.

    Raises:
        DeviceError: it is none of them.
    """
    text = _spelled(device)
    if text == "auto":
        return None
    match = re.fullmatch(
        r"(?:(openvino)|(cpu)(?::N)?|(cuda|tensorrt)(?::(N))?)".replace("N", r"(?:0|[1-9][0-9]*)"),
        text,
    )
    if match is None:
        raise DeviceError(
            f"device={device!r} is not known. Use 'auto', 'cpu', 'openvino', 'cuda', 'cuda:N' (or "
            f"N, an integer), 'tensorrt' or 'tensorrt:N'."
        )
    if match[3] is None:
        return Device(match[1] or match[2])
    return Device(match[3], int(match[4] or 0))


def _spelled(device: DeviceLike) -> str:
    if isinstance(device, str):
        return device
    if hasattr(device, "type"):
        index = getattr(device, "index", None)
        return str(device.type) if index is None else f"{device.type}:{index}"
    try:
        return "" if isinstance(device, bool) else f"cuda:{operator.index(device)}"
    except TypeError:
        return ""


def parse_providers(
    providers: Sequence[ProviderLike],
) -> tuple[Device, tuple[tuple[str, dict[str, str]], ...]]:
    """Read ``providers`` as ONNX Runtime's users write it: names, or (name, options), best first.

    Returns the device of the first provider, which must be active once the session exists, and
    every provider with its options as strings. AzureExecutionProvider is left out: it computes
    nothing of a vision tower.

    Raises:
        DeviceError: the list is empty or malformed.
    """
    pairs = []
    for provider in [] if isinstance(providers, str) else providers:
        pair: Any = (provider, {}) if isinstance(provider, str) else provider
        match pair:
            case (str(name), Mapping() as options):
                pairs.append((name, {str(key): str(value) for key, value in options.items()}))
    if not pairs or len(pairs) != len(providers):
        raise DeviceError(
            f"providers={providers!r} is not a list of providers. Give names, or (name, options) "
            f"pairs, e.g. [('CUDAExecutionProvider', {{'device_id': 0}}), 'CPUExecutionProvider']."
        )
    pairs = [pair for pair in pairs if pair[0] != _REMOTE]
    if not pairs:
        raise DeviceError(
            f"providers={providers!r}: {_REMOTE} computes nothing of a vision tower. Add another."
        )
    first, settings = pairs[0]
    kinds = {provider: kind for kind, provider in PROVIDERS.items()}
    index = settings.get("device_id", "0")
    if not index.isdecimal():
        raise DeviceError(f"providers has device_id={index!r}; it must be a number from 0.")
    return Device(kinds.get(first, first), int(index)), tuple(pairs)
