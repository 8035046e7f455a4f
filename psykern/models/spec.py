"""A model as its ``config.json`` describes it: a tuple of layers, and what stands before and behind them."""

from __future__ import annotations

from dataclasses import dataclass

from psykern.models.experts import ExpertsSpec
from psykern.models.layer import LayerSpec
from psykern.models.names import DECODER, Names, Naming
from psykern.models.parts import Shapes

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    model_type: str
    vocab_size: int  # rows of the head: tokens that can be predicted
    hidden_size: int
    eps: float  # of the final norm
    max_positions: int
    has_tied_head: bool  # the head is the embedding
    layers: tuple[LayerSpec, ...]
    embedding_rows: int | None = None  # None: as many as the head has
    naming: Naming = DECODER
    skipped: tuple[str, ...] = ()  # patterns of tensors of layers that a text does not pass through

    @property
    def implementation(self) -> str:
        """Whose modules compute the layers, in words."""
        return "native"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def wave_numbers(self) -> int:
        """Keys and values of a row that a wave holds at a time: those of the layer that has most, as they are computed
        one after the other."""
        return max(2 * layer.mixer.kv_size for layer in self.layers)

    @property
    def head_name(self) -> str:
        return EMBEDDING if self.has_tied_head else HEAD

    def outside(self) -> Shapes:
        """The tensors outside the layers."""
        embedding = (self.embedding_rows or self.vocab_size, self.hidden_size)
        head = (self.vocab_size, self.hidden_size)
        return {EMBEDDING: embedding, FINAL_NORM: (self.hidden_size,), self.head_name: head}

    def tensors(self) -> Shapes:
        """Every tensor of a checkpoint, as ``transformers`` names them."""
        layers = {layer.prefix + name: shape for layer in self.layers for name, shape in layer.tensors().items()}
        return {**self.outside(), **layers}

    def unused(self) -> list[str]:
        """Names and patterns of tensors that a checkpoint may hold and that are not needed."""
        return ["*.rotary_emb.inv_freq", *self.skipped, *([HEAD] if self.has_tied_head else [])]

    def stacks(self) -> list[str]:
        """Patterns of what a checkpoint may hold instead of each expert's weights; see :class:`.Stacked`."""
        if not any(isinstance(layer.ffn, ExpertsSpec) for layer in self.layers):
            return []
        return ["*.mlp.experts.gate_up_proj", "*.mlp.experts.down_proj"]

    def names(self) -> Names:
        """How a checkpoint may spell them. Of two tensors that are one, safetensors' ``save_model`` keeps the head."""
        optional = [*self.unused(), *self.stacks()]
        return Names(self.tensors().keys(), optional, self.naming, {EMBEDDING: HEAD} if self.has_tied_head else {})
