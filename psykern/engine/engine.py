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

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from psykern import kernels
from psykern.core.errors import NonFiniteError, OutOfMemoryError
from psykern.core.stages import ahead
from psykern.core.types import TargetScores
from psykern.engine.plan import Plan, Wave
from psykern.models.config import ModelConfig
from psykern.models.layer import Batch, Workspace, decoder_layer
from psykern.models.model import Model
from psykern.models.slots import free_bytes


@dataclass(frozen=True, slots=True)
class Budgets:
    """Rows that are computed together."""

    wave_tokens: int  # a layer's weights are read once for these
    batch_tokens: int  # what one product of a layer takes


# A product with a wide weight is 8 % faster with 2,048 rows than with 1,024 (benchmarks/results).
CPU_BUDGETS = Budgets(wave_tokens=32_768, batch_tokens=2048)

_DEVICE_BATCH = 16_384  # rows: a launch costs the host more than the smallest model's product of fewer
_DEVICE_WAVE = (16_384, 131_072)  # rows at least, where memory is short, and at most
_CARRIED = 45_056  # rows from wave to wave: a tenth more than the longest transcript of the 15 studies, 41,002 tokens
_WAVE_SHARE = 0.6  # of a device's free memory; the rest is for fragments and for what others take

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
    values += 2 * carried * keys * 2 * layers  # carried from the last wave and to the next, all layers
    values += 2 * plan.max_response_rows * config.hidden_size
    values += batch * _batch_values(config)
    return Cost(
        flops_body=rows * layers * key_value + (rows * (layers - 1) + responses) * rest,
        flops_attention=4 * queries * attention,
        flops_head=2 * responses * config.hidden_size * config.vocab_size,
        wave_bytes=values * size + _HEAD_TILES,
    )


