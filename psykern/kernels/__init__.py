"""The operations that no library has as psykern needs them, each as one function with a choice of backend: five that
compute, and a gather of rows.

``reference`` is plain torch, on any device, written to be read: it is what the others are tested against. ``auto``
takes the backend that is measured fastest on the device of the inputs. A backend that is asked for by name and is not
there is an error that says how to get it. No operation changes its inputs; ``out`` arrays are written and returned.

Shapes and dtypes are always checked; values (token ids, rows, positions, offsets) where they are on the CPU, for
reading them from a device would make it wait. The index tensors of ``prefix_attention`` may stay on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from psykern.core.errors import BackendError
from psykern.core.settings import Backend

_HOW_TO_GET = {
    "triton": "it needs triton (`pip install triton`) and a CUDA device, or TRITON_INTERPRET=1 in the environment",
    "cuda": "it needs a CUDA device and psykern built from source where nvcc is found",
}

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class OptionLogprobs(NamedTuple):
    """What :func:`option_logprobs` gives, all fp32 but ``argmax``."""

    lse: Tensor  # [R] log of the sum of exp over the vocabulary, nats
    logits: Tensor  # [nnz] of the gathered tokens; their log-probability is logits - lse of their row
    argmax: Tensor  # [R] int64, the token of the largest logit, the lowest id on ties
    entropy: Tensor  # [R] of the row's distribution over the vocabulary, nats


def resolve(backend: Backend, device: torch.device) -> Backend:
    """The backend that ``backend`` means on ``device``. Raises :class:`BackendError` where there is none."""
    if backend not in get_args(Backend):
        raise BackendError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "auto":
        if device.type != "cuda":
            return "cpu" if device.type == "cpu" else "reference"
        return "triton" if _module("triton") else "reference"
    if backend == "cpu" and device.type != "cpu":
        raise BackendError(f"backend 'cpu' computes on the CPU; the inputs are on {device}")
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend in _HOW_TO_GET and (_module(backend) is None or not (device.type == "cuda" or interpreted)):
        raise BackendError(f"backend {backend!r} is not available on {device}: {_HOW_TO_GET[backend]}")
    return backend


@cache
def _module(backend: str) -> ModuleType | None:
    """The module of a backend, imported when it is first asked for; None: something that it needs is not installed."""
    try:
        return import_module(f"psykern.kernels.{backend}")
    except ImportError:
        if backend in _HOW_TO_GET:
            return None
        raise


def _op(name: str, backend: Backend, device: torch.device) -> Callable[..., Any]:
    return getattr(_module(resolve(backend, device)), name)


def option_logprobs(
    hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor, *, backend: Backend = "auto"
) -> OptionLogprobs:
    """Log-softmax over the vocabulary of ``hidden @ weight.T``, gathered, without ever holding all logits.

    hidden: [R, D]; weight: [V, D], fp32, bf16 or fp16; token_offsets: [R+1] int64 and token_ids: [nnz] int32 name the
    tokens wanted of each row (CSR, any order, duplicates allowed). Logits are fp32 from fp32 accumulators.
    Raises ``ValueError`` for shapes or dtypes that do not fit and for ids outside the vocabulary.
    """
    _expect("hidden", hidden.dim() == 2, "[R, D]", hidden)
    _expect("weight", weight.dim() == 2 and weight.shape[1] == hidden.shape[1], f"[V, {hidden.shape[-1]}]", weight)
    _expect("token_offsets", token_offsets.shape == (hidden.shape[0] + 1,), f"[{hidden.shape[0] + 1}]", token_offsets)
    _expect("token_ids", token_ids.dim() == 1, "[nnz]", token_ids)
    for name, tensor, dtypes in (
        ("hidden", hidden, _FLOATS),
        ("weight", weight, _FLOATS),
        ("token_offsets", token_offsets, (torch.int64,)),
        ("token_ids", token_ids, (torch.int32,)),
    ):
        _expect_dtype(name, tensor, dtypes)
    _expect_offsets("token_offsets", token_offsets, token_ids.shape[0])
    if token_ids.is_cpu and token_ids.numel() and (int(token_ids.min()) < 0 or int(token_ids.max()) >= weight.shape[0]):
        got = f"{int(token_ids.min())} to {int(token_ids.max())}"
        raise ValueError(f"token_ids: expected ids of the vocabulary, 0 to {weight.shape[0] - 1}, got {got}")
    op = _op("option_logprobs", backend, hidden.device)
    return OptionLogprobs(*op(hidden, weight, token_offsets, token_ids))


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    query_offsets: Tensor,
    range_offsets: Tensor,
    key_ranges: Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of queries in segments to the keys on each segment's path. Gives [N, Hq, Dh] like q.

    q: [N, Hq, Dh]; k, v: [M, Hkv, Dh] with Hq a multiple of Hkv. Segment s has the queries ``query_offsets[s:s+2]``
    ([S+1] int32) and the keys of the ranges ``range_offsets[s:s+2]`` ([S+1] int32) of ``key_ranges`` ([n, 2] int32,
    rows of k and v, half open). Concatenated, these are the path from position 0 on: the key at place j has position
    j. A query at position p ([N] int32, ascending within a segment) sees keys p - window < j <= p; the keys from the
    segment's first query on must stand in one range. Softmax in fp32. ``out`` may be q itself.
    """
    _expect("q", q.dim() == 3, "[N, Hq, Dh]", q)
    _expect("k", k.dim() == 3 and k.shape[2] == q.shape[2] and q.shape[1] % k.shape[1] == 0, "[M, Hkv, Dh] to fit q", k)
    _expect("v", v.shape == k.shape, f"{list(k.shape)} like k", v)
    _expect("positions", positions.shape == q.shape[:1], f"[{q.shape[0]}]", positions)
    _expect("range_offsets", range_offsets.shape == query_offsets.shape, f"{list(query_offsets.shape)}", range_offsets)
    _expect("key_ranges", key_ranges.dim() == 2 and key_ranges.shape[1] == 2, "[n, 2]", key_ranges)
    for name, tensor in (
        ("positions", positions),
        ("query_offsets", query_offsets),
        ("range_offsets", range_offsets),
        ("key_ranges", key_ranges),
    ):
        _expect_dtype(name, tensor, (torch.int32,))
    _expect_offsets("query_offsets", query_offsets, q.shape[0])
    _expect_offsets("range_offsets", range_offsets, key_ranges.shape[0])
    if key_ranges.is_cpu and key_ranges.numel() and (int(key_ranges.min()) < 0 or int(key_ranges.max()) > k.shape[0]):
        got = f"{int(key_ranges.min())} to {int(key_ranges.max())}"
        raise ValueError(f"key_ranges: expected rows of k, 0 to {k.shape[0]}, got {got}")
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale: expected a number above 0, got {softmax_scale}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    op = _op("prefix_attention", backend, q.device)
    return op(q, k, v, positions, query_offsets, range_offsets, key_ranges, softmax_scale, window, _like("out", out, q))


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    norm_first: bool = False,
    normed: Tensor | None = None,
    summed: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm: gives (normed, summed), both [N, D] like x, in the arrays of these names where given.

    As in Llama and Qwen: summed = x + residual, normed = norm(summed). With ``norm_first``, as in OLMo: normed =
    norm(x), summed = residual + normed. norm(s) = weight * s / sqrt(mean(s^2) + eps), in fp32. x, residual: [N, D]
    (None: nothing is added, and what is given for summed is x or, with ``norm_first``, normed itself); weight: [D].
    ``normed`` and ``summed`` may each be an input. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    _expect("x", x.dim() == 2, "[N, D]", x)
    _expect("weight", weight.shape == x.shape[1:], f"[{x.shape[-1]}]", weight)
    if residual is not None:
        _expect("residual", residual.shape == x.shape, f"{list(x.shape)} like x", residual)
    op = _op("add_rms_norm", backend, x.device)
    normed = _like("normed", normed, x)
    if residual is None:
        op(x, None, weight, eps, norm_first, normed, None)
        return normed, normed if norm_first else x
    summed = _like("summed", summed, x)
    op(x, residual, weight, eps, norm_first, normed, summed)
    return normed, summed


