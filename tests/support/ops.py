"""Cases of each operation: the table that ``test_contract.py`` holds all backends to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import attention, logprobs
from support.backends import Place, poisoned_memory
from torch import Tensor

from psykern import kernels
from psykern.kernels.routes import Routes


@dataclass(frozen=True, slots=True)
class Case:
    """A call that answers several items at once, rows or segments, none of which may depend on the others."""

    op: str
    arguments: dict[str, Any]  # on the CPU; without ``backend`` and without arrays to write to
    items: int
    alone: Callable[[dict[str, Any], int], dict[str, Any]]  # the arguments of item i by itself
    part: Callable[[int], Sequence[Any]]  # by output, the index of what item i has of it
    spoil: tuple[str, Callable[[int], Any]]  # a number that only item i depends on: the argument, and its index
    outs: tuple[str, ...] = ("out",)  # arguments for arrays to write to, one for each output
    may_be: tuple[dict[str, str], ...] = ()  # inputs that may be given for them, all those of one entry together
    apart: tuple[str, ...] = ()  # inputs whose rows may lie apart
    tolerance: float | None = None  # of operations with a matrix product: between two ways to the same numbers
    function: Callable[..., Any] | None = None  # called for that of kernels, where that makes no arrays itself

    def run(self, place: Place, given: dict[str, Any]) -> list[Tensor]:
        """What the operation gives of arguments on the place's device; what it leaves out of new arrays is NaN.

        Skips where the reference cannot run because torch cannot: told to forget AVX-512 (``ATEN_CPU_CAPABILITY``) on a
        processor that has it, torch 2.13 still packs bf16 keys for it, and raises.
        """
        with poisoned_memory():
            try:
                result = (self.function or getattr(kernels, self.op))(**given, backend=place.backend)
            except RuntimeError as error:
                if place.backend != "reference" or "pack_vnni2" not in str(error):
                    raise
                pytest.skip(f"torch's attention: {error}")
        return [result] if isinstance(result, Tensor) else list(result)


def put(place: Place, given: dict[str, Any]) -> dict[str, Any]:
    """Copies on the place's device."""
    on_device = {}
    for name, value in given.items():
        if isinstance(value, kernels.Segments):
            value = attention.put(place, value)
        on_device[name] = map_tensors(lambda tensor: place.put(tensor)[0], value)
    return on_device


def map_tensors(f: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``f`` of each tensor in it, in tuples, lists and routes too."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Routes):
        return Routes(f(value.slots), f(value.offsets), value.top_k)
    return type(value)(map_tensors(f, item) for item in value) if type(value) in (tuple, list) else value


def tensors(value: Any) -> list[Tensor]:
    """Those in ``value``, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def with_gaps(x: Tensor) -> Tensor:
    """``x`` with NaN behind each of its rows, which are dense."""
    size = x[0].numel()
    wide = torch.full((len(x), size + 8), math.nan, dtype=x.dtype, device=x.device)
    rows = wide[:, :size].unflatten(1, (*x.shape[1:], 1))[..., 0]  # the last 1: x may be of one dimension
    return rows.copy_(x)


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Each operation in each of its forms, in ``dtype``."""
    layouts = ("trie", "carried", "no-queries")
    return {
        "linear": _linear(dtype),
        "linear-add": _linear_add(dtype),
        "swiglu": _swiglu(dtype),
        "expert_swiglu": _expert_swiglu(dtype),
        "expert_linear": _expert_linear(dtype),
        "add_weighted": _add_weighted(dtype),
        "option_logprobs": _option_logprobs(dtype),
        **{f"attention-{n}": _prefix_attention(attention.LAYOUTS[n], None, dtype) for n in layouts},
        **{f"attention-{n}-window": _prefix_attention(attention.LAYOUTS[n], 5, dtype) for n in layouts},
        "attention-many-tiles": _prefix_attention(attention.LONG["many-gaps"], None, dtype),
        "add-first": _add_rms_norm(dtype, norm_first=False, has_residual=True),
        "norm-first": _add_rms_norm(dtype, norm_first=True, has_residual=True),
        "norm-alone": _add_rms_norm(dtype, norm_first=False, has_residual=False),
        **{f"rope-norm-of-{norm}": _qk_norm_rope(dtype, norm) for norm in ("none", "head", "projection")},
        "silu_mul": _silu_mul(dtype),
        "gather_rows": _gather_rows(dtype),
    }


def _normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _rows(*names: str) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """The call of row i by itself: that row of the arguments ``names``."""
    return lambda given, i: given | {name: given[name][i : i + 1] for name in names if given[name] is not None}


# Of products whose results are below 8 in size: fp32 sums in two orders; two roundings to bf16 in two ways.
_LINEAR_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-4}


