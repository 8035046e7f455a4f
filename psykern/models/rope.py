"""Rotary embeddings: the kinds that ``config.json`` can name, the frequencies of each, and their tables.

The rule: ``rope_parameters`` (new) may stand beside ``rope_scaling`` and ``rope_theta`` (old) where all say the same.
Of those that do not, transformers 4 takes the one and transformers 5 the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psykern.models.fields import LAYER_TYPES, Fields


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary angles: position times ``inverse_frequencies``, cosines and sines times ``scale``."""

    inverse_frequencies: tuple[float, ...]  # [Dh/2]
    scale: float


def read_rope(c: Fields, layer_type: str, head_dim: int, *, by_type: bool) -> Rope:
    """The rotary embedding of the layers of one type. ``by_type``: ``rope_parameters`` has an object for each type, and
    ``rope_scaling`` is of those with full attention."""
    objects = _objects(c, layer_type, by_type)
    filled = {path: _fill(c, path, values, by_type) for path, values in objects.items()}
    for key in dict.fromkeys(["rope_type", *(key for values in filled.values() for key in values)]):
        c.agreed({f"{path}.{key}": values.get(key) for path, values in filled.items()})
    parameters = Fields(next(iter(filled.values())), c.name)
    _check(parameters)
    if by_type and not parameters.values.get("truncate", True):
        raise c.error("truncate: false is not read by transformers where each type of layer has its own rope")
    return _make_rope(parameters.get("rope_type"), parameters.number("rope_theta"), head_dim, parameters.values)


def _objects(c: Fields, layer_type: str, by_type: bool) -> dict[str, Mapping[str, Any]]:
    """What says the rope of these layers, by its path in the config: at least one, and no empty one beside another."""
    path, new, old = "rope_parameters", c.mapping("rope_parameters") or {}, c.mapping("rope_scaling") or {}
    if others := [key for key in new if (key in LAYER_TYPES) != by_type]:
        expected = f"an object each for {' and '.join(LAYER_TYPES)}" if by_type else "one rope for all layers"
        raise c.error(f"rope_parameters: expected {expected}, got {', '.join(others)}")
    if by_type:
        path, new = f"{path}.{layer_type}", Fields(new, c.name).mapping(layer_type) or {}
        old = old if layer_type == "full_attention" else {}
    found = {"rope_scaling": old, path: new}
    return {key: values for key, values in found.items() if values} or {path: new}


def _fill(c: Fields, path: str, values: Mapping[str, Any], by_type: bool) -> dict[str, Any]:
    """``values`` with what stands outside of them or is meant where it is absent."""
    if unknown := [key for key, value in values.items() if key not in _KEYS and value is not None]:
        raise c.error(f"{path}.{unknown[0]}: expected one of {', '.join(_KEYS)}, got {values[unknown[0]]!r:.80}")
    kinds = {f"{path}.{key}": values[key] for key in ("rope_type", "type") if key in values}
    if by_type and path == "rope_scaling" and "rope_type" not in values:
        # transformers 4 takes the type then, transformers 5 its default
        kinds[f"{path}.rope_type (absent, so by default)"] = "default"
    kind = c.agreed(kinds, "default")
    inside = {f"{path}.rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    if by_type and path.endswith("sliding_attention") and not inside:
        # transformers gives a rope_theta outside to full attention alone, and its default to the others
        inside = {f"{path}.rope_theta (absent, so by default)": c.defaults["rope_theta"]}
    outside = {"rope_theta": c.get("rope_theta")} if "rope_theta" in c.values else {}
    theta = c.agreed(inside | outside, c.get("rope_theta"))
    p = {**values, "rope_type": kind, "rope_theta": theta}
    p.pop("type", None)
    for factor in (p.pop("partial_rotary_factor", None), c.get("partial_rotary_factor")):
        if factor not in (None, 1):
            raise c.error(f"partial_rotary_factor: only 1.0 is supported, got {factor!r:.80}")
    original, outside_length = "original_max_position_embeddings", c.get("original_max_position_embeddings")
    if original in _ROPE_NEEDS[_known(c, p["rope_type"])]:
        if p.get(original) is None:
            p[original] = c.positive("max_position_embeddings")
        if outside_length is not None:
            if by_type:
                c.agreed({original: outside_length, f"{path}.{original}": p[original]})
            p[original] = outside_length  # the one outside goes first in transformers too
    return p


def _known(c: Fields, kind: object) -> str:
    if isinstance(kind, str) and kind in _ROPE_NEEDS:
        return kind
    reason = "; its frequencies follow the sequence's length, so that a token's key would depend on what comes after it"
    why = reason if kind in ("dynamic", "longrope") else ""
    raise c.error(f"rope_type: expected {', '.join(_ROPE_NEEDS)}, got {kind!r:.80}{why}")


def _check(parameters: Fields) -> None:
    """Raises ``CheckpointError`` for numbers that are absent or cannot be computed with."""
    kind = parameters.get("rope_type")
    if parameters.number("rope_theta") <= 1:
        raise parameters.error(f"rope_theta: expected a number above 1, got {parameters.get('rope_theta')!r}")
    for key in _ROPE_NEEDS[kind]:
        if key not in parameters.values:
            raise parameters.error(f"rope_type {kind!r} needs {key}")
        if parameters.number(key) <= 0:
            raise parameters.error(f"{key}: expected a positive number, got {parameters.get(key)!r}")
    for key in _YARN_MAY_HAVE if kind == "yarn" else ():
        if parameters.get(key) is not None and parameters.number(key) < 0:
            raise parameters.error(f"{key}: expected no negative number, got {parameters.get(key)!r}")


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
_YARN_MAY_HAVE = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
# All that may stand beside each other; transformers passes over those that the kind does not need.
_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_NEEDS["llama3"], *_YARN_MAY_HAVE)
_KEYS += ("truncate", "short_factor", "long_factor", "finetuned")


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
