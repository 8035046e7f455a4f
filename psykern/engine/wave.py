"""Computes one wave: layer by layer, and in each layer batch by batch.

    hidden = embed(wave)
    for layer in model.layers:          # the weights of one layer are needed at a time
        for batch in wave.batches:      # row ranges under the batch budget
            hidden[batch] = layer(hidden[batch], keys and values of this layer, batch)
    scores = option_logprobs(final_norm(hidden[response rows]), head, tokens)

In the last layer only the rows that predict a target need queries, output projection and MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from psykern import kernels
from psykern.engine.plan import Wave
from psykern.engine.store import Store
from psykern.engine.upload import upload
from psykern.engine.watch import Span, Watch, now
from psykern.models.layer import Batch, Workspace, decoder_layer
from psykern.models.model import Model


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A wave's scores on their way to the host; [nnz] each by target of the wave. To be read after :meth:`wait`."""

    wave: Wave
    logprob: Tensor
    is_argmax: Tensor
    entropy: Tensor
    sums: Tensor  # [1 + layers + 1] of the hidden states after the embedding and each layer, and of the scores
    spans: list[Span]  # when each layer and the head began and ended; none on a CPU
    arrived: torch.cuda.Event | None  # None: they are here

    def wait(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()


def run_wave(
    model: Model, wave: Wave, store: Store, scratch: Workspace, watch: Watch, backend: kernels.Backend
) -> Launched:
    """Launches all of ``wave``; on a device nothing here waits for it. Waves of a store come in their order."""
    out, sums = _layers(model, wave, store, scratch, watch, backend)
    with watch.part():
        logprob, is_argmax, entropy, total = _head(wave, model, out, backend)
    return Launched(
        wave,
        logprob=logprob.to("cpu", non_blocking=True),
        is_argmax=is_argmax.to("cpu", non_blocking=True),
        entropy=entropy.to("cpu", non_blocking=True),
        sums=torch.stack([*sums, total]).to("cpu", non_blocking=True),
        spans=watch.spans,
        arrived=now() if model.device.type == "cuda" else None,
    )


def _layers(
    model: Model, wave: Wave, store: Store, scratch: Workspace, watch: Watch, backend: kernels.Backend
) -> tuple[Tensor, list[Tensor]]:
    """The hidden states of the response rows [R, D], and the sum of the hidden states after the embedding and after
    each layer."""
    hidden = model.embed(upload(wave.token_ids, model.device))  # [N, D]
    out = hidden.new_empty((len(wave.response_rows), hidden.shape[1]))
    sums = [hidden.sum(dtype=torch.float32)]
    every, last = _calls(wave, hidden, out)
    num_layers, num_positions = model.config.num_layers, int(wave.positions.max()) + 1
    for index in range(num_layers):
        layer, is_last = model.layer(index, num_positions), index + 1 == num_layers
        with watch.part():
            state = store.enter(index, wave)
            for call in last if is_last else every:
                decoder_layer(layer, call.hidden, state.keys, state.values, call.batch, call.out, scratch, backend)
            store.leave(index, wave)
            sums.append((out if is_last else hidden).sum(dtype=torch.float32))
        watch.layers_done((index + 1) / num_layers)
    return out, sums


class _Call(NamedTuple):
    """What a layer takes and gives for one batch."""

    hidden: Tensor  # [n, D] rows of the wave
    out: Tensor  # [m, D]: ``hidden`` itself, or in the last layer its response rows
    batch: Batch


def _calls(wave: Wave, hidden: Tensor, out: Tensor) -> tuple[list[_Call], list[_Call]]:
    """For each batch of the wave, where all its rows are queries; and the same for the last layer."""
    ends = np.searchsorted(wave.response_rows, wave.batch_offsets)
    query_rows = wave.response_rows - np.repeat(wave.batch_offsets[:-1], np.diff(ends))  # [R] rows of their batch
    query_positions = wave.positions[wave.response_rows]
    positions_there = upload(wave.positions, hidden.device)
    query_rows_there = upload(query_rows.astype(np.int64), hidden.device)
    query_positions_there = upload(query_positions, hidden.device)
    every, last = [], []
    for b in range(len(wave.batch_offsets) - 1):
        begin, end = wave.batch_offsets[b : b + 2].tolist()
        rows, responses = slice(begin, end), slice(*ends[b : b + 2].tolist())
        offsets, range_offsets, key_ranges = _segments(wave, b)
        response_offsets = np.searchsorted(query_rows[responses], offsets).astype(np.int32)
        all_rows = Batch(
            positions=positions_there[rows],
            store_row=wave.num_carried + begin,
            query_rows=None,
            query_positions=positions_there[rows],
            segment_positions=_tensor(wave.positions[rows]),
            query_offsets=_tensor(offsets),
            range_offsets=_tensor(range_offsets),
            key_ranges=_tensor(key_ranges),
        )
        some_rows = replace(
            all_rows,
            query_rows=query_rows_there[responses],
            query_positions=query_positions_there[responses],
            segment_positions=_tensor(query_positions[responses]),
            query_offsets=_tensor(response_offsets),
        )
        every.append(_Call(hidden[rows], hidden[rows], all_rows))
        last.append(_Call(hidden[rows], out[responses], some_rows))
    return every, last


def _segments(wave: Wave, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The batch's part of the segment offsets and range offsets, both from 0 on, and of the key ranges."""
    first, stop = wave.batch_segments[batch : batch + 2].tolist()
    range_offsets = wave.range_offsets[first : stop + 1]
    return (
        wave.segment_offsets[first : stop + 1] - wave.batch_offsets[batch],
        range_offsets - range_offsets[0],
        wave.key_ranges[range_offsets[0] : range_offsets[-1]],
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _head(wave: Wave, model: Model, hidden: Tensor, backend: kernels.Backend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Final norm and head of the response rows [R, D]: by target of the wave its logprob, whether it is the argmax, and
    the entropy, [nnz] each; and the sum of the rows' lse and entropy."""
    offsets, token_ids = upload(wave.target_offsets, model.device), upload(wave.target_token_ids, model.device)
    normed = model.final_norm(hidden, backend)
    result = kernels.option_logprobs(normed, model.head(), offsets, token_ids, backend=backend)
    row = torch.repeat_interleave(offsets.diff(), output_size=len(token_ids))
    logprob = result.logits - result.lse[row]
    return logprob, result.argmax[row] == token_ids, result.entropy[row], (result.lse + result.entropy).sum()