def _layer(columns: int, dtype: torch.dtype, seed: int) -> kernels.Layer:
    """Of 77 numbers; of a variance that gives results of about 1."""
    weight = _normal(columns, 77, dtype=torch.float32, seed=seed) / math.sqrt(77)
    return weight.to(dtype), _normal(columns, dtype=dtype, seed=seed + 1) / 2


def _multiply(
    x: Tensor,
    layers: Sequence[kernels.Layer],
    *,
    residual: Tensor | None = None,
    backend: kernels.Backend,
    **outs: Tensor,
) -> Sequence[Tensor]:
    """kernels.linear to arrays of its own, or to ``outs``; with a residual, that is put there first and added to."""
    arrays = list(outs.values()) or [x.new_empty(len(x), len(weight)) for weight, _ in layers]
    if residual is not None:
        arrays[0].copy_(residual)
    return kernels.linear(x, layers, arrays, add=residual is not None, backend=backend)


def _linear(dtype: torch.dtype) -> Case:
    layers = [_layer(33, dtype, 1), (_layer(16, dtype, 3)[0], None), _layer(5, dtype, 5)]
    return Case(
        "linear",
        {"x": _normal(9, 77, dtype=dtype, seed=0), "layers": layers},
        items=9,
        alone=_rows("x"),
        part=lambda i: (slice(i, i + 1),) * 3,
        spoil=("x", lambda i: (i, 76)),
        outs=("first", "second", "third"),
        apart=("x", "layers"),
        tolerance=_LINEAR_TOLERANCES[dtype],
        function=_multiply,
    )


def _linear_add(dtype: torch.dtype) -> Case:
    x, residual = _normal(9, 77, dtype=dtype, seed=0), _normal(9, 33, dtype=dtype, seed=1)
    return Case(
        "linear",
        {"x": x, "layers": [_layer(33, dtype, 2)], "residual": residual},
        items=9,
        alone=_rows("x", "residual"),
        part=lambda i: (slice(i, i + 1),),
        spoil=("x", lambda i: (i, 7)),
        may_be=({"out": "residual"},),
        apart=("x", "layers"),
        tolerance=_LINEAR_TOLERANCES[dtype],
        function=_multiply,
    )


def _swiglu(dtype: torch.dtype) -> Case:
    return Case(
        "swiglu",
        {"x": _normal(9, 77, dtype=dtype, seed=0), "gate": _layer(33, dtype, 1), "up": _layer(33, dtype, 3)},
        items=9,
        alone=_rows("x"),
        part=lambda i: (slice(i, i + 1),),
        spoil=("x", lambda i: (i, 7)),
        apart=("x", "gate", "up"),
        tolerance=_LINEAR_TOLERANCES[dtype],
    )


# Of rows to 3 of 6 experts: expert 1 has none, expert 4 has one of each row.
_EXPERTS = torch.tensor([[4, 0, 2], [5, 4, 3], [2, 3, 4], [4, 5, 0], [0, 4, 5], [3, 2, 4], [4, 0, 3]])


