"""How many rows are computed together, and what a plan costs: arithmetic and memory, as a model's parts say it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from psykern.core.settings import Settings
from psykern.engine.plan import Plan
from psykern.engine.readout import readout_bytes
from psykern.models.decoder import DecoderSpec
from psykern.models.slots import free_bytes


@dataclass(frozen=True, slots=True)
class Budgets:
    """Rows that are computed together."""

    wave_tokens: int  # a layer's weights are read once for these, and for more where that needs less memory
    batch_tokens: int  # what one product of a layer takes
    carried_price: float = 0.0  # rows of a wave that need the memory of one that is carried; 0: no wave is larger

    def under(self, settings: Settings) -> Budgets:
        """What ``settings`` say; these where they say nothing."""
        wave, batch = settings.wave_tokens or self.wave_tokens, settings.batch_tokens or self.batch_tokens
        return replace(self, wave_tokens=wave, batch_tokens=batch)


# A product with a wide weight is 8 % faster with 2,048 rows than with 1,024 (benchmarks/results).
CPU_BUDGETS = Budgets(wave_tokens=32_768, batch_tokens=2048)

# Where rows are spread over experts: so many that a product of one of them has rows enough, within memory.
_EXPERT_ROWS, _MOST_CPU_BATCH = 512, 8192

_CPU_STORE = 2**31  # bytes of keys and values that a wave may hold
_MOST_WITHOUT_STORE = 2**17  # rows of a wave that holds no keys and values
_PRICE_WITHOUT_STORE = 8.0

_DEVICE_BATCH = 16_384  # rows: a launch costs the host more than the smallest model's product of fewer
_DEVICE_WAVE = (16_384, 131_072)  # rows at least, where memory is short, and at most
# Rows whose memory is left for those beyond the budget and for what is carried: 59,000 in the worst of the 15 studies.
_BEYOND = 65_536
_WAVE_SHARE = 0.6  # of a device's free memory; the rest is for fragments and for what others take

_HEAD_TILES = 3 * 32 * 2**20  # bytes that option_logprobs holds in the reference backend


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan costs under a model: floating-point operations (a multiply-add counts two) and memory in bytes."""

    flops_body: int  # linear layers
    flops_attention: int  # queries times keys, and weights times values
    flops_head: int  # the vocabulary's logits
    wave_bytes: int  # the largest wave's hidden states, store, carried keys and values, and a batch's arrays, at most


def cost(plan: Plan, spec: DecoderSpec, dtype: torch.dtype) -> Cost:
    """The arithmetic and memory of running ``plan``; weights are not counted."""
    flops = [layer.flops() for layer in spec.layers]
    # The last layer computes an output of the response rows alone.
    body = plan.num_computed * sum(layer.per_row for layer in flops)
    body += plan.num_computed * sum(layer.per_query for layer in flops[:-1])
    body += plan.num_response_rows * flops[-1].per_query
    windows = [layer.mixer.window for layer in spec.layers]
    visible = {window: plan.visible_keys(window) for window in set(windows[:-1])}
    keys = [*(visible[window] for window in windows[:-1]), plan.visible_keys_of_responses(windows[-1])]
    return Cost(
        flops_body=body,
        flops_attention=sum(layer.per_visible_key * seen for layer, seen in zip(flops, keys, strict=True)),
        flops_head=2 * plan.num_response_rows * spec.hidden_size * spec.vocab_size,
        wave_bytes=_wave_numbers(plan, spec) * dtype.itemsize + _HEAD_TILES + readout_bytes(plan.wanted, spec),
    )


def _wave_numbers(plan: Plan, spec: DecoderSpec) -> int:
    """Numbers that the largest wave holds."""
    rows, carried = plan.wave_rows, plan.carried_rows
    hidden = (rows + 2 * plan.response_rows) * spec.hidden_size
    store = (rows + carried) * spec.wave_numbers
    kept = (carried + np.append(carried[1:], 0)) * _carried_numbers(spec)  # from the last wave, and to the next
    batch = np.minimum(rows, plan.batch_tokens) * _batch_numbers(spec)
    return int((hidden + store + kept + batch).max(initial=0))


def _carried_price(spec: DecoderSpec) -> float:
    """A carried row is kept in all layers, twice while a wave hands it on; one of a wave is there for one layer. Free
    memory needs no say in it: where a longer wave does not fit, what it spares the next to carry would do so less."""
    if not spec.wave_numbers:  # what is carried is computed again
        return _PRICE_WITHOUT_STORE
    carried = 2 * _carried_numbers(spec) + spec.wave_numbers
    return carried / (spec.hidden_size + spec.wave_numbers)


def budgets(spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> Budgets:
    """Budgets that fit ``device`` as it is now: on a device with memory of its own, waves as large as that allows when
    a long transcript makes one larger."""
    if device.type == "cpu":
        batch = _cpu_batch(spec)
        wave = _cpu_wave(spec, dtype, batch)
        return Budgets(wave, batch, _carried_price(spec))
    free = _WAVE_SHARE * (free_bytes(device) or 0) - _HEAD_TILES
    row = 2 * spec.hidden_size + spec.wave_numbers
    rows = int((free / dtype.itemsize - _DEVICE_BATCH * _batch_numbers(spec)) // row) - _BEYOND
    least, most = _DEVICE_WAVE
    rows = max(least, min(rows - rows % _DEVICE_BATCH, most))
    return Budgets(rows, min(_DEVICE_BATCH, rows), _carried_price(spec))


def _cpu_wave(spec: DecoderSpec, dtype: torch.dtype, batch_tokens: int) -> int:
    """Fewer rows where those of all layers are held at a time."""
    if not spec.wave_numbers:
        return _MOST_WITHOUT_STORE
    rows = _CPU_STORE // (spec.wave_numbers * dtype.itemsize)
    return max(batch_tokens, min(CPU_BUDGETS.wave_tokens, rows - rows % batch_tokens))


def _cpu_batch(spec: DecoderSpec) -> int:
    spread = max(layer.spread for layer in spec.layers)
    return max(CPU_BUDGETS.batch_tokens, min(int(_EXPERT_ROWS * spread), _MOST_CPU_BATCH))


def _carried_numbers(spec: DecoderSpec) -> int:
    """Keys and values of a row in all layers."""
    return sum(2 * layer.mixer.kv_size for layer in spec.layers)


def _batch_numbers(spec: DecoderSpec) -> int:
    """What a row of a batch needs between a layer's operations, at most."""
    return max(layer.most_memory for layer in spec.layers)
