"""What README says of exactness, and what it is measured against: the model of ``transformers`` in fp64.

psykern and ``transformers`` both compute in fp32 and round. ``benchmarks/exactness.py`` has what that comes to: of
40,000 tokens under small random checkpoints a root mean square of 3.7e-6 nats at most and 3.8e-5 at worst, and 2.3e-5
between budgets, where products are of other sizes. The bounds are 2.6 and 2.2 times these worst ones.

The mean error is a hundredth of the root mean square: those of tokens are independent of each other. So errors of sums
grow as the root of the number of tokens, and a sum of n is within a token's bound times that: 27 standard deviations.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from support.checkpoints import oracle_logprobs
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

TOLERANCE = 1e-4  # nats of a token, from the model in fp64
INVARIANCE = 5e-5  # nats of a token, between budgets and batch mates


def in_fp64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in fp64 but for the rotary tables, which transformers makes in fp32 for every dtype, as
    psykern does: they are part of the model. Its norms are replaced, as they would go through fp32 too."""
    wide = copy.deepcopy(model).double()
    wide.set_attn_implementation("sdpa")  # "eager" has its softmax in fp32
    for module in wide.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, of=module: rms_norm(x, x.shape[-1:], of.weight, of.variance_epsilon)
    return wide


def token_logprobs(model: PreTrainedModel, token_ids: np.ndarray) -> np.ndarray:
    """[T - 1] fp64: the log-probability of each token after the first."""
    table = oracle_logprobs(model, token_ids)
    return table[torch.arange(len(token_ids) - 1), torch.from_numpy(token_ids[1:].astype(np.int64))].numpy()


def worst_sum(errors: np.ndarray, length: int) -> float:
    """Of any ``length`` tokens that follow each other."""
    return float(np.abs(np.convolve(errors, np.ones(length), "valid")).max())
