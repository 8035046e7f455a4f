"""All logits of a few rows: what ``kernels.option_logprobs`` spares where a few tokens are wanted."""

from __future__ import annotations

from torch import Tensor

from psykern import kernels
from psykern.core.settings import Backend

_TILE = 8192  # rows of a head that are widened to fp32 together


def head_logits(rows: Tensor, weight: Tensor, out: Tensor, backend: Backend) -> None:
    """rows [r, D] times a head's weight [V, D] to ``out`` [r, V] fp32."""
    rows = rows.float()
    for begin in range(0, len(weight), _TILE):
        tile = weight[begin : begin + _TILE]
        kernels.linear(rows, ((tile, None),), (out[:, begin : begin + len(tile)],), backend=backend)


def head_logits_bytes(hidden_size: int) -> int:
    """That a widened tile takes."""
    return 4 * _TILE * hidden_size
