"""The operations in plain torch, for any device: the oracle of the other backends.

Written to be read first; yet nothing here holds an array of [rows, vocabulary] or of [queries, keys] beyond a fixed
tile, and long sums run in the vendor's kernels, so that it is also a fair engine where no other backend is built.
Arguments are checked by ``psykern.kernels``, where the operations are described.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from psykern.kernels.routes import Routes
from psykern.kernels.segments import Segments

ROW_TILE = 1024  # rows of hidden
VOCABULARY_TILE = 8192  # tokens: a tile of fp32 logits is 32 MiB
QUERY_TILE = 128  # queries whose masks are written out


def linear(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], outs: Sequence[Tensor], add: bool) -> None:
    """The vendor's product, on every device."""
    for (weight, bias), out in zip(layers, outs, strict=True):
        columns = weight.to(x.dtype).T
        if add:
            torch.addmm(out, x, columns, out=out)
            if bias is not None:
                out.add_(bias)
        elif bias is None:
            torch.mm(x, columns, out=out)
        else:
            torch.addmm(bias.to(x.dtype), x, columns, out=out)


def swiglu(x: Tensor, gate: tuple[Tensor, Tensor | None], up: tuple[Tensor, Tensor | None], out: Tensor) -> None:
    factor = torch.empty_like(out)
    linear(x, (gate, up), (out, factor), add=False)
    silu_mul(out, factor, out)


def expert_swiglu(x: Tensor, gates: Sequence[Tensor], ups: Sequence[Tensor], routes: Routes, out: Tensor) -> None:
    rows = routes.slots.long() // routes.top_k
    for expert, (first, last) in enumerate(pairwise(routes.offsets.tolist())):
        if first < last:
            swiglu(x[rows[first:last]], (gates[expert], None), (ups[expert], None), out[first:last])


def expert_linear(x: Tensor, weights: Sequence[Tensor], routes: Routes, out: Tensor) -> None:
    products = torch.empty_like(out)
    for expert, (first, last) in enumerate(pairwise(routes.offsets.tolist())):
        if first < last:
            linear(x[first:last], ((weights[expert], None),), (products[first:last],), add=False)
    out[routes.slots.long()] = products


def add_weighted(x: Tensor, weights: Tensor, total: Tensor) -> None:
    rows = x.view(*weights.shape, total.shape[1])
    sums = total.float()
    for j in range(weights.shape[1]):
        sums = sums + rows[:, j].float() * weights[:, j : j + 1]
    total.copy_(sums)


