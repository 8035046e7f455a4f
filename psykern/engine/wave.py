"""Computes one wave: layer by layer, and in each layer batch by batch.

    hidden = embed(wave)
    for layer in model.layers:          # the weights of one layer are needed at a time
        for batch in wave.batches:      # row ranges under the batch budget
            hidden[batch] = layer(hidden[batch], keys and values of this layer, batch)
    scores = option_logprobs(final_norm(hidden[response rows]), head, tokens)

In the last layer only the rows that predict a target need queries, output projection and MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from psykern.engine.plan import Wave
from psykern.engine.readout import Readout, read_out
from psykern.engine.store import Store
from psykern.engine.upload import upload
from psykern.engine.watch import Span, Watch, now
from psykern.kernels.segments import Segments
from psykern.models.batch import Batch, Scratch
from psykern.models.decoder import Decoder
from psykern.models.model import Model


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A wave's scores on their way to the host; [nnz] each by target of the wave. To be read after :meth:`wait`."""

    wave: Wave
    logprob: Tensor
    is_argmax: Tensor
    entropy: Tensor
    readout: Readout  # is here already
    sums: Tensor  # [1 + layers + 1] of the hidden states after the embedding and each layer, and of the scores
    spans: list[Span]  # when each layer and the head began and ended; none on a CPU
    arrived: torch.cuda.Event | None  # None: they are here

    def wait(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()


def run_wave(model: Model, wave: Wave, store: Store, scratch: Scratch, watch: Watch) -> Launched:
    """Launches all of ``wave``; on a device nothing here waits for it. Waves of a store come in their order."""
    out, sums = _layers(model, wave, store, scratch, watch)
    return launched(model, wave, out, sums, watch)


def launched(model: Decoder, wave: Wave, out: Tensor, sums: list[Tensor], watch: Watch) -> Launched:
    """The scores of the response rows, whose hidden states are ``out`` [R, D]."""
    with watch.part():
        logprob, is_argmax, entropy, total, readout = _head(model, wave, out)
    return Launched(
        wave,
        logprob=logprob.to("cpu", non_blocking=True),
        is_argmax=is_argmax.to("cpu", non_blocking=True),
        entropy=entropy.to("cpu", non_blocking=True),
        readout=readout,
        sums=torch.stack([*sums, total]).to("cpu", non_blocking=True),
        spans=watch.spans,
        arrived=now() if model.device.type == "cuda" else None,
    )


def _layers(model: Model, wave: Wave, store: Store, scratch: Scratch, watch: Watch) -> tuple[Tensor, list[Tensor]]:
    """The hidden states of the response rows [R, D], and the sum of the hidden states after the embedding and after
    each layer."""
    hidden = model.embed(upload(wave.token_ids, model.device))  # [N, D]
    out = hidden.new_empty((len(wave.response_rows), hidden.shape[1]))
    sums = [hidden.sum(dtype=torch.float32)]
    all_rows = _all_rows(wave, hidden)
    response_rows = _response_rows(wave, all_rows, out)
    num_layers, num_positions = model.num_layers, int(wave.positions.max()) + 1
    for index in range(num_layers):
        layer, is_last = model.layer(index, num_positions), index + 1 == num_layers
        with watch.part():
            state = store.enter(index, wave)
            for call in response_rows if is_last else all_rows:
                layer(call.hidden, call.out, state, call.batch, scratch)
            store.leave(index, wave)
            sums.append((out if is_last else hidden).sum(dtype=torch.float32))
        del layer  # whose weights may be there for this wave alone: before the next one's are made
        watch.layers_done((index + 1) / num_layers)
    return out, sums


class _Call(NamedTuple):
    """What a layer takes and gives for one batch."""

    hidden: Tensor  # [n, D] rows of the wave
    out: Tensor  # [m, D]: ``hidden`` itself, or in the last layer its response rows
    batch: Batch


def _all_rows(wave: Wave, hidden: Tensor) -> list[_Call]:
    """Each batch of the wave, every row of it a query."""
    positions = upload(wave.positions, hidden.device)
    calls = []
    for b, (begin, end) in enumerate(pairwise(wave.batch_offsets.tolist())):
        batch = Batch.of_all(positions[begin:end], wave.num_carried + begin, segments_of(wave, b))
        calls.append(_Call(hidden[begin:end], hidden[begin:end], batch))
    return calls


def _response_rows(wave: Wave, all_rows: Sequence[_Call], out: Tensor) -> list[_Call]:
    """The same batches where only the rows that predict a target are queries: for the last layer."""
    ends = np.searchsorted(wave.response_rows, wave.batch_offsets)
    rows = wave.response_rows - np.repeat(wave.batch_offsets[:-1], np.diff(ends))  # [R] of their batch
    positions = wave.positions[wave.response_rows]
    rows_there, positions_there = upload(rows.astype(np.int64), out.device), upload(positions, out.device)
    calls = []
    for call, (begin, end) in zip(all_rows, pairwise(ends.tolist()), strict=True):
        offsets = np.searchsorted(rows[begin:end], call.batch.segments.query_offsets.numpy()).astype(np.int32)
        segments = replace(call.batch.segments, positions=_tensor(positions[begin:end]), query_offsets=_tensor(offsets))
        batch = replace(
            call.batch,
            query_rows=rows_there[begin:end],
            query_positions=positions_there[begin:end],
            segments=segments,
        )
        calls.append(_Call(call.hidden, out[begin:end], batch))
    return calls


def segments_of(wave: Wave, b: int) -> Segments:
    """What the rows of batch ``b`` see."""
    first, stop = wave.batch_segments[b : b + 2].tolist()
    begin, end = wave.batch_offsets[b : b + 2].tolist()
    range_offsets = wave.range_offsets[first : stop + 1]
    return Segments(
        positions=_tensor(wave.positions[begin:end]),
        query_offsets=_tensor(wave.segment_offsets[first : stop + 1] - begin),
        range_offsets=_tensor(range_offsets - range_offsets[0]),
        key_ranges=_tensor(wave.key_ranges[range_offsets[0] : range_offsets[-1]]),
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _head(model: Decoder, wave: Wave, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Readout]:
    """Of the response rows [R, D], by target of the wave, its logprob, whether it is the argmax, and the entropy, [nnz]
    each; the sum of the rows' lse and entropy; and what else is wanted."""
    offsets, token_ids = upload(wave.target_offsets, model.device), upload(wave.target_token_ids, model.device)
    result = model.score(hidden, offsets, token_ids)
    row = torch.repeat_interleave(offsets.diff(), output_size=len(token_ids))
    logprob = result.logits - result.lse[row]
    is_argmax, total = result.argmax[row] == token_ids, (result.lse + result.entropy).sum()
    readout = read_out(model, wave, hidden, result.lse, is_argmax)
    return logprob, is_argmax, result.entropy[row], total, readout
