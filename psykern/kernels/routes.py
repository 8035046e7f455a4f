"""Which rows go to which experts, for a mixture of experts.

Each of N rows goes to k of E experts: row n's j-th expert is its slot n * k + j. Products are of the slots sorted by
expert, so that those of one expert are rows of one matrix product; none is dropped and none is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psykern.kernels.checks import expect, expect_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Made by :meth:`of`, on the device of the rows; nothing here waits for it."""

    slots: Tensor  # [N * k] int32, sorted by expert, ascending within one
    offsets: Tensor  # [E+1] int32: expert e has slots[offsets[e]] to slots[offsets[e+1]]
    top_k: int  # experts of a row: slot s is of row s // top_k

    @classmethod
    def of(cls, experts: Tensor, num_experts: int) -> Routes:
        """``experts``: [N, k] int64, those of each row, from 0 to ``num_experts``, each once."""
        expect("experts", experts.dim() == 2 and experts.shape[1] > 0, "[N, k] with k at least 1", experts)
        expect_dtype("experts", experts, (torch.int64,))
        ordered, slots = experts.flatten().sort(stable=True)
        bounds = torch.arange(num_experts + 1, device=experts.device)
        offsets = torch.searchsorted(ordered, bounds, out_int32=True)
        return cls(slots.int(), offsets, experts.shape[1])

    @property
    def num_rows(self) -> int:
        """N, the rows that are routed."""
        return self.slots.shape[0] // self.top_k

    @property
    def num_experts(self) -> int:
        """E, of whom some may have no rows."""
        return self.offsets.shape[0] - 1
