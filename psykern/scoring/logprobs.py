"""Log-probabilities of continuations, each after its context: log P(continuation | context), a sum over its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psykern.core.types import TargetScores, Wanted
from psykern.data.continuations import Boundary
from psykern.scoring.following import Following, following
from psykern.scoring.question import Question
from psykern.scoring.results import Logprob, TokenScores
from psykern.scoring.texts import Reader, many, one_of, one_text, same_length


@dataclass(frozen=True, slots=True)
class _Asked:
    """A context and its continuations, with their names for messages."""

    context: str
    texts: tuple[str, ...]
    context_name: str
    names: tuple[str, ...]


def logprobs_question(
    reader: Reader,
    contexts: str | Sequence[str],
    continuations: str | Sequence[str] | Sequence[Sequence[str]],
    *,
    boundary: Boundary = "joint",
    tokens: bool = False,
    ranks: bool = False,
    pmi_context: str | None = None,
) -> Question[Any]:
    """See :meth:`.Scorer.logprobs`, whose answer this asks for."""
    one_of("boundary", boundary, ("joint", "split"))
    if not isinstance(continuations, str):
        continuations = many("continuations", continuations, "a str or a list of them")
    if ranks and not tokens:
        raise ValueError("ranks: a rank is a token's, so this needs tokens=True")
    asked = _asked(contexts, continuations)
    known = [(of.context, of.texts) for of in asked]
    behind = None if pmi_context is None else _pmi_context(reader, pmi_context)
    if behind is not None and asked:
        known.append((behind, tuple(dict.fromkeys(text for of in asked for text in of.texts))))
    read = following(
        reader.tokenizer,
        reader.contexts([context for context, _ in known]),
        [texts for _, texts in known],
        [""] * len(known),
        boundary,
    )
    for of, found in zip(asked, read, strict=False):
        _check(reader, of, found)
    own, pmi = read[: len(asked)], read[-1] if len(read) > len(asked) else None
    if pmi is not None:
        reader.check("pmi_context", pmi.tree)

    def answer(scores: Sequence[TargetScores]) -> Any:
        behind_pmi = None if pmi is None else dict(zip(pmi.texts, pmi.logprobs(scores[-1]).tolist(), strict=True))
        detail = Detail(reader.tokenizer.unknown, tokens, behind_pmi)
        every = [logprobs_of(found, of, detail) for found, of in zip(own, scores[: len(own)], strict=True)]
        return _mirrored(contexts, continuations, every)

    return Question([found.tree for found in read], answer, Wanted(rank=ranks))


def _asked(contexts: Any, continuations: Any) -> list[_Asked]:
    """What is asked of each context. Raises TypeError and ValueError for what is not as it must be."""
    if isinstance(contexts, str):
        one_text("contexts", contexts)
        if isinstance(continuations, str):
            text = one_text("continuations", continuations)
            return [_Asked(contexts, (text,), "contexts", ("continuations",))]
        return [_of_many("contexts", contexts, "continuations", continuations)]
    texts = many("contexts", contexts, "a str or a list of them")
    of_each = many("continuations", continuations, "a list with a str, or a list of them, for each context")
    same_length("continuations", of_each, len(texts))
    asked = []
    for i, (context, own) in enumerate(zip(texts, of_each, strict=True)):
        one_text(f"contexts[{i}]", context)
        if isinstance(own, str):
            text = one_text(f"continuations[{i}]", own)
            asked.append(_Asked(context, (text,), f"contexts[{i}]", (f"continuations[{i}]",)))
        else:
            asked.append(_of_many(f"contexts[{i}]", context, f"continuations[{i}]", own))
    return asked


def _of_many(context_name: str, context: str, name: str, continuations: Any) -> _Asked:
    texts = many(name, continuations, "a str or a list of them")
    if not texts:
        raise ValueError(f"{name}: expected at least one continuation, got none")
    names = tuple(f"{name}[{j}]" for j in range(len(texts)))
    return _Asked(context, tuple(map(one_text, names, texts)), context_name, names)


def _pmi_context(reader: Reader, text: Any) -> str:
    one_text("pmi_context", text)
    if not text and not reader.tokenizer.front:
        raise ValueError(
            "pmi_context: expected a text such as 'Answer:', got ''; this tokenizer puts no special token in front of "
            "a text, so that the first token behind '' has no probability"
        )
    return str(text)


def _check(reader: Reader, asked: _Asked, found: Following) -> None:
    blank = found.branches.blank
    if blank is not None:
        what = f"{asked.texts[blank]!r} has no token" if asked.texts[blank] else "expected a text, got ''"
        raise ValueError(f"{asked.names[blank]}: {what}, so it has no probability")
    reader.check(asked.context_name, found.tree)


def _mirrored(contexts: Any, continuations: Any, every: list[list[Logprob]]) -> Any:
    """In the shape of the arguments."""
    if isinstance(contexts, str):
        return every[0][0] if isinstance(continuations, str) else every[0]
    return [of[0] if isinstance(own, str) else of for own, of in zip(continuations, every, strict=True)]


@dataclass(frozen=True, slots=True)
class Detail:
    """What each answer holds."""

    unknown: int | None  # the tokenizer's unknown token
    tokens: bool
    behind_pmi: Mapping[str, float] | None = None  # nats, of each continuation after ``pmi_context``


def logprobs_of(found: Following, scores: TargetScores, detail: Detail) -> list[Logprob]:
    """Of all continuations ``found`` of a context, of which ``scores`` are."""
    sums, bounds = found.logprobs(scores).tolist(), found.target_offsets.tolist()
    answers = []
    for i, text in enumerate(found.texts):
        own, has_context = slice(bounds[i], bounds[i + 1]), found.has_context[i]
        answers.append(
            Logprob(
                logprob=sums[i],
                num_tokens=own.stop - own.start if has_context else 0,
                is_greedy=has_context and bool(scores.is_argmax[own].all()),
                num_chars=len(text),
                num_bytes=len(text.encode()),
                unconditional=None if detail.behind_pmi is None else detail.behind_pmi[text],
                flag=";".join(found.flags(i, detail.unknown)) or None,
                tokens=_tokens(found, i, scores, own) if detail.tokens else None,
            )
        )
    return answers


def _tokens(found: Following, i: int, scores: TargetScores, own: slice) -> TokenScores:
    chars, begin = found.chars(i), len(found.context.text)
    missing = 0 if found.has_context[i] else 1  # the first of all tokens
    whole = found.context.text[begin + min(0, int(chars[0, 0])) :] + found.texts[i]
    shift = len(whole) - len(found.texts[i])

    def padded(values: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([np.full(missing, fill, values.dtype), values[own]])

    return TokenScores(
        ids=np.array(found.token_ids(i), np.int32),
        text=tuple(whole[shift + start : shift + end] for start, end in chars.tolist()),
        offsets=chars,
        logprob=padded(scores.logprob, np.nan),
        entropy=padded(scores.entropy, np.nan),
        rank=None if scores.rank is None else padded(scores.rank, 0),
    )
