"""What stops a run: memory that is not there, and scores that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from psykern.core.errors import BackendError, NonFiniteError, OutOfMemoryError
from psykern.engine.plan import Plan
from psykern.models.decoder import Decoder


def check_fits(plan: Plan, needed: int, free: int | None) -> None:
    """Raises OutOfMemoryError where the largest wave needs more bytes than are free; None: nobody knows."""
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"a wave needs about {needed / 2**20:,.0f} MiB beyond the weights and {free / 2**20:,.0f} MiB are free; "
            + _what_to_lower(plan)
        )


@contextmanager
def memory_errors(plan: Plan) -> Iterator[None]:
    """Allocation failures of torch and numpy as one error that names the budgets."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        # Triton, and the driver where it pins memory, say "out of memory", vendor libraries ALLOC_FAILED.
        said = str(error).lower()
        is_memory = (
            isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "alloc" in said or "out of memory" in said
        )
        if not is_memory or isinstance(error, BackendError):
            raise
        raise OutOfMemoryError(f"out of memory: {str(error).splitlines()[0]}; {_what_to_lower(plan)}") from error


def _what_to_lower(plan: Plan) -> str:
    is_larger = plan.max_wave_rows > plan.wave_tokens
    return (
        f"lower --wave-tokens (the largest wave has {plan.max_wave_rows:,} rows, and at most "
        f"{plan.max_carried_rows:,} are carried) or --batch-tokens ({plan.batch_tokens:,})"
        + ("; where a transcript is long it is computed whole, as in parts it would need more" if is_larger else "")
    )


def check_finite(sums: Tensor, model: Decoder) -> None:
    """``sums`` [1 + layers + 1]: of the hidden states after the embedding and after each layer, and of the scores.
    Raises NonFiniteError that names the first place, and the weights there that are not finite."""
    broken = torch.nonzero(~torch.isfinite(sums))
    if not len(broken):
        return
    layer, layers = int(broken[0]) - 1, model.num_layers
    place = {-1: "the embedding", layers: "the final norm and head"}.get(layer, f"layer {layer} (counted from 0)")
    tensors = model.non_finite_tensors(layer if layer < layers else -1)
    why = f"its weights hold NaN or infinity: {', '.join(tensors)}" if tensors else "all its weights are finite"
    raise NonFiniteError(f"scores are not finite; this began in {place}; {why}")
