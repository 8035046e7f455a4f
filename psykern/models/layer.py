"""A decoder layer: a mixer, which lets rows see earlier ones, and a feed-forward part, each added to what came in.

norms before:  h += mixer(norm(h));  h += ffn(norm(h))      (Llama, Qwen)
norms after:   h += norm(mixer(h));  h += norm(ffn(h))      (OLMo)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from psykern import kernels
from psykern.core.settings import Backend
from psykern.models.attention import Attention, AttentionSpec
from psykern.models.batch import Batch, LayerState, Scratch
from psykern.models.experts import Experts, ExpertsSpec
from psykern.models.mlp import Mlp, MlpSpec
from psykern.models.parts import Flops, Fused, Shapes
from psykern.models.rope import RotaryTables


@dataclass(frozen=True, slots=True)
class NormsSpec:
    """The two norms of a layer: of what its parts take, or of what they give."""

    place: Literal["before", "after"]
    hidden_size: int
    eps: float

    @property
    def names(self) -> tuple[str, str]:
        """Of the norm of the mixer, and of that of the feed-forward part."""
        if self.place == "before":
            return "input_layernorm.weight", "post_attention_layernorm.weight"
        return "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"

    def tensors(self) -> Shapes:
        return dict.fromkeys(self.names, (self.hidden_size,))

    def norms(self, tensors: Mapping[str, Tensor], backend: Backend) -> Before | After:
        """With a layer's weights."""
        mixer, ffn = (tensors[name] for name in self.names)
        return (Before if self.place == "before" else After)(mixer, ffn, self.eps, backend)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer is made of. The layers of a model may differ; those with equal specs are computed alike."""

    prefix: str  # of its tensors in the checkpoint: "model.layers.7."
    mixer: AttentionSpec
    ffn: MlpSpec | ExpertsSpec
    norms: NormsSpec

    def tensors(self) -> Shapes:
        """By their names within the layer."""
        return {**self.mixer.tensors(), **self.ffn.tensors(), **self.norms.tensors()}

    def fused(self) -> Fused:
        return {**self.mixer.fused(), **self.ffn.fused()}

    def flops(self) -> Flops:
        return self.mixer.flops() + self.ffn.flops()

    @property
    def most_memory(self) -> int:
        """Numbers that a row of a batch needs between the layer's operations, at most: more than :class:`Scratch` has.
        A bound: the size of a device's waves follows from it, so that a closer one would change runs."""
        return 5 * self.norms.hidden_size + self.mixer.most_memory + self.ffn.most_memory

    @property
    def spread(self) -> float:
        """Over so many products the rows of a batch are spread."""
        return self.ffn.spread

    def layer(self, tensors: Mapping[str, Tensor], tables: RotaryTables, num_positions: int, backend: Backend) -> Layer:
        """With a layer's weights, by their names within it; fused products are used where ``tensors`` have them."""
        rotary = tables.of(self.mixer.rope, num_positions)
        return Layer(
            self.mixer.part(tensors, rotary, backend),
            self.ffn.part(tensors, backend),
            self.norms.norms(tensors, backend),
        )


class Layer(NamedTuple):
    """One layer's parts with their weights."""

    mixer: Attention
    ffn: Mlp | Experts
    norms: Before | After

    def __call__(self, hidden: Tensor, out: Tensor, state: LayerState, batch: Batch, scratch: Scratch) -> None:
        """hidden [n, D] to ``out`` [m, D], and keys and values to the batch's rows of ``state``.

        ``out`` is ``hidden`` itself where all rows need an output. Where few do, in the last layer, all are normed,
        for all have keys and values, and ``out`` holds in turn what the mixer is asked for and what it is added to.
        No array of a batch's size is allocated, but for what routes rows to experts.
        """
        x = self.norms.enter(hidden, scratch)
        asking = batch.pick(x, out)
        mixed = self.mixer(x, asking, state, batch, scratch)
        batch.pick(hidden, out)
        x = self.norms.between(mixed, out)
        self.norms.leave(self.ffn, x, out, scratch)


class Before(NamedTuple):
    """Norms of what the mixer and the feed-forward part take."""

    mixer: Tensor  # [D]
    ffn: Tensor  # [D]
    eps: float
    backend: Backend

    def enter(self, hidden: Tensor, scratch: Scratch) -> Tensor:
        """What the mixer takes: the norm of ``hidden``, in ``scratch.normed``."""
        normed = scratch.normed[: hidden.shape[0]]
        return kernels.add_rms_norm(hidden, None, self.mixer, self.eps, normed=normed, backend=self.backend)[0]

    def between(self, mixed: Tensor, out: Tensor) -> Tensor:
        """Adds ``mixed`` to ``out`` and gives what the feed-forward part takes: the norm of the sum, in ``mixed``."""
        return kernels.add_rms_norm(mixed, out, self.ffn, self.eps, normed=mixed, summed=out, backend=self.backend)[0]

    def leave(self, ffn: Mlp | Experts, x: Tensor, out: Tensor, scratch: Scratch) -> None:
        """Adds the feed-forward part of x to ``out``."""
        ffn.add(x, out, scratch)


class After(NamedTuple):
    """Norms of what the mixer and the feed-forward part give."""

    mixer: Tensor  # [D]
    ffn: Tensor  # [D]
    eps: float
    backend: Backend

    def enter(self, hidden: Tensor, scratch: Scratch) -> Tensor:
        """What the mixer takes: ``hidden`` itself."""
        return hidden

    def between(self, mixed: Tensor, out: Tensor) -> Tensor:
        """Adds the norm of ``mixed`` to ``out``, which is what the feed-forward part takes. ``mixed`` is written."""
        return self._add_norm(self.mixer, mixed, out)

    def leave(self, ffn: Mlp | Experts, x: Tensor, out: Tensor, scratch: Scratch) -> None:
        """Adds the norm of the feed-forward part of x to ``out``, which may be x."""
        self._add_norm(self.ffn, ffn(x, scratch), out)

    def _add_norm(self, weight: Tensor, x: Tensor, out: Tensor) -> Tensor:
        return kernels.add_rms_norm(
            x, out, weight, self.eps, norm_first=True, normed=x, summed=out, backend=self.backend
        )[1]
