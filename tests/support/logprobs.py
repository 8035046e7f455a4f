"""Problems for option_logprobs, and their answers in fp64."""

from __future__ import annotations

import math

import torch
from support.backends import Place, poisoned_memory
from torch import Tensor

from psykern import kernels
from psykern.kernels import OptionLogprobs

# the dtype is that of the weight, which is widened without loss, so they are equal; the reference needs a third
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


def targets(num_rows: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """CSR of 0 to 4 tokens a row: the last id first, then id 0, then a random one twice; row 3 has none."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = []
    for r in range(num_rows):
        chosen = int(torch.randint(vocabulary, (), generator=generator))
        ids.append([vocabulary - 1, 0, chosen, chosen][: (r + 2) % 5])
    offsets = torch.tensor([0, *(len(row) for row in ids)]).cumsum(0)
    return offsets, torch.tensor([i for row in ids for i in row], dtype=torch.int32)


def problem(
    num_rows: int, vocabulary: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, token_offsets, token_ids, with logits of standard deviation 3."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, size, generator=generator)
    weight = (torch.randn(vocabulary, size, generator=generator) * 3 / math.sqrt(size)).to(dtype)
    return hidden, weight, *targets(num_rows, vocabulary, seed)


def run(place: Place, *inputs: Tensor) -> OptionLogprobs:
    with poisoned_memory():
        return OptionLogprobs(*(t.cpu() for t in kernels.option_logprobs(*place.put(*inputs), backend=place.backend)))


def fp64(hidden: Tensor, weight: Tensor, offsets: Tensor, ids: Tensor) -> OptionLogprobs:
    """The definition: all logits, a log-softmax over each row, then the gather."""
    z = hidden.double() @ weight.double().T
    if z.numel() and z.shape[1] > 1:  # so that no rounding can choose another argmax
        first, second = z.topk(2, dim=-1).values.T
        assert (first - second).min() > 1e-4, "a near tie: take another seed"
    logprobs = z.log_softmax(-1)
    rows = torch.repeat_interleave(offsets.diff())
    entropy = -(logprobs.exp() * logprobs).nan_to_num().sum(-1)
    return OptionLogprobs(z.logsumexp(-1), z[rows, ids.long()], z.argmax(-1), entropy)
