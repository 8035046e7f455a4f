"""Surprisal of texts by token and by word: -log P of a token given all before it, and the sum over a word's tokens.

A word is a run of characters other than white space. A token counts to the word in which its last such character
stands, one of white space alone to the word behind it, and behind the last word to none. So a word whose characters
stand in a token that ends in a later word has no token, and no surprisal.

The correction for trailing white space (Pimentel and Meister 2024, "How to Compute the Probability of a Word"; Oh and
Schuler 2024, "Leading Whitespaces of Language Models' Subword Vocabulary Pose a Confound for Calculating Word
Probabilities"). Where the space in front of a word is part of its first token, the sum over a word's tokens is
-log P(a space, then characters that begin so): it holds the end of the word before, and not its own. With
B(c) = P(the next token begins with white space, or is a special token such as the end of the text | c)

    s'(w) = s(w) + log B(text before w) - log B(text up to the end of w)

where the first correction is made of words whose first token is one that B counts, also where its white space stands in
``start`` or is the tokenizer's own, in front of a text; the second of words with which their last token ends. The
probabilities of all words that may follow a context then sum to 1 at most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from psykern.core.types import TargetScores, TokenTree, Wanted
from psykern.data.continuations import Context
from psykern.scoring.question import Question
from psykern.scoring.results import Surprisal, TokenScores
from psykern.scoring.texts import Reader, many, one_of, one_text

First = Literal["auto", "bos", "null"]


def surprisal_question(
    reader: Reader,
    texts: str | Sequence[str],
    *,
    first: First = "auto",
    start: str = "",
    ranks: bool = False,
    trailing_space: bool = False,
) -> Question[Any]:
    """See :meth:`.Scorer.surprisal`, whose answer this asks for."""
    one_text("start", start)
    own = _with_first(reader, first)
    every = [texts] if isinstance(texts, str) else many("texts", texts, "a str or a list of them")
    names = ["texts"] if isinstance(texts, str) else [f"texts[{i}]" for i in range(len(every))]
    whole = [start + one_text(name, text) for name, text in zip(names, every, strict=True)]
    starts = reader.word_starts if trailing_space else ()
    read = [_Read.of(context, len(start)) for context in own.contexts(whole)]
    trees = [of.tree(needs_end=trailing_space) for of in read]
    for name, tree in zip(names, trees, strict=True):
        own.check(name, tree)

    def answer(scores: Sequence[TargetScores]) -> Any:
        answers = [_surprisal(of, of_tree, starts) for of, of_tree in zip(read, scores, strict=True)]
        return answers[0] if isinstance(texts, str) else answers

    return Question(trees, answer, Wanted(rank=ranks, mass=starts))


def _with_first(reader: Reader, first: First) -> Reader:
    """The reader that puts in front of a text what ``first`` says. Raises ValueError where there is no such token."""
    one_of("first", first, ("auto", "bos", "null"))
    if first == "auto" or (first == "bos" and reader.tokenizer.front):
        return reader
    if first == "bos" and reader.bos is None:
        raise ValueError("first: 'bos' needs a bos_token or an eos_token, and this tokenizer has neither; use 'null'")
    front = (reader.bos,) if first == "bos" and reader.bos is not None else ()
    return replace(reader, tokenizer=replace(reader.tokenizer, front=front))


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A text, with what is read in front of it, as tokens."""

    context: Context
    start: int  # characters in front of the text
    first: int  # its first token, which may begin in front of it

    @classmethod
    def of(cls, context: Context, start: int) -> _Read:
        tokens = context.tokens
        first = int(np.searchsorted(tokens.end_char, start, side="right"))
        # Special tokens, and a token that a tokenizer puts in front of all characters: the latter is the text's.
        return cls(context, start, first if start else int(np.searchsorted(tokens.word, 0, side="left")))

    @property
    def scored_from(self) -> int:
        """The first token with a probability."""
        return max(1, self.first)

    def tree(self, *, needs_end: bool) -> TokenTree:
        """All tokens of the text; ``needs_end``: also any one token behind it, for the distribution there."""
        ids = self.context.tokens.ids
        branches = 1 if needs_end and len(ids) else 0
        span = [[self.scored_from, len(ids)]] if self.scored_from < len(ids) else []
        return TokenTree(
            token_ids=ids,
            spans_tok=np.array(span, np.int32).reshape(-1, 2),
            branch_parent_tok=np.full(branches, len(ids), np.int32),
            branch_scored_tok=np.zeros(branches, np.int32),
            branch_offsets=np.arange(branches + 1, dtype=np.int64),
            branch_token_ids=np.zeros(branches, np.int32),
        )


