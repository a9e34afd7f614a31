"""Loads a graph into ONNX Runtime, and makes sure that it got what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vistower.bundle import BundleGraph, checked_file
from vistower.errors import (
    BundleCorruptError,
    BundleUnsupportedError,
    DeviceError,
    NodePlacementError,
)
from vistower.execution.binding import Port
from vistower.execution.cuda_problems import essence, problems, symptom
from vistower.execution.device import Device
from vistower.execution.openvino import openvino_providers
from vistower.execution.ort import CPU_PROVIDER, LOG_ERRORS_ONLY, onnxruntime
from vistower.execution.placement import NodePlacement, can_read_placement, read_placement
from vistower.execution.providers import (
    Providers,
    SessionOptions,
    device_providers,
    merged,
    session_config,
)
from vistower.execution.tensorrt import tensorrt_providers
from vistower.execution.workers import Worker
from vistower.families.record import OUTPUTS, POOLER_OUTPUT

INPUT = "pixel_values"

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(uint8)": np.dtype(np.uint8),
}
"""Types a graph's input and output may have, as ONNX Runtime spells them."""


@dataclass(frozen=True)
class Loaded:
    """ONNX Runtime's session, the graph's input and outputs, and where its nodes went."""

    session: Any
    source: Port
    targets: tuple[Port, ...]
    placement: NodePlacement | None