def qk_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """RMSNorm and rotary embedding of queries or of keys, in one pass. Gives [N, H, Dh] like x.

    x: [N, H, Dh]; weight: [Dh] to normalise each head (Qwen3), [H * Dh] to normalise the whole projection (OLMo), None
    for no norm; cos, sin: [P, Dh/2] fp32 by position; positions: [N] int32. The pair (x[i], x[i + Dh/2]) is rotated by
    the angle of its position. ``out`` may be x itself. Source: Su et al. 2021, arXiv 2104.09864.
    """
    _expect("x", x.dim() == 3 and x.shape[2] % 2 == 0, "[N, H, Dh] with even Dh", x)
    if weight is not None:
        sizes = (x.shape[2], x.shape[1] * x.shape[2])
        _expect("weight", weight.dim() == 1 and weight.shape[0] in sizes, f"[{sizes[0]}] or [{sizes[1]}]", weight)
    _expect("cos", cos.dim() == 2 and cos.shape[1] * 2 == x.shape[2], f"[P, {x.shape[2] // 2}]", cos)
    _expect("sin", sin.shape == cos.shape, f"{list(cos.shape)} like cos", sin)
    _expect("positions", positions.shape == x.shape[:1], f"[{x.shape[0]}]", positions)
    _expect_dtype("positions", positions, (torch.int32,))
    if positions.is_cpu and positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= cos.shape[0]):
        got = f"{int(positions.min())} to {int(positions.max())}"
        raise ValueError(f"positions: expected rows of cos, 0 to {cos.shape[0] - 1}, got {got}")
    op = _op("qk_norm_rope", backend, x.device)
    return op(x, weight, cos, sin, positions, eps, _like("out", out, x))


