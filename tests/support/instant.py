"""An engine that computes nothing, for tests and benchmarks of what goes on around one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import numpy as np

from psykern.core.types import TargetScores
from psykern.engine.engine import Planned
from psykern.engine.plan import Plan

T = TypeVar("T", bound=Planned)


def zeros(plan: Plan) -> TargetScores:
    n = plan.num_targets
    return TargetScores(np.zeros(n, np.float32), np.zeros(n, np.bool_), np.zeros(n, np.float32))


class InstantEngine:
    """In place of an ``Engine``: the scores of a plan are what ``score`` says of it, at once."""

    idle_share = None

    def __init__(self, score: Callable[[Plan], TargetScores] = zeros) -> None:
        self._score = score

    def pairs(
        self, items: Iterable[T], *, stop: Callable[[], bool] = lambda: False
    ) -> Generator[tuple[T, TargetScores], None, None]:
        for item in items:
            if stop():
                return
            scores = self._score(item.plan)
            item.progress(1.0)
            yield item, scores
