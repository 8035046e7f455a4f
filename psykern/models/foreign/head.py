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

_TABLE = 2**25  # numbers of a table of logits: 128 MiB


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
    backend: Backend

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
        out.copy_(self._of(hidden))

    def _tables(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        at_once = max(1, _TABLE // self.vocab_size)
        for first in range(0, len(hidden), at_once):
            yield first, self._of(hidden[first : first + at_once])

    def _of(self, hidden: Tensor) -> Tensor:
        """[r, V]; in fp32 from the product on, so that half precision rounds no logit."""
        head = self.network.head
        out = hidden.new_empty((len(hidden), self.vocab_size), dtype=torch.float32)
        head_logits(hidden, head.weight, out, self.backend)
        if head.bias is not None:
            out += head.bias
        return self.network.finished(out)


_LARGE = 100.0  # of a logit: where a soft cap of any model changes it


def head_of(network: Network, hidden: Tensor, backend: Backend) -> Head:
    """The plain one where nothing is done to logits of ``hidden`` [r, D], nor to the same so large that a soft cap
    shows, which hardly changes small ones."""
    plain = PlainHead(network.head.weight, backend)
    logits = hidden.new_empty((len(hidden), plain.vocab_size), dtype=torch.float32)
    plain.logits(hidden, logits)
    large = logits * (_LARGE / logits.abs().max())
    is_plain = all(torch.equal(network.finished(of.clone()), of) for of in (logits, large))
    return plain if is_plain and network.head.bias is None else OwnLogits(network, backend)