@dataclass(frozen=True)
class Loading:
    """What is loaded, where and how.

    ``providers`` are the user's own, None for ours. ``of`` is the graph of a bundle that the file
    is; its layout says what sizes there are where the graph leaves them open, as the graphs of
    other exporters do.
    """

    graph: Path
    of: BundleGraph | None
    device: Device
    options: SessionOptions
    threads: int
    providers: Providers | None

    def load(self, worker: Worker | None) -> Loaded:
        """Check the graph's files, load it and check the session.

        Args:
            worker: of the GPU; None to load in the calling thread.

        Raises:
            DeviceError: the device cannot be had.
            BundleCorruptError: the graph cannot be loaded, has other inputs or outputs, is not
                what its bundle says, or its bundle was replaced meanwhile.
        """
        before = self._bundle()
        session = self._create(worker)
        if before != self._bundle():
            raise BundleCorruptError(
                f"The bundle of {self.graph} was replaced while it was opened. Open it again."
            )
        self._check_provider(session)
        source, targets = self._ports(session)
        strict = self.options.strict
        placement = read_placement(session, self.device, self.graph, strict=strict)
        return Loaded(session, source, targets, placement)

    def _bundle(self) -> tuple[int, int] | None:
        """The bundle's directory, whatever it is called; what was checked is in this one."""
        if self.of is None:
            return None
        try:
            found = self.of.directory.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _create(self, worker: Worker | None) -> Any:
        module = onnxruntime()
        loadable = self.of.checked() if self.of else checked_file(self.graph, self.graph.parent)
        options = module.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = LOG_ERRORS_ONLY
        can_tell = can_read_placement(module.InferenceSession)
        config = session_config(self.device, self.options, read_placement=can_tell)
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        if loadable.folder is not None:
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(loadable.folder))
        providers = self._providers()
        if "session.disable_cpu_ep_fallback" in config:
            # ONNX Runtime refuses the two together.
            providers = tuple(one for one in providers if one[0] != CPU_PROVIDER)
        load = partial(
            module.InferenceSession,
            str(loadable.model) if isinstance(loadable.model, Path) else loadable.model,
            options,
            providers=list(providers),
            # Else it would try the CPU, print so, and hide the error.
            enable_fallback=0,
        )
        try:
            # On the GPU's thread, because it changes the current CUDA device of its thread.
            return load() if worker is None else worker.run(load)
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            raise self._why_not(error) from error

    def _providers(self) -> Providers:
        if self.device.provider == self.device.type:
            return self.providers or ()
        if self.device.type == "tensorrt":
            if self.options.cuda_graphs:
                raise DeviceError(
                    "cuda_graphs is for device='cuda': TensorRT's provider captures one graph for "
                    "one shape. Leave it out."
                )
            size = None if self.of is None else self.of.resolution
            ours = tensorrt_providers(self.device, self.options, self.graph, size)
        elif self.device.type == "openvino":
            ours = openvino_providers(self.threads)
        else:
            ours = device_providers(self.device, self.options)
        return ours if self.providers is None else merged(self.providers, ours)

    def _why_not(self, error: Exception) -> Exception:
        """The error to raise where ONNX Runtime raised one."""
        text = str(error)
        if "explicitly disabled" in text and self.options.strict:
            return NodePlacementError(
                f"strict: part of {self.graph} would run on the CPU. A newer onnxruntime-gpu (1.24 "
                f"or so) names the nodes; the fused graph (graph='ort') has none."
            )
        if self.device.type == "cpu":
            return BundleCorruptError(
                f"{self.graph} cannot be loaded by ONNX Runtime {onnxruntime().__version__}: "
                f"{essence(text)}. Check it with `vistower verify`, or export the bundle again."
            )
        known = symptom(text)
        if known is None:
            return DeviceError(
                f"No session on {self.device} for {self.graph}: {essence(text)}. `vistower "
                f"doctor` says whether the device works at all."
            )
        return known.error(f"No session on {self.device} for {self.graph}: {known}.")

    def _check_provider(self, session: Any) -> None:
        active = session.get_providers()[0]
        if active == self.device.provider:
            return
        found = problems(self.device)
        reasons = "; ".join(map(str, found)) or "nothing that vistower knows of is missing"
        error = found[0].error if found else DeviceError
        raise error(
            f"{str(self.device)!r} was asked for, but ONNX Runtime made a session with "
            f"{active}: {reasons}. `vistower doctor` shows what there is."
        )

    def _ports(self, session: Any) -> tuple[Port, tuple[Port, ...]]:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        named = {node.name: node for node in outputs}
        if [node.name for node in inputs] != [INPUT] or not OUTPUTS.keys() & named.keys():
            raise BundleCorruptError(
                f"{self.graph} has inputs {[node.name for node in inputs]} and outputs "
                f"{list(named)}; a vision tower has the input {INPUT} and outputs among "
                f"{', '.join(OUTPUTS)}. For CLIP, export the vision model (CLIPVisionModel), not "
                f"text and vision together."
            )
        if isinstance(inputs[0].shape[0], int):
            raise BundleUnsupportedError(
                f"{self.graph} takes batches of exactly {inputs[0].shape[0]} pictures. Export it "
                f"with a dynamic batch axis, or export the checkpoint with `vistower export`."
            )
        of = self.of
        if of is not None:
            of.check_outputs(tuple(named))
        source = self._port(inputs[0], (3, *of.layout.image_size) if of else ())
        targets = tuple(
            self._port(named[name], _sizes(of, name)) for name in OUTPUTS if name in named
        )
        if of is not None:
            of.check_ports(
                *((port.name, port.dtype.name, port.shape) for port in (source, *targets))
            )
        return source, targets

    def _port(self, node: Any, sizes: tuple[int, ...]) -> Port:
        """An input or output; ``sizes`` are taken where the graph leaves its own open."""
        dtype, given = DTYPES.get(node.type), tuple(node.shape[1:])
        if len(sizes) == len(given):
            pairs = zip(given, sizes, strict=True)
            given = tuple(size if isinstance(size, int) else known for size, known in pairs)
        if dtype is None or not all(isinstance(size, int) for size in given):
            raise BundleCorruptError(
                f"{self.graph}: {node.name} is a {node.type} of {node.shape}. Known are "
                f"{', '.join(DTYPES)}, with every size but the batch fixed in the graph or its "
                f"bundle."
            )
        return Port(node.name, dtype, given)


def _sizes(of: BundleGraph | None, output: str) -> tuple[int, ...]:
    """What an output's open sizes are taken for; the first run shows whether they are."""
    if of is None:
        return ()
    pooled = (of.layout.hidden_size,) if output == POOLER_OUTPUT else ()
    return of.shape(output) or pooled
