"""Computes one wave of a model whose forward is the library's: batch by batch through all layers, or path by path.

    shared:  for batch in wave.batches:  hidden[its response rows] = forward(batch, keys and values of all layers)
    whole:   for path in the wave's leaves:  hidden[response rows on it] = forward(tokens of the path)

A whole path is computed in the wave that has its last rows. So what waves carry there are tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from psykern.core import csr
from psykern.engine.plan import Plan, Wave
from psykern.engine.store import Store
from psykern.engine.upload import upload
from psykern.engine.watch import Watch
from psykern.engine.wave import Launched, launched, segments_of
from psykern.models.batch import Batch
from psykern.models.decoder import DecoderSpec
from psykern.models.foreign.model import ForeignModel
from psykern.models.foreign.spec import ForeignSpec


class PathTokens:
    """The tokens of a wave's rows, and of those that it carries: what a store is where keys and values are not kept."""

    def __init__(self) -> None:
        self._carried = np.empty(0, np.int32)

    def enter(self, wave: Wave) -> np.ndarray:
        """[C + N] int32. Of one plan after the other, each wave once, in order."""
        tokens = np.concatenate((self._carried[: wave.num_carried], wave.token_ids))
        self._carried = tokens[wave.keep_rows]
        return tokens


def rows_computed(plan: Plan, spec: DecoderSpec) -> int:
    """Rows that go through the model: those of the plan's trie, or with one pass per sequence those of all paths."""
    if not isinstance(spec, ForeignSpec) or spec.mode == "shared":
        return plan.num_computed
    return sum(len(path) for wave in plan.waves() for path, _ in _leaves(wave))


def run_foreign_wave(model: ForeignModel, wave: Wave, store: Store | PathTokens, watch: Watch) -> Launched:
    """Launches all of ``wave``. Waves of a store come in their order."""
    hidden = torch.empty((len(wave.response_rows), model.spec.hidden_size), dtype=model.dtype, device=model.device)
    sums = torch.zeros(model.num_layers, device=model.device)
    with watch.part():
        if isinstance(store, PathTokens):
            _paths(model, wave, store, hidden, sums, watch)
        else:
            _batches(model, wave, store, hidden, sums, watch)
    return launched(model, wave, hidden, [torch.zeros_like(sums[:1]).sum(), *sums], watch)


def _batches(model: ForeignModel, wave: Wave, store: Store, hidden: Tensor, sums: Tensor, watch: Watch) -> None:
    """The response rows' hidden states, to ``hidden`` [R, D]."""
    token_ids, positions = upload(wave.token_ids, model.device), upload(wave.positions, model.device)
    states = [store.enter(layer, wave) for layer in range(model.num_layers)]
    ends = np.searchsorted(wave.response_rows, wave.batch_offsets)
    for b, (begin, end) in enumerate(pairwise(wave.batch_offsets.tolist())):
        first, stop = ends[b : b + 2].tolist()
        rows = upload((wave.response_rows[first:stop] - begin).astype(np.int64), model.device)
        batch = Batch.of_all(positions[begin:end], wave.num_carried + begin, segments_of(wave, b))
        hidden[first:stop] = model.batch(token_ids[begin:end], batch, rows, states, sums)
        watch.layers_done(end / len(token_ids))
    for layer in range(model.num_layers):
        store.leave(layer, wave)


def _paths(model: ForeignModel, wave: Wave, store: PathTokens, hidden: Tensor, sums: Tensor, watch: Watch) -> None:
    tokens, done = store.enter(wave), 0
    for path, responses in _leaves(wave):
        token_ids = upload(tokens[path], model.device)
        rows = upload(wave.positions[wave.response_rows[responses]].astype(np.int64), model.device)
        hidden[upload(responses, model.device)] = model.sequence(token_ids, rows, sums)
        done += len(responses)
        watch.layers_done(done / len(wave.response_rows))


def _leaves(wave: Wave) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Paths on which all response rows of the wave lie, the longest first: the rows of the store that a path is, [T]
    int64, and which of the response rows are computed with it, [r] int64. A path ends with its last response row."""
    response = np.full(wave.num_carried + len(wave.token_ids), -1, np.int64)  # by row of the store
    response[wave.num_carried + wave.response_rows] = np.arange(len(wave.response_rows))
    lengths = wave.positions[wave.segment_offsets[1:] - 1]
    for segment in np.argsort(-lengths, kind="stable").tolist():
        ranges = wave.key_ranges[wave.range_offsets[segment] : wave.range_offsets[segment + 1]]
        path = csr.members(ranges[:, 0], ranges[:, 1])[1].astype(np.int64)
        waiting = np.flatnonzero(response[path] >= 0)
        if len(waiting):
            path = path[: waiting[-1] + 1]
            own = response[path[waiting]]
            response[path] = -1
            yield path, own
