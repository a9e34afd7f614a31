"""`Embeddings`: what a tower says of pictures, and which of it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vistower.errors import NoSuchOutputError, OptionError
from vistower.execution.binding import Wanted
from vistower.families.record import IMAGE_EMBEDS, LAST_HIDDEN_STATE, POOLER_OUTPUT, Family
from vistower.tokens import TokenLayout

Array = npt.NDArray[np.float32]

PARTS: Mapping[str, str] = {
    "cls": LAST_HIDDEN_STATE,
    "patches": LAST_HIDDEN_STATE,
    "registers": LAST_HIDDEN_STATE,
    "pooled": POOLER_OUTPUT,
    "projected": IMAGE_EMBEDS,
}
"""Part of an embedding → the graph's output it comes from."""

VECTORS = ("cls", "pooled", "projected")
"""Parts that are one vector a picture."""

_TINY = np.float32(1e-12)
"""What a norm is at least, as in ``torch.nn.functional.normalize``."""


class Parts:
    """The parts of an embedding by name; one that is not there raises and says why.

    Of a batch of B pictures each has a leading axis B, of one picture of a stream it has none. All
    float32; unit vectors where ``normalize`` was asked for, else as transformers gives them.
    """

    _parts: Mapping[str, Array]
    _absent: Mapping[str, str]

    @property
    def cls(self) -> Array:
        """The CLS token (B, D): the first row of ``last_hidden_state``."""
        return self._part("cls")

    @property
    def patches(self) -> Array:
        """The patch tokens (B, N, D), row-major from the top left, of ``last_hidden_state``."""
        return self._part("patches")

    @property
    def registers(self) -> Array:
        """The register tokens (B, R, D) of ``last_hidden_state``."""
        return self._part("registers")

    @property
    def pooled(self) -> Array:
        """transformers' ``pooler_output`` (B, D), whatever the family makes of it: CLIP the
        normed CLS token, DINOv3 the CLS token itself, SigLIP the attention pooling head's."""
        return self._part("pooled")

    @property
    def projected(self) -> Array:
        """CLIP's ``image_embeds`` (B, P), which text embeddings are compared with."""
        return self._part("projected")

    @property
    def mean_patches(self) -> Array:
        """The mean (B, D) of `patches` as they are here."""
        mean: Array = self.patches.mean(axis=-2)
        return mean

    def _part(self, name: str) -> Array:
        try:
            return self._parts[name]
        except KeyError:
            raise NoSuchOutputError(
                self._absent.get(name, f"{name} was not asked for: outputs={tuple(self._parts)}.")
            ) from None


@dataclass(frozen=True)
class Embeddings(Parts):
    """What one forward pass says of a batch of B pictures; see `Parts` for what it holds.

    Raises:
        NoSuchOutputError: by a part that the family or the graph has not, or that was not asked
            for.
    """

    _parts: Mapping[str, Array]
    _absent: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(next(iter(self._parts.values())))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(part.shape)}" for name, part in self._parts.items())
        return f"Embeddings({shapes})"

    def row(self, index: int) -> dict[str, Array]:
        """The parts of one picture: vectors copied, tokens a view."""
        return {
            name: part[index].copy() if name in VECTORS else part[index]
            for name, part in self._parts.items()
        }

    def alone(self, index: int) -> Embeddings:
        """One picture of the batch as a batch, in memory of its own."""
        parts = {name: part[index : index + 1].copy() for name, part in self._parts.items()}
        return Embeddings(parts, self._absent)

    @classmethod
    def joined(cls, batches: Sequence[Embeddings]) -> Embeddings:
        """Several batches as one."""
        first = batches[0]
        if len(batches) == 1:
            return first
        parts = {
            name: np.concatenate([batch._parts[name] for batch in batches]) for name in first._parts
        }
        return cls(parts, first._absent)


