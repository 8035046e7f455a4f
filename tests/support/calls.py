"""A small valid call of each operation."""

from __future__ import annotations

from typing import Any

import torch
from support.backends import REFERENCE, Place
from support.ops import map_tensors

from psykern import kernels
from psykern.kernels.routes import Routes

OPS = (
    "linear",
    "swiglu",
    "expert_swiglu",
    "expert_linear",
    "add_weighted",
    "option_logprobs",
    "prefix_attention",
    "add_rms_norm",
    "qk_norm_rope",
    "silu_mul",
    "gather_rows",
)


def arguments(op: str, place: Place = REFERENCE) -> dict[str, Any]:
    """A valid call of each operation, but for ``backend``: 3 rows, V = 5, D = 4; 2 heads of 8 on 1; P = 6; 2 of 3
    experts."""
    ids = torch.tensor([0, 4, 2], dtype=torch.int32)
    positions = torch.arange(3, dtype=torch.int32)
    layer = torch.ones(5, 4), torch.ones(5)
    calls: dict[str, dict[str, Any]] = {
        "linear": {"x": torch.ones(3, 4), "layers": [layer], "outs": [torch.ones(3, 5)]},
        "swiglu": {"x": torch.ones(3, 4), "gate": layer, "up": layer},
        "expert_swiglu": {
            "x": torch.ones(3, 4),
            "gates": torch.ones(3, 5, 4),
            "ups": torch.ones(3, 5, 4),
            "routes": Routes.of(torch.tensor([[0, 2], [2, 1], [0, 1]]), 3),
        },
        "expert_linear": {
            "x": torch.ones(6, 4),
            "weights": torch.ones(3, 5, 4),
            "routes": Routes.of(torch.tensor([[0, 2], [2, 1], [0, 1]]), 3),
        },
        "add_weighted": {"x": torch.ones(6, 4), "weights": torch.ones(3, 2), "total": torch.ones(3, 4)},
        "option_logprobs": {
            "hidden": torch.ones(3, 4),
            "weight": torch.ones(5, 4),
            "token_offsets": torch.tensor([0, 1, 1, 3]),
            "token_ids": ids,
        },
        "prefix_attention": {
            "q": torch.ones(3, 2, 8),
            "k": torch.ones(7, 1, 8),
            "v": torch.ones(7, 1, 8),
            "segments": segments(place),
            "softmax_scale": 0.5,
        },
        "add_rms_norm": {
            "x": torch.ones(3, 4),
            "residual": torch.ones(3, 4),
            "weight": torch.ones(4),
            "eps": 1e-5,
        },
        "qk_norm_rope": {
            "x": torch.ones(3, 2, 8),
            "weight": torch.ones(8),
            "cos": torch.ones(6, 4),
            "sin": torch.zeros(6, 4),
            "positions": positions,
            "eps": 1e-5,
        },
        "silu_mul": {"gate": torch.ones(3, 4), "up": torch.ones(3, 4)},
        "gather_rows": {"source": torch.ones(2, 5, 4), "rows": torch.tensor([4, 0, 4])},
    }
    return {n: map_tensors(lambda t: t.to(place.device), a) for n, a in calls[op].items()}


def segments(place: Place = REFERENCE, **changed: torch.Tensor) -> kernels.Segments:
    """One segment of 3 queries on 3 keys."""
    arrays = {
        "positions": torch.arange(3, dtype=torch.int32),
        "query_offsets": torch.tensor([0, 3], dtype=torch.int32),
        "range_offsets": torch.tensor([0, 1], dtype=torch.int32),
        "key_ranges": torch.tensor([[0, 3]], dtype=torch.int32),
    }
    return kernels.Segments(**{name: array.to(place.device) for name, array in (arrays | changed).items()})


def call(op: str, backend: kernels.Backend = "auto", place: Place = REFERENCE, **changed: Any) -> Any:
    return getattr(kernels, op)(**(arguments(op, place) | changed), backend=backend)
