"""What the engine uses of a model and of its spec, whoever computes the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from psykern.kernels import OptionLogprobs
from psykern.kernels.compute import Compute
from psykern.models.parts import Flops, Shapes


class MixerSpec(Protocol):
    """What of a layer keeps earlier rows."""

    @property
    def window(self) -> int | None: ...
    @property
    def kv_size(self) -> int: ...
    @property
    def kv_shape(self) -> tuple[int, int]: ...


class DecoderLayer(Protocol):
    @property
    def mixer(self) -> MixerSpec: ...
    @property
    def most_memory(self) -> int:
        """Numbers that a row of a batch needs between the layer's operations, at most."""

    @property
    def spread(self) -> float:
        """Over so many products the rows of a batch are spread."""

    def flops(self) -> Flops: ...
    def tensors(self) -> Shapes: ...


class DecoderSpec(Protocol):
    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def layers(self) -> Sequence[DecoderLayer]: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def implementation(self) -> str:
        """Whose modules compute the layers and how, in words: "native", "transformers: …"."""

    @property
    def wave_numbers(self) -> int:
        """Keys and values of a row that a wave holds at a time."""

    def tensors(self) -> Shapes: ...


class Decoder(Protocol):
    """A model that is loaded."""

    @property
    def spec(self) -> DecoderSpec: ...
    @property
    def compute(self) -> Compute: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_layers(self) -> int: ...
    def score(self, hidden: Tensor, token_offsets: Tensor, token_ids: Tensor) -> OptionLogprobs:
        """Of the hidden states [R, D] of a wave's response rows, as ``kernels.option_logprobs``."""

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What :meth:`logits` takes of hidden states [R, D]."""

    def logits(self, normed: Tensor, out: Tensor) -> None:
        """Of all tokens behind rows ``normed`` [r, D], to ``out`` [r, V] fp32."""

    def non_finite_tensors(self, layer: int) -> list[str]: ...