@dataclass(frozen=True)
class Request:
    """Which parts are asked of a graph.

    ``sources`` maps each part to its output, ``absent`` each part there cannot be to the reason.
    ``wanted`` is what the graph must give for it.
    """

    layout: TokenLayout
    sources: Mapping[str, str]
    absent: Mapping[str, str]
    normalize: bool
    wanted: Wanted

    def embeddings(self, found: Mapping[str, Array]) -> Embeddings:
        """The parts of a graph's outputs, which are changed in place where unit vectors are
        asked for."""
        if self.normalize:
            for values in found.values():
                values /= np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), _TINY)
        parts = {name: self._cut(name, found[source]) for name, source in self.sources.items()}
        return Embeddings(parts, self.absent)

    def _cut(self, name: str, values: Array) -> Array:
        if self.sources[name] != LAST_HIDDEN_STATE:
            return values
        if name == "patches":
            return self.layout.patches(values)
        return self.layout.registers(values) if name == "registers" else self.layout.cls(values)


def absent_parts(
    family: Family, layout: TokenLayout, outputs: Sequence[str], name: str
) -> dict[str, str]:
    """Parts that a graph with these outputs cannot give → why.

    ``name`` is the bundle's, for the message.
    """
    absent = {}
    kind = family.model_type
    if LAST_HIDDEN_STATE not in outputs:
        reason = f"{name} has no {LAST_HIDDEN_STATE}: its graph gives {', '.join(outputs)} only."
        absent = dict.fromkeys(("cls", "patches", "registers"), reason)
    if not layout.num_cls_tokens and "cls" not in absent:
        absent["cls"] = f"{name} has no CLS token: a {kind} has none. Take pooled, or patches."
    if not layout.num_register_tokens and "registers" not in absent:
        absent["registers"] = f"{name} has no register tokens."
    if POOLER_OUTPUT not in outputs and ("cls" in absent or family.pooler != "first"):
        absent["pooled"] = (
            f"{name} has no {POOLER_OUTPUT}: its graph or its checkpoint lacks it. Take cls or "
            f"patches."
        )
    if IMAGE_EMBEDS not in outputs:
        absent["projected"] = f"{name} has no {IMAGE_EMBEDS}: " + (
            "its checkpoint held no projection. Export a CLIPModel or a "
            "CLIPVisionModelWithProjection."
            if family.weights is not None and family.weights.projection
            else f"a {kind} has no projection. Take pooled."
        )
    return absent


def request(
    asked: Sequence[str] | str | None,
    normalize: bool,
    family: Family,
    layout: TokenLayout,
    outputs: Sequence[str],
    name: str,
) -> Request:
    """Work out what to ask a graph for.

    Args:
        asked: names of `PARTS`, or one; None for all there are.
        normalize: whether unit vectors are wanted.
        family: of the tower.
        layout: of the graph's tokens.
        outputs: of the graph.
        name: the bundle's, for messages.

    Raises:
        OptionError: no part, or an unknown one.
        NoSuchOutputError: a part that there cannot be.
    """
    absent = absent_parts(family, layout, outputs, name)
    names = [part for part in PARTS if part not in absent]
    if asked is not None:
        names = _checked(asked)
        for part in names:
            if part in absent:
                raise NoSuchOutputError(absent[part])
    sources = {part: PARTS[part] for part in names}
    if "pooled" in sources and POOLER_OUTPUT not in outputs:
        sources["pooled"] = LAST_HIDDEN_STATE
    wanted: dict[str, int | None] = dict.fromkeys(sources.values())
    if LAST_HIDDEN_STATE in wanted and "patches" not in names:
        prefix = layout.num_prefix_tokens if "registers" in names else layout.num_cls_tokens
        wanted[LAST_HIDDEN_STATE] = prefix
    return Request(layout, sources, absent, bool(normalize), wanted)


def _checked(asked: object) -> list[str]:
    names = (
        [asked] if isinstance(asked, str) else list(asked) if isinstance(asked, Iterable) else []
    )
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise OptionError(
            f"outputs={asked!r} was asked for; it is one or several of {', '.join(PARTS)}, or None "
            f"for all there are."
        )
    return list(dict.fromkeys(names))
