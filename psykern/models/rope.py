"""Rotary embeddings: the kinds that ``config.json`` can name, and the frequencies of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psykern.core.errors import CheckpointError
from psykern.models.families import Family
from psykern.models.fields import _mapping, _number


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary angles: position times ``inverse_frequencies``, cosines and sines times ``scale``."""

    inverse_frequencies: tuple[float, ...]  # [Dh/2]
    scale: float


def _rope(
    config: Mapping[str, Any], family: Family, layer_type: str, head_dim: int, max_positions: int, name: str
) -> Rope:
    """The rotary embedding of one kind of layer, from ``rope_parameters`` (new) or ``rope_theta`` and
    ``rope_scaling`` (old)."""
    new, old = (_mapping(config, key, name) for key in ("rope_parameters", "rope_scaling"))
    parameters: dict[str, Any] = {"rope_theta": config["rope_theta"]}
    if new is not None:
        parameters |= _mapping(new, layer_type, name) or new
    elif old is not None and family.scaled_rope_layers in ("all", layer_type):
        parameters |= old
    if (parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError(f"{name}: partial_rotary_factor: only 1.0 is supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_NEEDS:
        raise CheckpointError(f"{name}: rope_type: expected {', '.join(_ROPE_NEEDS)}, got {kind!r}")
    original = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    parameters["original_max_position_embeddings"] = original or max_positions
    for key in _ROPE_NEEDS[kind]:
        if key not in parameters:
            raise CheckpointError(f"{name}: rope_type {kind!r} needs {key}")
        _number(parameters, key, name)

    theta, scale = _number(parameters, "rope_theta", name), 1.0
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    frequencies = 1.0 / wavelengths
    if kind == "linear":
        frequencies = frequencies / parameters["factor"]
    elif kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, parameters)
    elif kind == "yarn":
        frequencies, scale = _yarn_frequencies(wavelengths, theta, head_dim, parameters)
    return Rope(tuple(frequencies.tolist()), scale)


# The kinds of rotary embedding, and the parameters that they cannot do without.
_ROPE_NEEDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def _llama3_frequencies(frequencies: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated (Llama 3.1)."""
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    original = p["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    stretched = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(is_between, between, stretched)


def _yarn_frequencies(wavelengths: Tensor, theta: float, head_dim: int, p: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Frequencies interpolated by a ramp over the dimensions, and the attention factor (Peng et al. 2023, arXiv
    2309.00071)."""
    factor, original = p["factor"], p["original_max_position_embeddings"]

    def attention_scale(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    scale = p.get("attention_factor")
    if scale is None and p.get("mscale") and p.get("mscale_all_dim"):
        scale = attention_scale(p["mscale"]) / attention_scale(p["mscale_all_dim"])
    elif scale is None:
        scale = attention_scale()

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return (1 / (factor * wavelengths)) * (1 - kept) + (1 / wavelengths) * kept, float(scale)
