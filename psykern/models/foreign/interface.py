"""psykern's attention as one that ``transformers`` knows by name, and what of a model's own it has to be told.

A model calls its attention layer by layer, always in the same order, with the module as the first argument. A
:class:`Link`, which hangs on every module of the model, holds what the call in hand is: there the layers count
themselves, so that nothing has to pass through a model's own arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from psykern import kernels
from psykern.core.settings import Backend
from psykern.kernels import Segments
from psykern.models.batch import LayerState
from psykern.models.foreign.spec import ForeignMixer

NAME = "psykern"  # of the attention, in transformers' registry
_LINK = "psykern_link"  # the attribute of every module
_WEIGHTS = 2**24  # of a call of the library's own attention, at most


class Call(Protocol):
    """What a model's attention is for the time of one forward."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, more: dict[str, Any]) -> Tensor:
        """q [1, Hq, n, Dh], k and v [1, Hkv, n, Dh] to [1, n, Hq, Dh]."""


@dataclass(slots=True, eq=False)
class Link:
    """From every module of one model to the call in hand."""

    call: Call | None = None

    @classmethod
    def into(cls, model: nn.Module) -> Link:
        """Hangs a new one on every module, and makes the attention known to transformers."""
        from transformers import AttentionInterface, AttentionMaskInterface  # here, because the import takes long

        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
        link = cls()
        for module in model.modules():
            setattr(module, _LINK, link)
        return link

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        self.call = call
        try:
            yield
        finally:
            self.call = None


@dataclass(frozen=True, slots=True)
class Mask:
    """Instead of an [N, N] mask: what it would be made of. ``sees``: of indices of queries and keys, which sees which;
    None: causal."""

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None


@dataclass(slots=True, eq=False)
class Shared:
    """The attention of one batch of a wave: keys and values go to the store, and the queries see their paths there."""

    states: Sequence[LayerState]  # of each layer
    mixers: Sequence[ForeignMixer]  # of each layer
    store_row: int  # first of the batch's own rows
    segments: Segments
    backend: Backend
    calls: int = field(default=0, init=False)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, more: dict[str, Any]) -> Tensor:
        layer, self.calls = self.calls, self.calls + 1
        state, own = self.states[layer], slice(self.store_row, self.store_row + k.shape[2])
        state.keys[own], state.values[own] = k[0].transpose(0, 1), v[0].transpose(0, 1)
        if self.mixers[layer].is_own:
            return self._by_paths(module, q, state, self.mixers[layer].window, more)
        out = kernels.prefix_attention(
            q[0].transpose(0, 1).to(state.keys.dtype).contiguous(),
            state.keys,
            state.values,
            self.segments,
            softmax_scale=scale_of(q, more),
            window=self.mixers[layer].window,
            backend=self.backend,
        )
        return out[None].to(q.dtype)

    def _by_paths(
        self, module: nn.Module, q: Tensor, state: LayerState, window: int | None, more: dict[str, Any]
    ) -> Tensor:
        """By the library's own function: the queries of a segment, some at a time, and the keys that they may see."""
        attention, segments = own_attention(module), self.segments
        assert attention is not None
        outs = []
        for s, (first, stop) in enumerate(pairwise(segments.query_offsets.tolist())):
            ranges = segments.key_ranges[segments.range_offsets[s] : segments.range_offsets[s + 1]].tolist()
            keys, values = (torch.cat([of[a:b] for a, b in ranges]).transpose(0, 1)[None] for of in state)
            at_once = max(1, _WEIGHTS // (keys.shape[2] * q.shape[1]))
            for begin in range(first, stop, at_once):
                own = slice(begin, min(begin + at_once, stop))
                positions = segments.positions[own].to(q.device)
                low = 0 if window is None else max(0, int(segments.positions[begin]) + 1 - window)
                end = int(segments.positions[own][-1]) + 1
                seen = torch.arange(low, end, device=q.device) <= positions[:, None]
                if window is not None:
                    seen &= torch.arange(low, end, device=q.device) > positions[:, None] - window
                hidden = torch.finfo(q.dtype).min * (~seen).to(q.dtype)
                part = q[:, :, own], keys[:, :, low:end], values[:, :, low:end]
                outs.append(attention(module, *part, hidden[None, None], **more)[0])
        return torch.cat(outs, dim=1)


def own_attention(module: nn.Module) -> Callable[..., tuple[Tensor, object]] | None:
    """The library's function for this attention, with all that it does; None: it has none by this name."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def scale_of(q: Tensor, more: dict[str, Any]) -> float:
    """What queries times keys are multiplied by."""
    scaling = more.get("scaling")
    return q.shape[-1] ** -0.5 if scaling is None else float(scaling)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
) -> tuple[Tensor, None]:
    call: Call | None = getattr(module, _LINK).call
    if call is None:  # of one token alone, which sees itself
        assert query.shape[2] == 1, "a forward of several tokens without a call"
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None
    return call.attend(module, query, key, value, attention_mask, more), None


def _mask(*_: Any, mask_function: Callable[..., Tensor] | None = None, **__: Any) -> Mask:
    return Mask(mask_function)


def window_of(mask: Mask, positions: int) -> int | None:
    """The sliding window of a mask over texts of ``positions`` tokens; None: all earlier tokens are seen. Raises
    ValueError where it is something else."""
    if mask.sees is None:
        return None
    step = [1 << i for i in range(max(positions - 1, 1).bit_length())]
    places = torch.tensor(sorted({p for s in step for p in (0, s - 1, s, s + 1, positions - 1) if p < positions}))
    zero = torch.zeros((), dtype=torch.int64)
    # the window: how many keys the last query sees, found by halving
    last = torch.tensor(positions - 1)
    low, high = 0, positions - 1  # distances: low is seen
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bool(mask.sees(zero, zero, last, last - middle)) else (low, middle - 1)
    window = low + 1
    q, k = places[:, None], places[None, :]
    seen = torch.broadcast_to(torch.as_tensor(mask.sees(zero, zero, q, k)), (len(places), len(places)))
    if not torch.equal(seen.bool(), (k <= q) & (k > q - window)):
        raise ValueError("a mask that is neither causal nor a sliding window")
    return None if window >= positions else window
