"""What is wanted of a target's distribution beside its scores: rank, the likeliest tokens, a set's mass, all of it.

The response rows go through the head once more, a few at a time, to a table of log-probabilities in fp32, of which what
is wanted is kept in the host's memory. Rows are normalized by the scores' own lse, so that a token's log-probability
here and there differs by the rounding of a product alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from psykern.core.types import NOTHING_MORE, Wanted
from psykern.engine.plan import Wave
from psykern.models.decoder import Decoder, DecoderSpec
from psykern.models.head import head_logits_bytes

_TABLE = 2**23  # numbers of a table: 32 MiB


@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """By target; fields as :class:`.TargetScores` has them. None: not wanted."""

    rank: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    full: np.ndarray | None = None
    mass: np.ndarray | None = None

    @classmethod
    def room(cls, wanted: Wanted, num_targets: int, vocab_size: int) -> Readout:
        """Zeros for what is wanted."""
        n, k = num_targets, wanted.top_k
        return cls(
            rank=np.zeros(n, np.int64) if wanted.rank else None,
            top_ids=np.zeros((n, k), np.int64) if k else None,
            top_logprobs=np.zeros((n, k), np.float32) if k else None,
            full=np.zeros((n, vocab_size), np.float32) if wanted.full else None,
            mass=np.zeros(n, np.float32) if wanted.mass else None,
        )

    def put(self, target_ids: np.ndarray, part: Readout) -> None:
        """Puts ``part``, which was read of a wave, where its targets belong."""
        for field in fields(self):
            values = getattr(self, field.name)
            if values is not None:
                values[target_ids] = getattr(part, field.name)


def readout_bytes(wanted: Wanted, spec: DecoderSpec) -> int:
    """Of the device's memory, at most: a table, what ranks are compared in, and a tile of the head."""
    if wanted == NOTHING_MORE:
        return 0
    table = 4 * max(_TABLE, spec.vocab_size)
    return (3 if wanted.rank else 1) * table + head_logits_bytes(spec.hidden_size)


def read_out(model: Decoder, wave: Wave, hidden: Tensor, lse: Tensor, is_argmax: Tensor) -> Readout:
    """By target of ``wave``, of its response rows ``hidden`` [R, D] before the final norm, their ``lse`` [R] and
    ``is_argmax`` [nnz]. On a device the host waits for it."""
    wanted = wave.wanted
    out = Readout.room(wanted, len(wave.target_ids), model.spec.vocab_size)
    if wanted == NOTHING_MORE:
        return out
    token_ids = torch.from_numpy(wave.target_token_ids.astype(np.int64)).to(hidden.device)
    mass_ids = torch.tensor(wanted.mass, dtype=torch.int64, device=hidden.device)
    for table, rows, own in _tables(model, wave, hidden, lse):
        if out.rank is not None:
            out.rank[own] = _ranks(table, rows, token_ids[own], is_argmax[own]).cpu().numpy()
        if out.top_ids is not None and out.top_logprobs is not None:
            top = table.topk(wanted.top_k, dim=1)
            out.top_ids[own] = top.indices.cpu().numpy()[rows]
            out.top_logprobs[own] = top.values.cpu().numpy()[rows]
        if out.full is not None:
            out.full[own] = table.cpu().numpy()[rows]
        if out.mass is not None:
            out.mass[own] = table[:, mass_ids].logsumexp(dim=1).cpu().numpy()[rows]
    return out


def _tables(model: Decoder, wave: Wave, hidden: Tensor, lse: Tensor) -> Iterator[tuple[Tensor, np.ndarray, slice]]:
    """Log-probabilities [r, V] of a few rows, and their targets: which of these rows [t] each is of, and a slice."""
    normed, vocab_size, offsets = model.final_norm(hidden), model.spec.vocab_size, wave.target_offsets
    at_once = max(1, _TABLE // vocab_size)
    table = normed.new_empty((min(at_once, len(normed)), vocab_size), dtype=torch.float32)
    for first in range(0, len(normed), at_once):
        rows = normed[first : first + at_once]
        own = slice(int(offsets[first]), int(offsets[first + len(rows)]))
        of = table[: len(rows)]
        model.logits(rows, of)
        of -= lse[first : first + len(rows), None]
        yield of, np.repeat(np.arange(len(rows)), np.diff(offsets[first : first + len(rows) + 1])), own


def _ranks(table: Tensor, rows: np.ndarray, token_ids: Tensor, is_argmax: Tensor) -> Tensor:
    """1 + the number of tokens that are likelier, or as likely with a lower id; as the scores round otherwise, 1 only
    where they say so."""
    ids = torch.arange(table.shape[1], device=table.device)
    ranks = []
    for first in range(0, len(rows), len(table)):  # a row may have very many targets
        row = torch.from_numpy(rows[first : first + len(table)]).to(table.device)
        token = token_ids[first : first + len(table), None]
        of = table[row]
        own = of.gather(1, token)
        before = (of > own) | ((of == own) & (ids < token))
        ranks.append(before.sum(dim=1))
    rank = 1 + torch.cat(ranks)
    return torch.where(is_argmax, 1, rank.clamp_min(2))
