"""OpenVINO on torch's own export, in float32, with either of its performance hints."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino

from benchmarks.backends.base import Array, Context, HuggingFacePixels


class OpenVino(HuggingFacePixels):
    """A compiled model per batch size, static shapes being its faster case.

    ``LATENCY`` runs a batch as one request on all cores. ``THROUGHPUT`` gives each stream a part
    of the batch, which is what the hint is for.
    """

    def __init__(self, context: Context, hint: str) -> None:
        """Choose the hint; nothing is loaded."""
        super().__init__(context)
        self.hint = hint
        self.queues: dict[int, openvino.AsyncInferQueue] = {}
        self.states: dict[int, Array] = {}

    def settings(self) -> dict[str, Any]:
        """What it was told, and how many requests it wants at once."""
        return {
            "openvino": openvino.__version__,
            "PERFORMANCE_HINT": self.hint,
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.context.threads,
            "requests": self.requests,
        }

    def open(self) -> None:
        """Read the graph and compile it for one picture."""
        self.core = openvino.Core()
        # It would take bfloat16 by itself where the CPU has it: other work than the others do.
        self.core.set_property(
            "CPU",
            {
                "PERFORMANCE_HINT": self.hint,
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": self.context.threads,
            },
        )
        self.graph = self.core.read_model(self.context.plain)
        self.requests = 1
        self.prepare(1)

    def prepare(self, batch: int) -> None:
        """Compile for the share of a batch one request takes; rarely, two such sizes."""
        for size in {len(part) for part in self._parts(np.empty(batch))}:
            if size in self.queues:
                continue
            graph = self.graph.clone()
            shape = graph.input("pixel_values").partial_shape
            graph.reshape({"pixel_values": [size, *(int(d.get_length()) for d in list(shape)[1:])]})
            compiled = self.core.compile_model(graph, "CPU")
            self.requests = (
                int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
                if self.hint == "THROUGHPUT"
                else 1
            )
            self.queues[size] = openvino.AsyncInferQueue(compiled, self.requests)
            self.queues[size].set_callback(self._keep)

    def _keep(self, request: openvino.InferRequest, index: int) -> None:
        # The request's own memory is overwritten by its next use.
        self.states[index] = request.get_output_tensor(0).data.copy()

    def _parts(self, batch: Any) -> list[Any]:
        parts = min(self.requests, len(batch))
        return [part for part in np.array_split(batch, parts) if len(part)]

    def run(self, inputs: Array) -> Array:
        """Every part at once, and wait."""
        parts = self._parts(inputs)
        if len(parts) == 1:
            request = self.queues[len(inputs)][0]
            request.infer({0: inputs}, share_inputs=True, share_outputs=True)
            output: Array = request.get_output_tensor(0).data
            return output
        for index, part in enumerate(parts):
            self.queues[len(part)].start_async({0: part}, userdata=index, share_inputs=True)
        for queue in self.queues.values():
            queue.wait_all()
        return np.concatenate([self.states[index] for index in range(len(parts))])
