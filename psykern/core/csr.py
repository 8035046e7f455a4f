"""Ragged arrays as CSR: the values of all lists end to end, and offsets one longer than the number of lists.

lists [[a, b], [], [c]]      values [a, b, c]      counts [2, 0, 1]      offsets [0, 2, 2, 3]
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import DTypeLike


def concatenate(arrays: Iterable[np.ndarray], dtype: DTypeLike) -> np.ndarray:
    """The arrays end to end, in ``dtype``; [0] where there is none."""
    every = list(arrays)
    return np.concatenate(every).astype(dtype, copy=False) if every else np.empty(0, dtype)


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """[n + 1] int64: where each list begins, and where the last one ends."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))


def places(counts: np.ndarray) -> np.ndarray:
    """0, 1, … within each list: counts [2, 0, 3] give [0, 1, 0, 1, 2], int64."""
    return _from(np.zeros(len(counts), np.int64), counts)


def members(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every member of the spans [start, end), in order: the span that it is of, and itself."""
    counts = (ends - starts).astype(np.int64)
    return np.repeat(np.arange(len(counts)), counts), _from(starts, counts)


def take(values: np.ndarray, offsets: np.ndarray, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lists of numbers ``lists``, in that order, as values and offsets."""
    counts = np.diff(offsets)[lists]
    return values[_from(offsets[:-1][lists], counts)], offsets_of(counts)


def _from(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, … of each list, int64; few temporaries, because a study has 10^8 options."""
    offsets = offsets_of(counts)
    counted = np.arange(offsets[-1])
    counted += np.repeat(starts - offsets[:-1], counts)
    return counted


def reduce(ufunc: np.ufunc, values: np.ndarray, offsets: np.ndarray, dtype: DTypeLike | None = None) -> np.ndarray:
    """``ufunc`` over each list, [n] in the dtype of ``values`` or in ``dtype``; 0 where a list is empty."""
    reduced = np.zeros(len(offsets) - 1, dtype=values.dtype if dtype is None else dtype)
    filled = np.diff(offsets) > 0  # reduceat gives an empty list its neighbour's value: only the others are asked for
    if filled.any():
        reduced[filled] = ufunc.reduceat(values[: offsets[-1]], offsets[:-1][filled], dtype=dtype)
    return reduced
