"""What a layer is given beside its weights: the rows of a batch, the store of keys and values, and room to work in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from psykern.kernels import Segments


class LayerState(NamedTuple):
    """The key/value store of one layer: earlier rows are read, a batch's own are written."""

    keys: Tensor  # [M, Hkv, Dh]
    values: Tensor  # [M, Hkv, Dh]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """The n rows of one batch, of which m need an output. Positions and rows are on the model's device; what describes
    the segments stays on the CPU, where a kernel's tiles are planned from it."""

    positions: Tensor  # [n] int32
    store_row: int  # first of the n rows of the key/value store that are this batch's own
    query_rows: Tensor | None  # [m] int64, rows of the batch that need an output; None: all
    query_positions: Tensor  # [m] int32
    segments: Segments  # of the m queries

    @classmethod
    def of_all(cls, positions: Tensor, store_row: int, segments: Segments) -> Batch:
        """One of which every row is a query."""
        return cls(
            positions=positions, store_row=store_row, query_rows=None, query_positions=positions, segments=segments
        )

    def pick(self, x: Tensor, out: Tensor) -> Tensor:
        """The rows of x [n, D] that need an output, written to ``out`` [m, D]; x itself where all do."""
        return x if self.query_rows is None else torch.index_select(x, 0, self.query_rows, out=out)


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """The arrays between a layer's operations. ``Model.scratch`` makes them once for all batches of a run; a batch
    takes what it needs."""

    normed: Tensor  # [n, D] what a part takes, and what it gives
    mixer: Tensor  # [n * numbers] of the largest mixer
    ffn: Tensor  # [n * numbers] of the largest feed-forward part

    @property
    def rows(self) -> int:
        """That a batch may have."""
        return len(self.normed)
