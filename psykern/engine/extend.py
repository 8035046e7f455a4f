"""Token trees computed on top of pages: of what a tree begins with, what is held is not computed again, and what is not
is held from then on.

All trees of a call that fit go in one wave; what is too large for one is cut: a long beginning is computed first, in
waves of its own, and many branches are several waves. A tree that pages cannot hold is computed as any plan. So the
memory of pages decides how long an answer takes, and never what it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from psykern.core.types import Targeted, TargetScores, TokenTree, Wanted
from psykern.engine.budgets import Budgets
from psykern.engine.pages import Pages
from psykern.engine.plan import Past, Pasts, Plan, joined, most_past, plan, scores_of_each
from psykern.engine.store import Store


@dataclass(frozen=True, slots=True, eq=False)
class Extension:
    """Trees that wait to be computed together."""

    pages: Pages
    run: Callable[[Plan, Store | None], TargetScores]  # a store of its own: None
    budgets: Budgets
    wanted: Wanted
    _waiting: deque[Targeted] = field(init=False, default_factory=deque)

    def of(self, trees: Sequence[Targeted]) -> list[TargetScores]:
        """The scores of each of ``trees``."""
        parts = [list(_parts(tree, self.pages.landing_rows // 2)) for tree in trees]
        self._waiting.extend(part for of in parts for part in of)
        done: list[TargetScores] = []
        while self._waiting:
            done += self._next()
        scores = iter(done)
        return [joined([next(scores) for _ in of]) for of in parts]

    def _next(self) -> list[TargetScores]:
        """One wave: of as many trees as fit, which wait no longer, or else of the beginning of the first."""
        tree, trees, pasts = self.pages.tree, list[Targeted](), list[Past]()
        tree.tick()
        room = self.pages.landing_rows
        while self._waiting:
            first = self._waiting[0]
            past = tree.match(first.token_ids[: most_past(first)])
            room -= len(first.token_ids) - past.length + len(first.branch_token_ids)
            if room < 0 or not tree.make_room(len(first.token_ids) - past.length):
                return self._compute(trees, pasts) if trees else self._begin(first, past, is_too_long=room < 0)
            trees.append(self._waiting.popleft())
            pasts.append(past)
        return self._compute(trees, pasts)

    def _begin(self, first: Targeted, past: Past, *, is_too_long: bool) -> list[TargetScores]:
        """Of the first tree, which does not fit even alone: it has too many new rows, or finds too few pages."""
        tree, begins = self.pages.tree, most_past(first)
        can_be_held = tree.pages_of(len(first.token_ids)) < tree.num_pages  # one is for what others left in the last
        can_be_cut = not is_too_long or past.length < begins
        if not (can_be_held and can_be_cut):
            self._waiting.popleft()
            return [self.run(self._plan([first], None), None)]
        beginning = first.token_ids[: min(begins, past.length + self.pages.landing_rows)]
        if is_too_long and tree.make_room(len(beginning) - past.length):
            self._compute([TokenTree.bare(beginning)], [past])
        else:  # its own path takes a few rows each of many pages: in pages of its own it will fit
            tree.clear()
        return []

    def _compute(self, trees: Sequence[Targeted], pasts: Sequence[Past]) -> list[TargetScores]:
        planned = self._plan(trees, Pasts(pasts, self.pages.num_rows))
        assert planned.num_waves <= 1, "pages carry nothing from wave to wave"
        scores = self.run(planned, self.pages)
        sequences = [of.token_ids for of in trees]
        new = [len(ids) - past.length for ids, past in zip(sequences, pasts, strict=True)]
        self.pages.keep(sequences, [planned.rows_of(i, count) for i, count in enumerate(new)])
        return list(scores_of_each(trees, scores))

    def _plan(self, trees: Sequence[Targeted], pasts: Pasts | None) -> Plan:
        return plan(
            trees,
            wave_tokens=self.pages.landing_rows,
            batch_tokens=self.budgets.batch_tokens,
            carried_price=self.budgets.carried_price,
            wanted=self.wanted,
            pasts=pasts,
        )


def without_pages(
    trees: Sequence[Targeted], run: Callable[[Plan], TargetScores], budgets: Budgets, wanted: Wanted
) -> list[TargetScores]:
    """The scores of each of ``trees``, computed as any plan: of a model that keeps nothing."""
    planned = plan(
        trees,
        wave_tokens=budgets.wave_tokens,
        batch_tokens=budgets.batch_tokens,
        carried_price=budgets.carried_price,
        wanted=wanted,
    )
    return list(scores_of_each(trees, run(planned)))


def _parts(tree: Targeted, most: int) -> Iterator[Targeted]:
    """The tree with its branches in parts of at most ``most`` tokens; a longer branch is one alone."""
    offsets = tree.branch_offsets
    whole = replace(TokenTree.bare(tree.token_ids), spans_tok=tree.spans_tok)
    if offsets[-1] <= most:
        yield tree
        return
    begin = 0
    while begin < len(offsets) - 1:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + most, side="right")) - 1)
        yield replace(
            whole,
            branch_parent_tok=tree.branch_parent_tok[begin:end],
            branch_scored_tok=tree.branch_scored_tok[begin:end],
            branch_offsets=offsets[begin : end + 1] - offsets[begin],
            branch_token_ids=tree.branch_token_ids[offsets[begin] : offsets[end]],
        )
        whole = TokenTree.bare(tree.token_ids)  # its spans are in the first part
        begin = end
