"""The backends as data: what each is, which environment it runs in, which class drives it.

A class is imported only in the process that measures it: no environment has every library.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from benchmarks.backends.base import Backend


@dataclass(frozen=True)
class Entry:
    """One backend in one setting.

    ``environment`` is ``main``, ``optimum`` or ``openvino``; ``precision`` decides how far its
    numbers may be from torch's; ``libraries`` are the distributions a user installs for it,
    pictures included; ``note`` says where its work differs from the others'.
    """

    name: str
    label: str
    target: str
    precision: str = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: str = "main"
    families: tuple[str, ...] = ("clip", "dinov3")
    libraries: tuple[str, ...] = ()
    note: str = ""

    def make(self, context: Any) -> Backend:
        """Import the class and construct it."""
        module, _, name = self.target.partition(":")
        backend = getattr(importlib.import_module(f"benchmarks.backends.{module}"), name)
        return cast("Backend", backend(context, **self.options))


CUDA_GRAPH_BATCHES = (1, 8, 32, 128, 512)

_HF = ("torch", "torchvision", "transformers", "pillow")
_HF_PIXELS = "pixels from the Hugging Face processor, which needs torch: it has none of its own"

_CPU = (
    Entry("torch", "torch eager", "pytorch:TorchEager", libraries=_HF),
    Entry("torch-compile", "torch.compile", "pytorch:TorchCompile", libraries=_HF),
    Entry(
        "ort-plain",
        "ONNX Runtime, plain export",
        "ort:PlainOrt",
        libraries=("onnxruntime", *_HF),
        note=_HF_PIXELS,
    ),
    Entry(
        "optimum",
        "optimum ORTModel",
        "optimum_ort:OptimumOrt",
        environment="optimum",
        libraries=("optimum-onnx", "onnxruntime", *_HF),
        note="DINOv3 is unknown to optimum-onnx 0.1: there it opens our portable graph",
    ),
    Entry(
        "openvino",
        "OpenVINO, latency hint",
        "openvino_cpu:OpenVino",
        options={"hint": "LATENCY"},
        libraries=("openvino", *_HF),
        note=_HF_PIXELS,
    ),
    Entry(
        "openvino-throughput",
        "OpenVINO, throughput hint",
        "openvino_cpu:OpenVino",
        options={"hint": "THROUGHPUT"},
        libraries=("openvino", *_HF),
        note=_HF_PIXELS,
    ),
    Entry(
        "fastembed",
        "fastembed",
        "fastembed_clip:FastEmbedClip",
        families=("clip",),
        libraries=("fastembed",),
        note="gives the projected, normalized CLS embedding only; its pixels are Pillow's",
    ),
)


def _cuda() -> tuple[Entry, ...]:
    entries = []
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        options = {"precision": precision}
        shared: dict[str, Any] = {
            "precision": precision,
            "options": options,
            "libraries": _HF,
        }
        entries += [
            Entry(f"torch-{precision}", f"torch eager {precision}", "pytorch:TorchEager", **shared),
            Entry(
                f"torch-compile-{precision}",
                f"torch.compile {precision}",
                "pytorch:TorchCompile",
                **shared,
            ),
        ]
        if precision in ("fp32", "tf32"):
            for name, label in (("ort-plain", "ONNX Runtime, plain"), ("tensorrt", "TensorRT")):
                entries.append(
                    Entry(
                        f"{name}-{precision}",
                        f"{label} {precision}",
                        "ort:PlainOrt" if name == "ort-plain" else "ort:TensorRt",
                        **(shared | {"libraries": ("onnxruntime-gpu", *_HF), "note": _HF_PIXELS}),
                    )
                )
    return tuple(entries)


def entries(device: str, graphs: Mapping[str, str]) -> tuple[Entry, ...]:
    """Every backend for a device, in the order of the tables.

    ``graphs`` maps the kinds of graph our bundles hold to their precision, read from their
    manifests, so that a new precision appears here by itself. The portable graph is for OpenVINO
    and for other runtimes.
    """
    ours = [
        entry
        for kind, precision in graphs.items()
        for entry in (
            _ours_cpu(kind, precision) if device == "cpu" else _ours_cuda(kind, precision)
        )
    ]
    return (*(_CPU if device == "cpu" else _cuda()), *ours)


def _ours_cpu(kind: str, precision: str) -> tuple[Entry, ...]:
    """One entry a graph; half precision is for the GPU, the portable graph for OpenVINO."""
    if kind == "portable":
        return (
            Entry(
                "vistower-openvino",
                "vistower fp32, OpenVINO",
                "vistower_runtime:Vistower",
                options={"graph": kind, "device": "openvino"},
                environment="openvino",
                libraries=("vistower", "onnxruntime-openvino"),
            ),
        )
    if precision not in ("fp32", "int8"):
        return ()
    return (
        Entry(
            f"vistower-{kind}",
            f"vistower {precision}",
            "vistower_runtime:Vistower",
            precision=precision,
            options={"graph": kind},
            libraries=("vistower", "onnxruntime"),
        ),
    )


def _ours_cuda(kind: str, precision: str) -> tuple[Entry, ...]:
    """With and without CUDA graphs, float32 with and without TF32; int8 is for the CPU."""
    if precision == "int8" or kind == "portable":
        return ()
    entries = []
    for arithmetic in ("fp32", "tf32") if precision == "fp32" else (precision,):
        for captured in (False, True):
            suffix = ", CUDA graphs" if captured else ""
            entries.append(
                Entry(
                    f"vistower-{kind}-{arithmetic}{'-graphs' if captured else ''}",
                    f"vistower {arithmetic}{suffix}",
                    "vistower_runtime:Vistower",
                    precision=arithmetic,
                    options={
                        "graph": kind,
                        "tf32": arithmetic == "tf32",
                        "cuda_graphs": CUDA_GRAPH_BATCHES if captured else (),
                    },
                    libraries=("vistower", "onnxruntime-gpu"),
                )
            )
    return tuple(entries)
