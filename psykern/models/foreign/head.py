"""From what a model's head takes to the scores of tokens: psykern's own kernel, or the model's own logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from psykern import kernels
from psykern.core.settings import Backend
from psykern.kernels import OptionLogprobs
from psykern.models.foreign.network import Network
from psykern.models.head import head_logits

_TABLE = 2**26  # numbers of a table of logits: 256 MiB


class Head(Protocol):
    @property
    def vocab_size(self) -> int: ...
    def score(self, hidden: Tensor, token_offsets: Tensor, token_ids: Tensor) -> OptionLogprobs: ...
    def logits(self, hidden: Tensor, out: Tensor) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class PlainHead:
    """A product with one weight and nothing else, so that no logits need be held."""

    weight: Tensor  # [V, D]
    backend: Backend

    @property
    def vocab_size(self) -> int:
        return len(self.weight)

    def score(self, hidden: Tensor, token_offsets: Tensor, token_ids: Tensor) -> OptionLogprobs:
        return kernels.option_logprobs(hidden, self.weight, token_offsets, token_ids, backend=self.backend)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        head_logits(hidden, self.weight, out, self.backend)


@dataclass(frozen=True, slots=True, eq=False)
class OwnLogits:
    """Of a head with a bias, and where something is done to its logits: a few rows at a time."""

    network: Network

    @property
    def vocab_size(self) -> int:
        return self.network.head.out_features

    def score(self, hidden: Tensor, token_offsets: Tensor, token_ids: Tensor) -> OptionLogprobs:
        lse, entropy = hidden.new_empty((2, len(hidden)), dtype=torch.float32)
        argmax = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        logits = torch.empty(len(token_ids), dtype=torch.float32, device=hidden.device)
        offsets = token_offsets.tolist()
        for first, table in self._tables(hidden):
            rows = slice(first, first + len(table))
            lse[rows], argmax[rows] = table.logsumexp(-1), table.argmax(-1)
            own = slice(offsets[rows.start], offsets[rows.stop])
            row = torch.repeat_interleave(token_offsets[rows.start : rows.stop + 1].diff())
            logits[own] = table[row, token_ids[own].long()]
            table -= lse[rows, None]
            entropy[rows] = -(table.exp() * table).nan_to_num(nan=0.0).sum(-1)  # tokens that cannot be add nothing
        return OptionLogprobs(lse, logits, argmax, entropy)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        out.copy_(self.network.logits(hidden))

    def _tables(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        at_once = max(1, _TABLE // self.vocab_size)
        for first in range(0, len(hidden), at_once):
            yield first, self.network.logits(hidden[first : first + at_once])


_LARGE = 100.0  # of a logit: where a soft cap of any model changes it
_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # of logits, as a share of the largest


def head_of(network: Network, hidden: Tensor, backend: Backend) -> Head:
    """The plain one where it gives the model's own logits of ``hidden`` [r, D], and of the same so large that a soft
    cap shows, which hardly changes small ones."""
    own = OwnLogits(network)
    if network.head.bias is not None:
        return own
    plain = PlainHead(network.head.weight, backend)
    tolerance = _ROUNDING[hidden.dtype]
    for rows in (hidden, hidden * (_LARGE / _logits(plain, hidden).abs().max().item())):
        one, two = _logits(plain, rows), _logits(own, rows)
        if not bool((one - two).abs().max() <= tolerance * one.abs().max()):  # nor where one is not finite
            return own
    return plain


def _logits(head: Head, hidden: Tensor) -> Tensor:
    out = hidden.new_empty((len(hidden), head.vocab_size), dtype=torch.float32)
    head.logits(hidden, out)
    return out
