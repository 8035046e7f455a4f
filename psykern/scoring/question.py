"""What one call wants to know, as tokens: made of texts without the model, computed, and then answered from the scores.

The three steps are apart so that the first, in which bad input fails, is the caller's own, while the second may be
shared by callers that wait at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from psykern.core.types import NOTHING_MORE, TargetScores, TokenTree, Wanted

A = TypeVar("A")


@dataclass(frozen=True, slots=True, eq=False)
class Question(Generic[A]):
    """``answer`` is given the scores of each of ``trees``: those of its spans, then those of its branches."""

    trees: Sequence[TokenTree]
    answer: Callable[[Sequence[TargetScores]], A]
    wanted: Wanted = NOTHING_MORE
