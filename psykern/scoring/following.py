"""What follows a context, continuations or answer options: as a tree of tokens, and its scores text by text.

The first token of a text has no probability where no special token stands in front of it: it is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from psykern.core import csr
from psykern.core.types import TargetScores, TokenTree
from psykern.data.branches import Branches
from psykern.data.continuations import Boundary, Context, option_branches
from psykern.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Following:
    """Texts that may follow one context. Filled by :func:`following`."""

    context: Context
    texts: tuple[str, ...]  # [O]
    branches: Branches
    tree: TokenTree
    has_context: list[bool]  # [O] a token stands before the first one
    target_offsets: np.ndarray  # [O+1] int64, into the scores of the tree
    token_offsets: list[int]  # [O+1] into the tokens of all branches

    def logprobs(self, scores: TargetScores) -> np.ndarray:
        """[O] float64, nats, sum over the scored tokens of each; NaN where one of them has no probability."""
        sums = csr.reduce(np.add, scores.logprob.astype(np.float64), self.target_offsets)
        return np.where(self.has_context, sums, np.nan)

    def token_ids(self, i: int) -> list[int]:
        """The tokens that text ``i`` overlaps, without those of what stands behind it."""
        first = self.token_offsets[i] + self.branches.scored[i]
        return self.branches.token_ids[first : first + len(self.branches.chars[i])]

    def chars(self, i: int) -> np.ndarray:
        """[T, 2] int64, first and one-past-last character of each, counted from the text's begin."""
        return np.array(self.branches.chars[i], np.int64).reshape(-1, 2) - self.branches.option_char

    def flags(self, i: int, unknown: int | None) -> list[str]:
        """What is unusual about the tokens of text ``i``; ``unknown``: the tokenizer's unknown token."""
        chars, begin = self.branches.chars[i], self.branches.option_char
        straddles = bool(chars) and (chars[0][0] < begin or chars[-1][1] > begin + len(self.texts[i]))
        known = {
            "straddles": straddles,
            "no_context": not self.has_context[i],
            "unknown": unknown is not None and unknown in self.token_ids(i),
        }
        return [flag for flag, holds in known.items() if holds]


def following(
    tokenizer: Tokenizer,
    contexts: Sequence[Context],
    texts: Sequence[tuple[str, ...]],
    closings: Sequence[str],
    boundary: Boundary,
) -> list[Following]:
    """Each of ``contexts`` with what may follow it, of which there is at least one; arguments as
    :func:`.option_branches` has them."""
    placed = option_branches(tokenizer, contexts, texts, closings, boundary)
    return [_following(*of) for of in zip(contexts, texts, placed, strict=True)]


def _following(context: Context, texts: tuple[str, ...], placed: tuple[int, Branches]) -> Following:
    base, of = placed
    has_context = [base + parent + scored > 0 for parent, scored in zip(of.parents, of.scored, strict=True)]
    first = [scored if has else 1 for scored, has in zip(of.scored, has_context, strict=True)]
    counts = [max(0, length - begin) for length, begin in zip(of.lengths, first, strict=True)]
    own = [i for i, count in enumerate(counts) if count]  # a branch without a target is none
    offsets = [0, *accumulate(of.lengths)]
    tree = TokenTree(
        token_ids=context.tokens.ids,
        spans_tok=np.empty((0, 2), np.int32),
        branch_parent_tok=np.array([base + of.parents[i] for i in own], np.int32),
        branch_scored_tok=np.array([first[i] for i in own], np.int32),
        branch_offsets=np.array([0, *accumulate(of.lengths[i] for i in own)], np.int64),
        branch_token_ids=np.array(_kept(of, offsets, own), np.int32),
    )
    return Following(context, texts, of, tree, has_context, csr.offsets_of(np.array(counts, np.int64)), offsets)


def _kept(of: Branches, offsets: Sequence[int], own: Sequence[int]) -> list[int]:
    if len(own) == len(of.lengths):
        return of.token_ids
    bounds = list(pairwise(offsets))
    return [token for i in own for token in of.token_ids[slice(*bounds[i])]]
