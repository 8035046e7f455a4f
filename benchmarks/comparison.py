"""Whether what a provider gives is right: how far its scores are from those of the first provider, right by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from providers import Scored


def rms_of(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2.0)))


class Distance(NamedTuple):
    """Between two providers' scores."""

    between: Callable[[np.ndarray, np.ndarray], float]
    most: float  # that is right
    shown: str  # its format, with its unit


class Comparison:
    """With the scores of the first provider that is checked, which are right by themselves."""

    def __init__(self, study: str) -> None:
        self._study = study
        self._first: tuple[str, np.ndarray] | None = None

    def check(self, name: str, distance: Distance, scored: Scored, before: np.ndarray | None = None) -> float:
        """The distance from the first provider's scores. Raises SystemExit where it is too large, or where the bytes
        are not those of ``before``, an earlier run's."""
        if before is not None and scored.logprob.tobytes() != before.tobytes():
            raise SystemExit(f"{self._study}: {name}: two runs give different bytes: refused")
        self._first = self._first or (name, scored.logprob)
        first, expected = self._first
        difference = distance.between(scored.logprob, expected)
        if difference > distance.most:
            differs = distance.shown.format(difference)
            raise SystemExit(f"{self._study}: {name} differs from {first} by {differs}: refused")
        return difference
