"""Distributions of the next token at places of contexts, of texts or token ids: of all, of some, or the likeliest.

Tokens that are asked for by their ids are branches of one token, so that only they are gathered from the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np

from psykern.core.types import TargetScores, TokenTree, Wanted
from psykern.scoring.question import Question
from psykern.scoring.results import TopTokens
from psykern.scoring.texts import Reader, many, one_text

At = Literal["end", "all"] | Sequence[int]


def distributions_question(
    reader: Reader,
    contexts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    token_ids: Sequence[int] | None = None,
    top_k: int | None = None,
    at: At = "end",
) -> Question[Any]:
    """See :meth:`.Scorer.distributions`, whose answer this asks for."""
    if token_ids is not None and top_k is not None:
        raise ValueError("token_ids, top_k: expected one of them at most, got both")
    ids = [0] if token_ids is None else _token_ids("token_ids", token_ids, reader)  # any one: its place matters
    if top_k is not None and not (_is_whole(top_k) and 1 <= top_k <= reader.vocab_size):
        raise ValueError(f"top_k: expected 1 to {reader.vocab_size:,}, the model's vocabulary, got {top_k!r}")
    if not isinstance(at, str):
        at = many("at", at, "'end', 'all' or a list of numbers of tokens")
    texts = [contexts] if isinstance(contexts, str) else many("contexts", contexts, "a str or a list of them")
    if not texts:
        raise ValueError("contexts: expected at least one text, got none")
    names = ["contexts"] if isinstance(contexts, str) else [f"contexts[{i}]" for i in range(len(texts))]
    read = _read(reader, names, texts)
    places = [_places(name, at, len(of)) for name, of in zip(names, read, strict=True)]
    trees = [_tree(of, own, ids) for of, own in zip(read, places, strict=True)]
    for name, tree in zip(names, trees, strict=True):
        reader.check(name, tree)

    def answer(scores: Sequence[TargetScores]) -> Any:
        every = [_arrays(of, len(ids)) for of in scores]
        if at == "all":
            answers = list(map(_shaped, every))
            return answers[0] if isinstance(contexts, str) else answers
        joined = [np.stack(arrays) for arrays in zip(*every, strict=True)]  # [n, places, …] each
        joined = [array[:, 0] if at == "end" else array for array in joined]
        return _shaped([array[0] if isinstance(contexts, str) else array for array in joined])

    return Question(trees, answer, Wanted(top_k=int(top_k or 0), full=token_ids is None and top_k is None))


def _read(reader: Reader, names: Sequence[str], contexts: Sequence[Any]) -> list[np.ndarray]:
    """[T] int32 each: the tokens of texts, or of what is tokens already."""
    if isinstance(contexts[0], list | tuple | np.ndarray):
        return [np.array(_token_ids(name, of, reader), np.int32) for name, of in zip(names, contexts, strict=True)]
    texts = [one_text(name, text) for name, text in zip(names, contexts, strict=True)]
    return [context.tokens.ids for context in reader.contexts(texts)]


def _token_ids(name: str, values: Any, reader: Reader) -> list[int]:
    ids = many(name, values, "a list of token ids")
    if not ids:
        raise ValueError(f"{name}: expected at least one token id, got none")
    for k, token in enumerate(ids):
        if not _is_whole(token):
            raise TypeError(f"{name}[{k}]: expected a token id, got {token!r} ({type(token).__name__})")
        if not 0 <= token < reader.vocab_size:
            raise ValueError(f"{name}[{k}]: expected 0 to {reader.vocab_size - 1:,}, the model's tokens, got {token}")
    return list(map(int, ids))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _places(name: str, at: At, num_tokens: int) -> list[int]:
    """Numbers of tokens behind which the distributions are wanted."""
    if num_tokens == 0:
        raise ValueError(
            f"{name}: expected a text of at least one token, got one without, behind which nothing is known"
        )
    if isinstance(at, str):
        if at not in ("end", "all"):
            raise ValueError(f"at: expected 'end', 'all' or a list of numbers of tokens, got {at!r}")
        return [num_tokens] if at == "end" else list(range(1, num_tokens + 1))
    for i, place in enumerate(at):
        if not (_is_whole(place) and 1 <= place <= num_tokens):
            raise ValueError(f"at[{i}]: expected 1 to {num_tokens:,}, the tokens of {name}, got {place!r}")
    if not at:
        raise ValueError("at: expected at least one number of tokens, got none")
    return list(map(int, at))


def _tree(token_ids: np.ndarray, places: Sequence[int], ids: Sequence[int]) -> TokenTree:
    """A branch for each place and token."""
    count = len(places) * len(ids)
    return TokenTree(
        token_ids=token_ids,
        spans_tok=np.empty((0, 2), np.int32),
        branch_parent_tok=np.repeat(np.array(places, np.int32), len(ids)),
        branch_scored_tok=np.zeros(count, np.int32),
        branch_offsets=np.arange(count + 1, dtype=np.int64),
        branch_token_ids=np.tile(np.array(ids, np.int32), len(places)),
    )


def _arrays(scores: TargetScores, num_ids: int) -> list[np.ndarray]:
    """[places, …] each: what was asked for, or the ids and log-probabilities of the likeliest tokens."""
    if scores.top_ids is not None and scores.top_logprobs is not None:
        return [scores.top_ids, scores.top_logprobs]
    return [scores.logprob.reshape(-1, num_ids) if scores.full is None else scores.full]


def _shaped(arrays: Sequence[np.ndarray]) -> np.ndarray | TopTokens:
    return TopTokens(*arrays) if len(arrays) == 2 else arrays[0]
