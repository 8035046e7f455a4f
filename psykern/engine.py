"""Runs a plan: wave by wave, in each wave layer by layer, in each layer batch by batch.

    for wave in plan.waves():
        hidden = embed(wave)
        for layer in model.layers:          # the weights of one layer are needed at a time
            for batch in wave.batches:      # row ranges under the batch budget
                hidden[batch] = layer(hidden[batch], keys and values of this layer, batch)
        scores = option_logprobs(final_norm(hidden[response rows]), head, tokens)

The key/value store holds one layer. Rows that later waves need are carried: their keys and values are kept for all
layers and stand in front of the next wave's store, so that no prefix is computed twice. In the last layer only the rows
that predict a target need queries, output projection and MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from psykern import kernels
from psykern.core import NonFiniteError, OutOfMemoryError, TargetScores, Wave
from psykern.model import Batch, Model, ModelConfig, Workspace, decoder_layer
from psykern.plan import Plan

WAVE_TOKENS = 32_768  # rows; at this size the weights of a layer are read once for seconds of work
BATCH_TOKENS = 2048  # rows; a product with a wide weight is 8 % faster than with 1024 (benchmarks/results)

_HEAD_TILES = 3 * 32 * 2**20  # bytes that option_logprobs holds in the reference backend


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan costs under a model: floating-point operations (a multiply-add counts two) and memory in bytes."""

    flops_body: int  # linear layers
    flops_attention: int  # queries times keys, and weights times values
    flops_head: int  # the vocabulary's logits
    wave_bytes: int  # the largest wave's hidden states, store, carried keys and values, and a batch's arrays, at most


def cost(plan: Plan, config: ModelConfig, dtype: torch.dtype) -> Cost:
    """The arithmetic and memory of running ``plan``; weights are not counted."""
    rows, responses, layers = plan.num_computed, plan.num_response_rows, config.num_layers
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    key_value = 2 * config.hidden_size * 2 * keys
    rest = 2 * (2 * config.hidden_size * queries + 3 * config.hidden_size * config.intermediate_size)
    attention = 0
    for window in set(config.windows[:-1]):
        attention += config.windows[:-1].count(window) * plan.visible_keys(window)
    attention += plan.visible_keys_of_responses(config.windows[-1])

    size = torch.empty(0, dtype=dtype).element_size()
    wave, carried = plan.max_wave_rows, plan.max_carried_rows
    batch = min(plan.batch_tokens, wave)
    values = wave * config.hidden_size  # hidden
    values += 2 * (wave + carried) * keys  # store of one layer
    values += 2 * carried * keys * (layers + 1)  # carried, all layers
    values += 2 * plan.max_response_rows * config.hidden_size
    values += batch * (5 * config.hidden_size + 3 * queries + 3 * config.intermediate_size)
    return Cost(
        flops_body=rows * layers * key_value + (rows * (layers - 1) + responses) * rest,
        flops_attention=4 * queries * attention,
        flops_head=2 * responses * config.hidden_size * config.vocab_size,
        wave_bytes=values * size + _HEAD_TILES,
    )


def run(
    plan: Plan,
    model: Model,
    *,
    backend: kernels.Backend = "auto",
    progress: Callable[[float], None] = lambda share: None,
) -> TargetScores:
    """Score every target of ``plan``. ``progress`` is told the share of the plan's rows that is done.

    Raises ``NonFiniteError`` (naming the layer) where a score is not finite, ``OutOfMemoryError`` where a wave does not
    fit the memory, ``kernels.BackendError`` where the backend is not there.
    """
    backend = kernels.resolve(backend, model.device)  # type: ignore[assignment]
    scores = TargetScores(
        logprob=np.zeros(plan.num_targets, np.float32),
        is_argmax=np.zeros(plan.num_targets, np.bool_),
        entropy=np.zeros(plan.num_targets, np.float32),
    )
    carried = torch.empty(0)
    done = 0
    with torch.inference_mode(), _memory_errors(plan):
        _check_memory(plan, model)
        work = Workspace.make(min(plan.batch_tokens, plan.max_wave_rows), model)
        for wave in plan.waves():
            rows = len(wave.token_ids)

            def layer_done(layers: int, before: int = done, rows: int = rows) -> None:
                progress((before + rows * layers / model.config.num_layers) / plan.num_computed)

            hidden, carried = _body(wave, model, carried, work, backend, layer_done)
            _head(wave, model, hidden, backend, scores)
            done += rows
    return scores


