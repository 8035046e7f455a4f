"""What a model's weights take of memory, and when copying a layer to a GPU hides behind the arithmetic.

Weights that do not fit a GPU are streamed: while a layer is computed with, the next one is copied. The copy hides where
rows * FLOPs of a row and layer / (FLOP/s) >= bytes of the layer / (bytes/s). Attention is left out, so that fewer rows
may do. Rates are those of one H100; ``benchmarks/roofline.py`` has the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from psykern.models.decoder import DecoderSpec
from psykern.models.model import RESIDENT_SHARE
from psykern.models.parts import Shapes
from psykern.models.spec import ModelSpec

GPU = "H100 80GB"
_GPU_MEMORY = 80e9  # bytes
_GPU_DTYPE = torch.bfloat16
_GPU_FLOPS = (
    704e12  # a second: products of bf16, sustained; benchmarks/results/profile_qwen3-8b_h200.csv, the same chip
)
_LINK = 0.8 * 64e9  # bytes a second: PCIe 5 x16, of which 0.8 is assumed from pinned memory, not measured


@dataclass(frozen=True, slots=True)
class GpuWeights:
    """The weights on one GPU, in bfloat16."""

    device: str
    memory_bytes: int  # of the device
    is_resident: bool  # they stay there; else they are streamed
    layer_bytes: int  # of the layer whose copy needs most rows to hide
    link_bytes: float  # copied a second
    flops: float  # a second
    rows: int  # of a wave, from which on a layer's copy hides


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """What the weights take of memory, in bytes."""

    stored_dtype: str | None  # as config.json says; None: it does not, or they are quantised
    stored_bytes: int | None
    compute_dtype: str
    compute_bytes: int
    gpu: GpuWeights | None  # None: the modules of transformers compute, whose weights are never streamed

    @classmethod
    def of(cls, spec: DecoderSpec, compute_dtype: torch.dtype, stored_dtype: torch.dtype | None) -> WeightsPlan:
        """From what a config says of the tensors' shapes; no weights are read."""
        numbers = _numbers(spec.tensors())
        return cls(
            stored_dtype=None if stored_dtype is None else _name(stored_dtype),
            stored_bytes=None if stored_dtype is None else numbers * stored_dtype.itemsize,
            compute_dtype=_name(compute_dtype),
            compute_bytes=numbers * compute_dtype.itemsize,
            gpu=_on_gpu(spec) if isinstance(spec, ModelSpec) else None,
        )


def _on_gpu(spec: ModelSpec) -> GpuWeights:
    # A mixture of experts computes with few of a layer's weights, so that FLOPs do not follow from them.
    layers = []
    for layer in spec.layers:
        flops, size = layer.flops(), _numbers(layer.tensors()) * _GPU_DTYPE.itemsize
        layers.append((math.ceil(size / _LINK * _GPU_FLOPS / (flops.per_row + flops.per_query)), size))
    rows, layer_bytes = max(layers)
    return GpuWeights(
        device=GPU,
        memory_bytes=int(_GPU_MEMORY),
        is_resident=_numbers(spec.tensors()) * _GPU_DTYPE.itemsize <= RESIDENT_SHARE * _GPU_MEMORY,
        layer_bytes=layer_bytes,
        link_bytes=_LINK,
        flops=_GPU_FLOPS,
        rows=rows,
    )


def _numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
