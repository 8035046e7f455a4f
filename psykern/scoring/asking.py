"""What is computed of the questions of several callers: how those that wait at the same time are one.

Questions of one kind want the same of each target. Those about texts are planned together as one trie and computed from
the beginning. Those about sessions go on from the keys and values that the engine has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from psykern.core.types import TargetScores, TokenTree, Wanted
from psykern.engine.budgets import Budgets
from psykern.engine.engine import Engine
from psykern.engine.plan import plan, scores_of_each
from psykern.scoring.question import Question

Trees = Sequence[TokenTree]  # of one question


@dataclass(frozen=True)
class Whole:
    """A :class:`.Kind`: each tree from its first token on."""

    engine: Engine
    budgets: Budgets
    wanted: Wanted

    def compute(self, items: Sequence[Trees], stop: Callable[[], bool]) -> list[list[TargetScores]]:
        """The scores of each tree of each question."""
        trees = [tree for item in items for tree in item]
        planned = plan(
            trees,
            wave_tokens=self.budgets.wave_tokens,
            batch_tokens=self.budgets.batch_tokens,
            carried_price=self.budgets.carried_price,
            wanted=self.wanted,
        )
        each = scores_of_each(trees, self.engine.run(planned, stop=stop))
        return [list(islice(each, len(item))) for item in items]

    @staticmethod
    def tokens(question: Question[Any]) -> int:
        """That a question is at most."""
        return sum(len(tree.token_ids) + len(tree.branch_token_ids) for tree in question.trees)


@dataclass(frozen=True)
class Further:
    """A :class:`.Kind`: of each tree what is not known of its beginning, which is known from then on."""

    engine: Engine
    budgets: Budgets
    wanted: Wanted

    def compute(self, items: Sequence[Trees], stop: Callable[[], bool]) -> list[list[TargetScores]]:
        """The scores of each tree of each question."""
        trees = [tree for item in items for tree in item]
        each = iter(self.engine.extend(trees, self.budgets, wanted=self.wanted, stop=stop))
        return [list(islice(each, len(item))) for item in items]

    @staticmethod
    def tokens(question: Question[Any]) -> int:
        """What of a text is new is not known before its turn comes; the engine cuts what is too much for a wave."""
        return sum(1 + len(tree.branch_token_ids) for tree in question.trees)