def _routed(i: int) -> Tensor:
    """The rows that are row i's of those sorted by expert."""
    return (Routes.of(_EXPERTS, 6).slots // 3 == i).nonzero()[:, 0]


def _route_alone(given: dict[str, Any], i: int) -> Routes:
    return Routes.of(_EXPERTS[i : i + 1].to(given["routes"].slots.device), 6)


def _experts(columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.stack([_layer(columns, dtype, seed + e)[0] for e in range(6)])


def _expert_swiglu(dtype: torch.dtype) -> Case:
    return Case(
        "expert_swiglu",
        {
            "x": _normal(7, 77, dtype=dtype, seed=0),
            "gates": _experts(33, dtype, 1),
            "ups": _experts(33, dtype, 11),
            "routes": Routes.of(_EXPERTS, 6),
        },
        items=7,
        alone=lambda given, i: given | {"x": given["x"][i : i + 1], "routes": _route_alone(given, i)},
        part=lambda i: (_routed(i),),
        spoil=("x", lambda i: (i, 7)),
        apart=("x", "gates", "ups"),
        tolerance=_LINEAR_TOLERANCES[dtype],
    )


def _expert_linear(dtype: torch.dtype) -> Case:
    return Case(
        "expert_linear",
        {
            "x": _normal(21, 77, dtype=dtype, seed=0),
            "weights": _experts(33, dtype, 1),
            "routes": Routes.of(_EXPERTS, 6),
        },
        items=7,
        alone=lambda given, i: given | {"x": given["x"][_routed(i)], "routes": _route_alone(given, i)},
        part=lambda i: (slice(3 * i, 3 * i + 3),),
        spoil=("x", lambda i: (int(_routed(i)[1]), 7)),
        apart=("x", "weights"),
        tolerance=_LINEAR_TOLERANCES[dtype],
    )


def _add_to(
    x: Tensor, weights: Tensor, total: Tensor, *, out: Tensor | None = None, backend: kernels.Backend
) -> Tensor:
    """kernels.add_weighted to an array of its own, or to ``out``, where the total is put first."""
    target = torch.empty_like(total) if out is None else out
    return kernels.add_weighted(x, weights, target.copy_(total), backend=backend)


def _add_weighted(dtype: torch.dtype) -> Case:
    return Case(
        "add_weighted",
        {
            "x": _normal(27, 35, dtype=dtype, seed=0),
            "weights": _normal(9, 3, dtype=torch.float32, seed=1),
            "total": _normal(9, 35, dtype=dtype, seed=2),
        },
        items=9,
        alone=lambda given, i: _rows("weights", "total")(given, i) | {"x": given["x"][3 * i : 3 * i + 3]},
        part=lambda i: (slice(i, i + 1),),
        spoil=("x", lambda i: (3 * i + 1, 7)),
        may_be=({"out": "total"},),
        apart=("x", "total"),
        function=_add_to,
    )


def _option_logprobs(dtype: torch.dtype) -> Case:
    hidden, weight, offsets, ids = logprobs.problem(9, 300, 33, dtype)

    def tokens(i: int) -> slice:
        return slice(int(offsets[i]), int(offsets[i + 1]))

    def alone(given: dict[str, Any], i: int) -> dict[str, Any]:
        found = given["token_ids"][tokens(i)]
        ends = torch.tensor([0, len(found)], device=found.device)
        return _rows("hidden")(given, i) | {"token_offsets": ends, "token_ids": found}

    return Case(
        "option_logprobs",
        {"hidden": hidden.to(dtype), "weight": weight, "token_offsets": offsets, "token_ids": ids},
        items=9,
        alone=alone,
        part=lambda i: (slice(i, i + 1), tokens(i), slice(i, i + 1), slice(i, i + 1)),
        spoil=("hidden", lambda i: (i, 5)),
        outs=(),
        apart=("hidden", "weight"),
        tolerance=logprobs.TOLERANCES[dtype],
    )


def _prefix_attention(layout: attention.Layout, window: int | None, dtype: torch.dtype) -> Case:
    q, k, v, segments = attention.problem(layout, dtype=dtype)
    ends = segments.query_offsets.tolist()

    def queries(i: int) -> slice:
        return slice(ends[i], ends[i + 1])

    def alone(given: dict[str, Any], i: int) -> dict[str, Any]:
        one = attention.Layout((layout.segments[i],)).kernel_segments()
        return given | {"q": given["q"][queries(i)], "segments": one}

    return Case(
        "prefix_attention",
        {"q": q, "k": k, "v": v, "segments": segments, "softmax_scale": attention.SCALE, "window": window},
        items=len(layout.segments),
        alone=alone,
        part=lambda i: (queries(i),),
        spoil=("q", lambda i: (queries(i), 1, 3)),
        may_be=({"out": "q"},),
        apart=("q", "k", "v"),
        tolerance=attention.TOLERANCES[dtype],
    )


def _add_rms_norm(dtype: torch.dtype, norm_first: bool, has_residual: bool) -> Case:
    x, residual = (_normal(9, 35, dtype=dtype, seed=seed) for seed in (0, 1))
    swaps = ({"normed": "x", "summed": "residual"}, {"normed": "residual", "summed": "x"})
    return Case(
        "add_rms_norm",
        {
            "x": x,
            "residual": residual if has_residual else None,
            "weight": _normal(35, dtype=dtype, seed=2),
            "eps": 1e-5,
            "norm_first": norm_first,
        },
        items=9,
        alone=_rows("x", "residual"),
        part=lambda i: (slice(i, i + 1), slice(i, i + 1)),
        spoil=("x", lambda i: (i, 7)),
        outs=("normed", "summed") if has_residual else ("normed",),
        may_be=swaps if has_residual else (),
        apart=("x", "residual") if has_residual else ("x",),
    )


def _qk_norm_rope(dtype: torch.dtype, norm: str) -> Case:
    sizes = {"none": 0, "head": 24, "projection": 3 * 24}
    angles = torch.arange(50)[:, None] * torch.rand(12, generator=torch.Generator().manual_seed(0))
    return Case(
        "qk_norm_rope",
        {
            "x": _normal(9, 3, 24, dtype=dtype, seed=0),
            "weight": _normal(sizes[norm], dtype=dtype, seed=1) if sizes[norm] else None,
            "cos": angles.cos(),
            "sin": angles.sin(),
            "positions": torch.tensor([49, 0, 49, 3, 4, 5, 17, 18, 2], dtype=torch.int32),
            "eps": 1e-5,
        },
        items=9,
        alone=_rows("x", "positions"),
        part=lambda i: (slice(i, i + 1),),
        spoil=("x", lambda i: (i, 1, 7)),
        may_be=({"out": "x"},),
        apart=("x",),
    )


def _silu_mul(dtype: torch.dtype) -> Case:
    return Case(
        "silu_mul",
        {"gate": 3 * _normal(9, 33, dtype=dtype, seed=0), "up": _normal(9, 33, dtype=dtype, seed=1)},
        items=9,
        alone=_rows("gate", "up"),
        part=lambda i: (slice(i, i + 1),),
        spoil=("gate", lambda i: (i, 7)),
        may_be=({"out": "gate"}, {"out": "up"}),
        apart=("gate", "up"),
    )


def _gather_rows(dtype: torch.dtype) -> Case:
    rows = torch.tensor([4, 0, 6, 1])
    return Case(
        "gather_rows",
        {"source": _normal(2, 7, 3, 4, dtype=dtype, seed=0), "rows": rows},
        items=4,
        alone=_rows("rows"),
        part=lambda i: ((slice(None), slice(i, i + 1)),),
        spoil=("source", lambda i: (slice(None), int(rows[i]), 1, 2)),
        apart=("source",),
    )