def option_logprobs(
    hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, logits = hidden.shape[0], token_ids.new_empty(token_ids.shape, dtype=torch.float32)
    lse, entropy = hidden.new_empty((2, num_rows), dtype=torch.float32)
    argmax = torch.empty(num_rows, dtype=torch.int64, device=hidden.device)
    row_of_target = torch.repeat_interleave(token_offsets.diff())
    for first in range(0, num_rows, ROW_TILE):
        rows = slice(first, min(first + ROW_TILE, num_rows))
        targets = slice(int(token_offsets[rows.start]), int(token_offsets[rows.stop]))
        lse[rows], logits[targets], argmax[rows], entropy[rows] = _tile_of_rows(
            hidden[rows], weight, row_of_target[targets] - first, token_ids[targets].long()
        )
    return lse, logits, argmax, entropy


def _tile_of_rows(
    hidden: Tensor, weight: Tensor, row_of_target: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An online pass over the vocabulary. With z the logits and m their maximum so far it keeps, per row,
    total = sum exp(z - m) and moment = sum exp(z - m) (z - m); then lse = m + log total and
    entropy = log total - moment / total."""
    num_rows, vocabulary = hidden.shape[0], weight.shape[0]
    hidden = hidden.float()
    maximum = hidden.new_full((num_rows,), -torch.inf)
    total, moment = hidden.new_zeros((2, num_rows))
    argmax = torch.zeros(num_rows, dtype=torch.int64, device=hidden.device)
    logits = hidden.new_empty(token_ids.shape)
    buffer = hidden.new_empty((2, num_rows * min(VOCABULARY_TILE, vocabulary)))
    for first in range(0, vocabulary, VOCABULARY_TILE):
        tile = weight[first : first + VOCABULARY_TILE].float()
        z, weights = buffer[:, : num_rows * len(tile)].view(2, num_rows, len(tile))  # [rows, tile] each
        torch.mm(hidden, tile.T, out=z)
        inside = (token_ids >= first) & (token_ids < first + len(tile))
        logits[inside] = z[row_of_target[inside], token_ids[inside] - first]

        tile_maximum, tile_argmax = z.max(dim=1)
        argmax = torch.where(tile_maximum > maximum, tile_argmax + first, argmax)  # an earlier tile wins a tie
        new_maximum = torch.maximum(maximum, tile_maximum)
        shift = maximum - new_maximum  # -inf at first, where total and moment are still 0
        scale = shift.exp()
        moment = torch.where(total > 0, (moment + total * shift) * scale, moment)
        total = total * scale
        maximum = new_maximum
        torch.exp(z.sub_(maximum[:, None]), out=weights)
        total = total + weights.sum(dim=1)
        moment = moment + torch.bmm(weights[:, None, :], z[:, :, None]).view(num_rows)
    log_total = total.log()
    return maximum + log_total, logits, argmax, log_total - moment / total


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    softmax_scale: float,
    window: int | None,
    out: Tensor,
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))  # [Hkv, group, M, Dh], no copy
    positions, queries = segments.positions, segments.query_offsets.tolist()
    first_range, ranges = segments.range_offsets.tolist(), segments.key_ranges.tolist()
    for s in range(len(queries) - 1):
        path = ranges[first_range[s] : first_range[s + 1]]
        for first, last, is_dense in _query_tiles(positions, queries[s], queries[s + 1], window):
            tile = q[first:last].unflatten(1, (k.shape[0], group)).permute(1, 2, 0, 3)  # [Hkv, group, queries, Dh]
            o = _attend_path(tile, k, v, path, positions[first:last], is_dense, softmax_scale, window)
            out[first:last] = o.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _query_tiles(positions: Tensor, first: int, last: int, window: int | None) -> list[tuple[int, int, bool]]:
    """Runs of a segment's queries. A run without gaps needs no mask but causality, so it is one tile."""
    if first == last:
        return []
    is_dense = window is None and int(positions[last - 1] - positions[first]) == last - 1 - first
    step = last - first if is_dense else QUERY_TILE
    return [(begin, min(begin + step, last), is_dense) for begin in range(first, last, step)]


def _attend_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    path: list[list[int]],
    positions: Tensor,
    is_dense: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """One tile of queries. Keys before its first query are seen by all of it, range by range; the rest is masked."""
    first, last = int(positions[0]), int(positions[-1])
    if window is not None:
        low = max(0, first - window + 1)
        rows = [slice(*r) for r in _slice_path(path, low, last + 1)]
        keys, values = (
            torch.cat([x[:, :, r] for r in rows], dim=2) if len(rows) > 1 else x[:, :, rows[0]] for x in (k, v)
        )
        return _attend(q, keys, values, scale, _mask(positions, low, last + 1, window, q))[0]
    parts = [_attend(q, k[:, :, a:b], v[:, :, a:b], scale) for a, b in _slice_path(path, 0, first)]
    ((a, b),) = _slice_path(path, first, last + 1)
    mask = None if is_dense else _mask(positions, first, last + 1, None, q)
    parts.append(_attend(q, k[:, :, a:b], v[:, :, a:b], scale, mask, is_causal=is_dense))
    return _combine(parts)


def _slice_path(path: list[list[int]], first: int, last: int) -> list[tuple[int, int]]:
    """The rows of the keys at places first to last of the path."""
    slices, place = [], 0
    for begin, end in path:
        a, b = max(first, place), min(last, place + end - begin)
        if a < b:
            slices.append((begin + a - place, begin + b - place))
        place += end - begin
    return slices


def _mask(positions: Tensor, first: int, last: int, window: int | None, like: Tensor) -> Tensor:
    """[queries, last - first]: 0 where the key is seen, -inf elsewhere."""
    distance = positions[:, None] - torch.arange(first, last, device=positions.device)
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
        hidden.to(like.device), -torch.inf
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log of its denominator: [..., queries, Dh] and [..., queries]."""
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        o, lse = flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        return o, lse
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if is_causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    elif mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp_(), v.float()).to(q.dtype), lse


def _combine(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over disjoint sets of keys put together: each part weighs exp of its log denominator."""
    if len(parts) == 1:
        return parts[0][0]
    lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
    total = parts[0][0] * (parts[0][1] - lse).exp()[..., None].to(parts[0][0].dtype)
    for o, part in parts[1:]:
        total.addcmul_(o, (part - lse).exp()[..., None].to(o.dtype))
    return total


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    norm_first: bool,
    normed: Tensor,
    summed: Tensor | None,
) -> None:
    if residual is None or summed is None:  # one is where the other is
        normed.copy_(_rms_norm(x, weight, eps))
        return
    total = x if norm_first else x + residual
    norm = _rms_norm(total, weight, eps)
    summed.copy_(residual + norm if norm_first else total)
    normed.copy_(norm)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, in fp32."""
    wide = x.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight.float()).to(x.dtype)


def qk_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, eps: float, out: Tensor
) -> Tensor:
    if weight is None:
        normed = x
    elif weight.shape[0] == x.shape[2]:
        normed = _rms_norm(x, weight, eps)
    else:
        normed = _rms_norm(x.flatten(1), weight, eps).view(x.shape)
    cos, sin = cos[positions.long()][:, None], sin[positions.long()][:, None]  # [N, 1, Dh/2]
    low, high = normed.float().chunk(2, dim=-1)
    rotated_low, rotated_high = low * cos - high * sin, high * cos + low * sin
    half = x.shape[2] // 2
    out[..., :half], out[..., half:] = rotated_low, rotated_high
    return out


def silu_mul(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    return torch.mul(functional.silu(gate), up, out=out)


def gather_rows(source: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    return torch.index_select(source, 1, rows, out=out)
