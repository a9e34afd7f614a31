"""One weight file shared by several graphs: each matrix is written once, and once only.

ONNX Runtime maps such a file into memory: against weights inside the graph file, a session of
CLIP B/32 is made in half the time and with 130 MB less at its peak.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

_ALIGNMENT = 65536
"""Offsets that every system's memory mapping accepts."""


class WeightStore:
    """Writes lazily made matrices to one file, keyed by name, and points graphs at them.

    All graphs of one store come from the same tower in the same precision: a name means the same
    matrix in each. What a graph holds as plain tensors (norms, biases, constants that depend on
    its resolution) stays inside it.
    """

    def __init__(self, path: Path) -> None:
        """A store that will write ``path``, which must not exist yet."""
        self.path = path
        self._stored: dict[str, ir.ExternalTensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices stored so far."""
        return sum(tensor.nbytes for tensor in self._stored.values())

    def save(self, model: ir.Model, path: Path) -> None:
        """Write a graph's file, beside the store's; its matrices are made and stored if new."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.LazyTensor):
                value.const_value = self._store(tensor)
        ir.save(model, path)

    def _store(self, tensor: ir.LazyTensor) -> ir.ExternalTensor:
        name = str(tensor.name)
        if name not in self._stored:
            with self.path.open("ab") as file:
                offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
                file.truncate(offset)
                file.seek(offset)
                # Not ndarray.tofile(): on a full disk it may lose the last 4 KB in silence.
                file.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
            self._stored[name] = ir.ExternalTensor(
                self.path.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=name,
                base_dir=self.path.parent,
            )
        return self._stored[name]