def silu_mul(gate: Tensor, up: Tensor, *, out: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up, the elementwise half of SwiGLU. gate, up: [N, F]; gives [N, F]. ``out`` may be an input.

    silu(z) = z / (1 + exp(-z)). Source: Shazeer 2020, arXiv 2002.05202.
    """
    _expect("gate", gate.dim() == 2, "[N, F]", gate)
    _expect("up", up.shape == gate.shape, f"{list(gate.shape)} like gate", up)
    return _op("silu_mul", backend, gate.device)(gate, up, _like("out", out, gate))


def gather_rows(source: Tensor, rows: Tensor, *, out: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Rows of each batch, ``source[:, rows]``: what a wave hands to the next.

    source: [B, M, ...] of any dtype; rows: [n] int64; gives [B, n, ...], in ``out`` where given, which is no part of
    source. Only ``cuda`` has a kernel of its own; all others take torch's ``index_select``.
    """
    _expect("source", source.dim() >= 2, "[B, M, ..]", source)
    _expect("rows", rows.dim() == 1, "[n]", rows)
    _expect_dtype("rows", rows, (torch.int64,))
    if rows.is_cpu and rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= source.shape[1]):
        got = f"{int(rows.min())} to {int(rows.max())}"
        raise ValueError(f"rows: expected rows of source, 0 to {source.shape[1] - 1}, got {got}")
    shape = (source.shape[0], rows.shape[0], *source.shape[2:])
    target = source.new_empty(shape) if out is None else out
    _expect("out", target.shape == shape, f"{list(shape)}", target)
    if target.dtype != source.dtype or target.device != source.device:
        raise ValueError(f"out: expected {source.dtype} on {source.device}, got {target.dtype} on {target.device}")
    return _op("gather_rows", backend, source.device)(source, rows, target)


def _expect(name: str, holds: bool, expected: str, got: Tensor) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {list(got.shape)}")


def _expect_dtype(name: str, got: Tensor, expected: tuple[torch.dtype, ...]) -> None:
    if got.dtype not in expected:
        raise ValueError(f"{name}: expected {' or '.join(map(str, expected))}, got {got.dtype}")


def _expect_offsets(name: str, offsets: Tensor, end: int) -> None:
    """CSR offsets of ``end`` values in all."""
    if not offsets.is_cpu:
        return
    ends = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (0, -1)
    if ends != (0, end) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name}: expected to ascend from 0 to {end}, got {offsets.tolist()!s:.80}")


def _like(name: str, out: Tensor | None, like: Tensor) -> Tensor:
    """``out`` checked against ``like``, or a new array like it."""
    if out is None:
        return torch.empty_like(like)
    _expect(name, out.shape == like.shape, f"{list(like.shape)}", out)
    if out.dtype != like.dtype or out.device != like.device:
        raise ValueError(f"{name}: expected {like.dtype} on {like.device}, got {out.dtype} on {out.device}")
    return out
