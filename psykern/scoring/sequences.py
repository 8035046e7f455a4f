"""Log-probabilities of sequences of token ids, which are taken as they are: for tools that tokenize for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from psykern.core.types import TargetScores, TokenTree, Wanted
from psykern.scoring.question import Question
from psykern.scoring.results import TokenLogprobs
from psykern.scoring.texts import Reader, many


def sequences_question(
    reader: Reader,
    sequences: Sequence[int] | Sequence[Sequence[int]],
    starts: int | Sequence[int] = 1,
    *,
    ranks: bool = False,
    mass: Sequence[int] | None = None,
) -> Question[Any]:
    """See :meth:`.Scorer.token_logprobs`, whose answer this asks for."""
    every = many("sequences", sequences, "a list of token ids, or a list of such lists")
    is_one = getattr(sequences, "ndim", 0) == 1 or (bool(every) and isinstance(every[0], Integral))
    names = ["sequences"] if is_one else [f"sequences[{i}]" for i in range(len(every))]
    ids = [_ids(name, of, reader.vocab_size) for name, of in zip(names, [sequences] if is_one else every, strict=True)]
    firsts = _starts(starts, names, ids)
    trees = [_tree(of, first) for of, first in zip(ids, firsts, strict=True)]
    for name, of in zip(names, ids, strict=True):
        if len(of) - 1 > reader.max_positions:
            raise ValueError(
                f"{name}: {len(of):,} tokens, of which all but the last are read; the model reads "
                f"{reader.max_positions:,}; shorten it"
            )
    of_mass = () if mass is None else tuple(dict.fromkeys(_ids("mass", mass, reader.vocab_size).tolist()))
    if mass is not None and not of_mass:
        raise ValueError("mass: expected at least one token id, got none")

    def answer(scores: Sequence[TargetScores]) -> Any:
        answers = [_logprobs(of[first:], own) for of, first, own in zip(ids, firsts, scores, strict=True)]
        return answers[0] if is_one else answers

    return Question(trees, answer, Wanted(rank=ranks, mass=of_mass))


def _ids(name: str, values: Any, vocab_size: int) -> np.ndarray:
    """[T] int32. Raises TypeError for what are no whole numbers, ValueError for those that are no tokens."""
    array = np.asarray(values if hasattr(values, "__array__") else many(name, values, "a list of token ids"))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name}: expected a list of token ids, got one of {array.dtype} {list(array.shape)}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
        wrong = int(array[(array < 0) | (array >= vocab_size)][0])
        raise ValueError(f"{name}: expected 0 to {vocab_size - 1:,}, the model's tokens, got {wrong:,}")
    return np.ascontiguousarray(array, np.int32)


def _starts(starts: Any, names: Sequence[str], ids: Sequence[np.ndarray]) -> list[int]:
    """The first scored token of each sequence."""
    if isinstance(starts, Integral):
        firsts: list[Any] = [starts] * len(ids)
    else:
        firsts = many("starts", starts, "a whole number, or one for each sequence")
        if len(firsts) != len(ids):
            raise ValueError(f"starts: expected {len(ids)}, one for each sequence, got {len(firsts)}")
    for name, of, first in zip(names, ids, firsts, strict=True):
        if not isinstance(first, Integral) or isinstance(first, bool):
            raise TypeError(f"starts: expected whole numbers, got {first!r} ({type(first).__name__})")
        if not 1 <= int(first) <= max(1, len(of)):
            raise ValueError(
                f"starts: expected 1 to {max(1, len(of)):,} for {name}, which has {len(of):,} tokens, got {first}; the "
                "first token of all has no probability"
            )
    return list(map(int, firsts))


def _tree(ids: np.ndarray, first: int) -> TokenTree:
    bare = TokenTree.bare(ids)
    if first >= len(ids):
        return bare
    return TokenTree(
        token_ids=ids,
        spans_tok=np.array([[first, len(ids)]], np.int32),
        branch_parent_tok=bare.branch_parent_tok,
        branch_scored_tok=bare.branch_scored_tok,
        branch_offsets=bare.branch_offsets,
        branch_token_ids=bare.branch_token_ids,
    )


def _logprobs(ids: np.ndarray, scores: TargetScores) -> TokenLogprobs:
    return TokenLogprobs(
        ids=ids,
        logprob=scores.logprob,
        is_greedy=scores.is_argmax,
        entropy=scores.entropy,
        rank=scores.rank,
        mass=scores.mass,
    )
