"""Rotary embeddings: the kinds that ``config.json`` can name, the frequencies of each, and their tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psykern.models.fields import Fields


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary angles: position times ``inverse_frequencies``, cosines and sines times ``scale``."""

    inverse_frequencies: tuple[float, ...]  # [Dh/2]
    scale: float


def read_rope(c: Fields, layer_type: str, head_dim: int, is_scaled: bool) -> Rope:
    """The rotary embedding of one kind of layer, from ``rope_parameters`` (new) or ``rope_theta`` and
    ``rope_scaling`` (old). ``is_scaled``: the old style's scaling applies to these layers."""
    new, old = c.mapping("rope_parameters"), c.mapping("rope_scaling")
    found: dict[str, Any] = {"rope_theta": c.get("rope_theta")}
    if new is not None:
        found |= Fields(new, c.name).mapping(layer_type) or new
    elif old is not None and is_scaled:
        found |= old
    if (found.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0) != 1.0:
        raise c.error("partial_rotary_factor: only 1.0 is supported")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in _ROPE_NEEDS:
        raise c.error(f"rope_type: expected {', '.join(_ROPE_NEEDS)}, got {kind!r}")
    original = c.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    found["original_max_position_embeddings"] = original or c.positive("max_position_embeddings")
    parameters = Fields(found, c.name)
    for key in _ROPE_NEEDS[kind]:
        if key not in found:
            raise c.error(f"rope_type {kind!r} needs {key}")
        parameters.number(key)
    return _make_rope(kind, parameters.number("rope_theta"), head_dim, found)


def _make_rope(kind: str, theta: float, head_dim: int, parameters: Mapping[str, Any]) -> Rope:
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    frequencies, scale = 1.0 / wavelengths, 1.0
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


class RotaryTables:
    """Cosines and sines by position, kept for each rope and made longer when more positions are asked for."""

    def __init__(self, device: torch.device, max_positions: int) -> None:
        self._device = device
        self._max_positions = max_positions
        self._tables: dict[Rope, tuple[Tensor, Tensor]] = {}

    def of(self, rope: Rope, num_positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin [P, Dh/2] fp32, P at least ``num_positions``."""
        tables = self._tables.get(rope)
        if tables is None or len(tables[0]) < num_positions:
            # Twice as many as before: each time the host waits for the device.
            rows = max(num_positions, min(self._max_positions, 1 << (num_positions - 1).bit_length()))
            frequencies = torch.tensor(rope.inverse_frequencies, device=self._device)
            angles = torch.arange(rows, device=self._device)[:, None].float() * frequencies
            tables = self._tables[rope] = (angles.cos() * rope.scale, angles.sin() * rope.scale)
        return tables