def budgets(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Budgets:
    """Budgets that fit ``device`` as it is now: on a device with memory of its own, waves as large as that allows when
    one of the longest transcripts is carried from wave to wave."""
    if device.type == "cpu":
        return CPU_BUDGETS
    size = torch.empty(0, dtype=dtype).element_size()
    key_value = 2 * config.num_kv_heads * config.head_dim
    longest = min(config.max_positions, _CARRIED)
    fixed = _DEVICE_BATCH * _batch_values(config) + 2 * longest * key_value * (config.num_layers + 1)
    free = _WAVE_SHARE * (free_bytes(device) or 0) - _HEAD_TILES
    rows = int((free / size - fixed) // (2 * config.hidden_size + key_value))
    least, most = _DEVICE_WAVE
    rows = max(least, min(rows - rows % _DEVICE_BATCH, most))
    return Budgets(wave_tokens=rows, batch_tokens=min(_DEVICE_BATCH, rows))


def _batch_values(config: ModelConfig) -> int:
    """Numbers that one row of a batch needs between a layer's operations, at most."""
    return 5 * config.hidden_size + 3 * config.num_heads * config.head_dim + 3 * config.intermediate_size


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
    (scores,) = stream([(plan, progress)], model, backend=backend)
    return scores


def stream(
    plans: Iterable[tuple[Plan, Callable[[float], None]]],
    model: Model,
    *,
    backend: kernels.Backend = "auto",
    clock: DeviceClock | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[TargetScores, None, None]:
    """The scores of one plan after the other, as :func:`run` gives them; each plan comes with its ``progress``.

    While a device computes one wave, a thread lays out the next, the host launches it, and the scores of the last go
    where they belong: also from one plan to the next. ``plans`` is read in that thread, ahead of the scores. ``stop``
    is asked before a plan is begun; once it holds no other is, and what was begun is finished.
    """
    backend = kernels.resolve(backend, model.device)
    clock = clock or DeviceClock()
    launched: deque[tuple[_Job, _Computed | None]] = deque()
    most = 0 if model.device.type == "cpu" else 1  # waves that a device computes while the host goes on
    carried, work = torch.empty(0), None
    with ahead(_waves(plans)) as waves:
        for job, wave in waves:
            if not job.began and stop():
                break
            job.began = True
            computed = None
            if wave is not None:
                with _memory_errors(job.plan), torch.inference_mode():
                    if wave.index == 0:
                        _check_memory(job.plan, model)
                        work = Workspace.grown(work, min(job.plan.batch_tokens, job.plan.max_wave_rows), model)
                    assert work is not None
                    computed, carried = _compute(job, wave, model, carried, work, backend)
            launched.append((job, computed))
            while len(launched) > most:
                yield from _finish(*launched.popleft(), model, clock)
    while launched:
        yield from _finish(*launched.popleft(), model, clock)


_Span = tuple[torch.cuda.Event, torch.cuda.Event]


class DeviceClock:
    """How much of the time between its first and its last wave a device computed. A CPU is not timed.

    Idle is what lies between the layers and heads of all waves: there the device waits for a wave or for a layer's
    weights. Gaps between the launches of one layer are not seen: where a layer is shorter than its launches, ask a
    profiler (``benchmarks/bench_score.py`` does).
    """

    def __init__(self) -> None:
        self._first: torch.cuda.Event | None = None
        self._busy = self._span = 0.0  # milliseconds

    def add(self, spans: Sequence[_Span]) -> None:
        """Start and end of each layer, and of the head, of a wave that is computed."""
        if not spans:
            return
        self._first = self._first or spans[0][0]
        self._busy += sum(start.elapsed_time(end) for start, end in spans)
        self._span = self._first.elapsed_time(spans[-1][1])

    @property
    def idle_share(self) -> float | None:
        """From 0 to 1; None: no device was timed."""
        return max(0.0, 1.0 - self._busy / self._span) if self._span > 0 else None


@dataclass(slots=True)
class _Job:
    """A plan and what has come of it."""

    plan: Plan
    progress: Callable[[float], None]
    scores: TargetScores
    waves_left: int
    began: bool = False
    rows_done: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Computed:
    """A wave's scores on their way to the host; [nnz] each by target of the wave."""

    wave: Wave
    logprob: Tensor
    is_argmax: Tensor
    entropy: Tensor
    sums: Tensor  # [1 + layers + 1] of the hidden states after the embedding and each layer, and of the scores
    spans: list[_Span]  # when each layer and the head began and ended; none on a CPU
    arrived: torch.cuda.Event | None


def _waves(plans: Iterable[tuple[Plan, Callable[[float], None]]]) -> Iterator[tuple[_Job, Wave | None]]:
    """The waves of all plans; a plan without a target has none, which is said by one None."""
    for plan, progress in plans:
        scores = TargetScores(
            logprob=np.zeros(plan.num_targets, np.float32),
            is_argmax=np.zeros(plan.num_targets, np.bool_),
            entropy=np.zeros(plan.num_targets, np.float32),
        )
        job = _Job(plan, progress, scores, plan.num_waves)
        yield from ((job, wave) for wave in plan.waves())
        if not plan.num_waves:
            yield job, None


def _compute(
    job: _Job,
    wave: Wave,
    model: Model,
    carried: Tensor,
    work: Workspace,
    backend: kernels.Backend,
) -> tuple[_Computed, Tensor]:
    """Launches one wave, and gives it with what the next wave carries. On a device nothing here waits for it."""
    is_cuda = model.device.type == "cuda"
    spans: list[_Span] = []

    @contextmanager
    def timed() -> Iterator[None]:
        start = _event() if is_cuda else None
        yield
        if start is not None:
            spans.append((start, _event()))

    def layer_done(count: int) -> None:
        if not is_cuda:
            share = count / model.config.num_layers
            job.progress((job.rows_done + len(wave.token_ids) * share) / job.plan.num_computed)

    hidden, kept, sums = _body(wave, model, carried, work, backend, timed, layer_done)
    with timed():
        logprob, is_argmax, entropy, total = _head(wave, model, hidden, backend)
    computed = _Computed(
        wave,
        logprob=logprob.to("cpu", non_blocking=True),
        is_argmax=is_argmax.to("cpu", non_blocking=True),
        entropy=entropy.to("cpu", non_blocking=True),
        sums=torch.stack([*sums, total]).to("cpu", non_blocking=True),
        spans=spans,
        arrived=_event() if is_cuda else None,
    )
    return computed, kept


def _event() -> torch.cuda.Event:
    """Now, in the order of what the device was given."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _finish(job: _Job, computed: _Computed | None, model: Model, clock: DeviceClock) -> Iterator[TargetScores]:
    """Waits for a wave and puts its scores where they belong; gives the scores of a plan that is complete."""
    if computed is not None:
        if computed.arrived is not None:
            computed.arrived.synchronize()
        clock.add(computed.spans)
        _check_finite(computed.sums, model)
        ids = computed.wave.target_ids
        job.scores.logprob[ids] = computed.logprob.numpy()
        job.scores.is_argmax[ids] = computed.is_argmax.numpy()
        job.scores.entropy[ids] = computed.entropy.numpy()
        job.rows_done += len(computed.wave.token_ids)
        job.waves_left -= 1
        job.progress(job.rows_done / job.plan.num_computed)
    if not job.waves_left:
        yield job.scores


def _body(
    wave: Wave,
    model: Model,
    carried: Tensor,
    work: Workspace,
    backend: kernels.Backend,
    timed: Callable[[], AbstractContextManager[None]],
    layer_done: Callable[[int], None],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All layers of one wave: the hidden states of its response rows [R, D], what the next wave carries, and the sum of
    the hidden states after the embedding and after each layer.

    carried: [L, 2, C, Hkv, Dh], keys and values of each layer; not read where the wave carries nothing.
    """
    config, device = model.config, model.device
    hidden = model.embed(_upload(wave.token_ids, device))  # [N, D]
    sums = [hidden.sum(dtype=torch.float32)]
    heads = (config.num_kv_heads, config.head_dim)
    keys, values = store = hidden.new_empty((2, wave.num_carried + len(wave.token_ids), *heads))
    keep_rows = _upload(wave.keep_rows, device)
    kept = hidden.new_empty((config.num_layers, 2, len(keep_rows), *heads))
    out = hidden.new_empty((len(wave.response_rows), config.hidden_size))
    batches, last_batches = _batches(wave, device)
    num_positions = int(wave.positions.max()) + 1
    for index in range(config.num_layers):
        layer = model.layer(index, num_positions)
        with timed():
            if wave.num_carried:
                store[:, : wave.num_carried] = carried[index]
            is_last = index + 1 == config.num_layers
            for rows, responses, batch in last_batches if is_last else batches:
                target = out[responses] if is_last else hidden[rows]
                decoder_layer(layer, hidden[rows], keys, values, batch, target, work, backend)
            kernels.gather_rows(store, keep_rows, out=kept[index], backend=backend)
            sums.append((out if is_last else hidden).sum(dtype=torch.float32))
        layer_done(index + 1)
    return out, kept, sums


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of ``array`` on ``device``; a device's copy is made when its turn comes, the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


_Rows = tuple[slice, slice, Batch]


def _batches(wave: Wave, device: torch.device) -> tuple[list[_Rows], list[_Rows]]:
    """The wave's row ranges, the response rows in each, and what its queries see: all rows, or, for the last layer, the
    response rows only."""
    ends = np.searchsorted(wave.response_rows, wave.batch_offsets)
    rows_of_batch = wave.response_rows - np.repeat(wave.batch_offsets[:-1], np.diff(ends))
    positions, response_positions = wave.positions, wave.positions[wave.response_rows]
    on_device = _upload(positions, device)
    query_rows = _upload(rows_of_batch.astype(np.int64), device)
    query_positions = _upload(response_positions, device)
    every: list[_Rows] = []
    last: list[_Rows] = []
    for b in range(len(wave.batch_offsets) - 1):
        begin, end = wave.batch_offsets[b : b + 2].tolist()
        first, stop = wave.batch_segments[b : b + 2].tolist()
        rows, responses = slice(begin, end), slice(*ends[b : b + 2].tolist())
        offsets = wave.segment_offsets[first : stop + 1] - begin
        range_offsets = _tensor(wave.range_offsets[first : stop + 1] - wave.range_offsets[first])
        key_ranges = _tensor(wave.key_ranges[wave.range_offsets[first] : wave.range_offsets[stop]])
        own = wave.num_carried + begin
        all_rows = (None, on_device[rows], _tensor(positions[rows]), _tensor(offsets))
        every.append((rows, responses, Batch(on_device[rows], own, *all_rows, range_offsets, key_ranges)))
        response_offsets = np.searchsorted(rows_of_batch[responses], offsets).astype(np.int32)
        some = (
            query_rows[responses],
            query_positions[responses],
            _tensor(response_positions[responses]),
            _tensor(response_offsets),
        )
        last.append((rows, responses, Batch(on_device[rows], own, *some, range_offsets, key_ranges)))
    return every, last


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _head(wave: Wave, model: Model, hidden: Tensor, backend: kernels.Backend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Final norm and head of the response rows [R, D]: by target of the wave its logprob, whether it is the argmax, and
    the entropy, [nnz] each; and the sum of the rows' lse and entropy."""
    offsets, token_ids = _upload(wave.target_offsets, model.device), _upload(wave.target_token_ids, model.device)
    normed = model.final_norm(hidden, backend)
    result = kernels.option_logprobs(normed, model.head(), offsets, token_ids, backend=backend)
    row = torch.repeat_interleave(offsets.diff(), output_size=len(token_ids))
    logprob = result.logits - result.lse[row]
    return logprob, result.argmax[row] == token_ids, result.entropy[row], (result.lse + result.entropy).sum()


def _check_finite(sums: Tensor, model: Model) -> None:
    """``sums``: of the hidden states after the embedding and after each layer, and of the scores."""
    broken = torch.nonzero(~torch.isfinite(sums))
    if len(broken):
        layer = int(broken[0]) - 1
        places = {-1: "the embedding", model.config.num_layers: "the final norm and head"}
        _raise_non_finite(model, layer, places.get(layer, f"layer {layer}"))


def _raise_non_finite(model: Model, layer: int, name: str) -> None:
    outside = layer < 0 or layer >= model.config.num_layers
    tensors = model.non_finite_tensors(-1 if outside else layer)
    why = f"its weights hold NaN or infinity: {', '.join(tensors)}" if tensors else "all its weights are finite"
    raise NonFiniteError(f"scores are not finite; this began in {name} (counted from 0); {why}")


def _check_memory(plan: Plan, model: Model) -> None:
    """Refuses, before the first forward pass, a wave that cannot fit the memory that is free now."""
    needed, free = cost(plan, model.config, model.dtype).wave_bytes, free_bytes(model.device)
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"a wave needs about {needed / 2**20:,.0f} MiB beyond the weights and {free / 2**20:,.0f} MiB are free; "
            f"lower --wave-tokens (the largest wave has {plan.max_wave_rows:,} rows, and carries "
            f"{plan.max_carried_rows:,}) or --batch-tokens ({plan.batch_tokens:,})"
        )


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