def _surprisal(read: _Read, scores: TargetScores, starts: Sequence[int]) -> Surprisal:
    """``starts``: the tokens of which ``scores`` have the mass."""
    tokens = _tokens(read, scores)
    text = read.context.text[read.start :]
    spans = np.array([found.span() for found in re.finditer(r"\S+", text)], np.int64).reshape(-1, 2)
    word = _words(text, spans, tokens.offsets)
    counted = word < len(spans)
    own = -tokens.logprob.astype(np.float64)[counted]
    num_tokens = np.bincount(word[counted], minlength=len(spans))
    surprisal = np.where(num_tokens > 0, np.bincount(word[counted], own, minlength=len(spans)), np.nan)
    if scores.mass is not None:
        surprisal += _correction(spans, word, tokens, np.isin(tokens.ids, starts), _mass(read, scores))
    return Surprisal(
        text=text,
        tokens=tokens,
        words=tuple(text[a:b] for a, b in spans.tolist()),
        word_offsets=spans,
        word_surprisal=surprisal,
        word_num_tokens=num_tokens,
    )


def _tokens(read: _Read, scores: TargetScores) -> TokenScores:
    of, n = read.context.tokens, len(read.context.tokens.ids)
    missing = min(n, read.scored_from) - read.first
    offsets = np.stack([of.start_char, of.end_char], axis=1)[read.first :].astype(np.int64)

    def own(values: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([np.full(missing, fill, values.dtype), values[: n - read.first - missing]])

    return TokenScores(
        ids=of.ids[read.first :],
        text=tuple(read.context.text[a:b] for a, b in offsets.tolist()),
        offsets=offsets - read.start,
        logprob=own(scores.logprob, np.nan),
        entropy=own(scores.entropy, np.nan),
        rank=None if scores.rank is None else own(scores.rank, 0),
    )


def _words(text: str, spans: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[T] int64, the word that each token counts to; one more than the last: none."""
    is_space = np.fromiter(map(str.isspace, text), np.bool_, len(text))
    last = np.maximum.accumulate(np.where(is_space, -1, np.arange(len(text)))) if text else np.empty(0, np.int64)
    start, end = np.maximum(offsets, 0).T
    before_end = np.append(last, -1)[end - 1]  # of characters other than white space; -1 where end is 0
    place = np.where(before_end >= start, before_end, start)
    return np.searchsorted(spans[:, 1], place, side="right")


def _mass(read: _Read, scores: TargetScores) -> np.ndarray:
    """[T+1] float64, log B before each token of the text, and behind the last; NaN before the first of all."""
    assert scores.mass is not None
    missing = len(read.context.tokens.ids) + 1 - read.first - len(scores.mass)
    return np.concatenate([np.full(missing, np.nan), scores.mass])


def _correction(
    spans: np.ndarray, word: np.ndarray, tokens: TokenScores, is_start: np.ndarray, mass: np.ndarray
) -> np.ndarray:
    """[W] float64, nats that the correction for trailing white space adds to each word; ``is_start``: [T] bool."""
    numbers = np.arange(len(spans))
    first, stop = np.searchsorted(word, numbers, side="left"), np.searchsorted(word, numbers, side="right")
    correction = np.zeros(len(spans))
    for w in np.flatnonzero(stop > first).tolist():
        if is_start[first[w]]:
            correction[w] += mass[first[w]]
        if tokens.offsets[stop[w] - 1, 1] == spans[w, 1]:
            correction[w] -= mass[stop[w]]
    return correction