def _body(
    wave: Wave,
    model: Model,
    carried: Tensor,
    work: Workspace,
    backend: kernels.Backend,
    layer_done: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """All layers of one wave: the hidden states of its response rows [R, D], and what the next wave carries.

    carried: [L, 2, C, Hkv, Dh], keys and values of each layer; not read where the wave carries nothing.
    """
    config, device = model.config, model.device
    hidden = model.embed(torch.from_numpy(wave.token_ids))  # [N, D]
    is_finite = [hidden.sum()]
    heads = (config.num_kv_heads, config.head_dim)
    keys, values = store = hidden.new_empty((2, wave.num_carried + len(wave.token_ids), *heads))
    keep_rows = torch.from_numpy(wave.keep_rows).to(device)
    kept = hidden.new_empty((config.num_layers, 2, len(keep_rows), *heads))
    out = hidden.new_empty((len(wave.response_rows), config.hidden_size))
    batches, last_batches = list(_batches(wave, device, last=False)), list(_batches(wave, device, last=True))
    num_positions = int(wave.positions.max()) + 1
    for index in range(config.num_layers):
        layer = model.layer(index, num_positions)
        if wave.num_carried:
            store[:, : wave.num_carried] = carried[index]
        is_last = index + 1 == config.num_layers
        for rows, responses, batch in last_batches if is_last else batches:
            target = out[responses] if is_last else hidden[rows]
            decoder_layer(layer, hidden[rows], keys, values, batch, target, work, backend)
        torch.index_select(store, 1, keep_rows, out=kept[index])
        is_finite.append((out if is_last else hidden).sum())
        layer_done(index + 1)
    _check_finite(torch.stack(is_finite), model)
    return out, kept


def _batches(wave: Wave, device: torch.device, last: bool) -> Iterator[tuple[slice, slice, Batch]]:
    """The wave's row ranges, the response rows in each, and what its queries see: all rows, or in the last layer the
    response rows only."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    for b in range(len(wave.batch_offsets) - 1):
        begin, end = wave.batch_offsets[b : b + 2].tolist()
        first, stop = wave.batch_segments[b : b + 2].tolist()
        responses = slice(*np.searchsorted(wave.response_rows, [begin, end]).tolist())
        query_rows = wave.response_rows[responses] - begin
        offsets = wave.segment_offsets[first : stop + 1] - begin
        if last:
            offsets = np.searchsorted(query_rows, offsets).astype(np.int32)
        ranges = slice(int(wave.range_offsets[first]), int(wave.range_offsets[stop]))
        positions = wave.positions[begin:end]
        batch = Batch(
            positions=tensor(positions),
            store_row=wave.num_carried + begin,
            query_rows=tensor(query_rows).long() if last else None,
            query_positions=tensor(positions[query_rows] if last else positions),
            query_offsets=tensor(offsets),
            range_offsets=tensor(wave.range_offsets[first : stop + 1] - wave.range_offsets[first]),
            key_ranges=tensor(wave.key_ranges[ranges]),
        )
        yield slice(begin, end), responses, batch


def _head(wave: Wave, model: Model, hidden: Tensor, backend: kernels.Backend, scores: TargetScores) -> None:
    """Final norm and head of the response rows [R, D], written to ``scores`` by target id."""
    offsets = torch.from_numpy(wave.target_offsets).to(model.device)
    token_ids = torch.from_numpy(wave.target_token_ids).to(model.device)
    normed = model.final_norm(hidden, backend)
    result = kernels.option_logprobs(normed, model.head(), offsets, token_ids, backend=backend)
    if not bool(torch.isfinite(result.lse + result.entropy).all()):
        _raise_non_finite(model, model.config.num_layers, "the final norm and head")
    row = torch.repeat_interleave(offsets.diff())
    ids = wave.target_ids
    scores.logprob[ids] = (result.logits - result.lse[row]).cpu().numpy()
    scores.is_argmax[ids] = (result.argmax[row] == token_ids).cpu().numpy()
    scores.entropy[ids] = result.entropy[row].cpu().numpy()


def _check_finite(sums: Tensor, model: Model) -> None:
    """``sums``: [1 + layers], the sum of the hidden states after the embedding and after each layer."""
    broken = torch.nonzero(~torch.isfinite(sums))
    if len(broken):
        first = int(broken[0])
        _raise_non_finite(model, first - 1, "the embedding" if first == 0 else f"layer {first - 1}")


def _raise_non_finite(model: Model, layer: int, name: str) -> None:
    outside = layer < 0 or layer >= model.config.num_layers
    tensors = model.non_finite_tensors(-1 if outside else layer)
    why = f"its weights hold NaN or infinity: {', '.join(tensors)}" if tensors else "all its weights are finite"
    raise NonFiniteError(f"scores are not finite; this began in {name} (counted from 0); {why}")


def _check_memory(plan: Plan, model: Model) -> None:
    """Refuses, before the first forward pass, a wave that cannot fit the memory that is free now."""
    needed, free = cost(plan, model.config, model.dtype).wave_bytes, _free_bytes(model.device)
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"a wave needs about {needed / 2**20:,.0f} MiB beyond the weights and {free / 2**20:,.0f} MiB are free; "
            f"lower --wave-tokens (the largest wave has {plan.max_wave_rows:,} rows, and carries "
            f"{plan.max_carried_rows:,}) or --batch-tokens ({plan.batch_tokens:,})"
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None  # not Linux: the allocator will say


@contextmanager
def _memory_errors(plan: Plan) -> Iterator[None]:
    """Allocation failures of torch and numpy as one error that names the budgets."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "alloc" in str(error).lower()
        if not is_memory or isinstance(error, kernels.BackendError):
            raise
        raise OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0]}; lower --wave-tokens (the largest wave has "
            f"{plan.max_wave_rows:,} rows, and carries {plan.max_carried_rows:,}) or --batch-tokens "
            f"({plan.batch_tokens:,})"
        ) from error
