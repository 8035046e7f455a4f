"""A choice among answer options: the log-softmax of their log-probabilities after a context, as in a record.

Where the tokens of one option begin another's, what stands behind an option (``closing``) is scored with each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psykern.core.types import TargetScores
from psykern.data.branches import Branches
from psykern.data.continuations import Boundary, closing_behind
from psykern.scoring.following import Following, following
from psykern.scoring.question import Question
from psykern.scoring.results import Choice
from psykern.scoring.texts import Reader, many, one_of, one_text, same_length


def choose_question(
    reader: Reader,
    contexts: str | Sequence[str],
    options: Sequence[str] | Sequence[Sequence[str]],
    *,
    boundary: Boundary = "joint",
    closing: str | None = None,
) -> Question[Any]:
    """See :meth:`.Scorer.choose`, whose answer this asks for."""
    one_of("boundary", boundary, ("joint", "split"))
    if closing is not None:
        one_text("closing", closing)
    if isinstance(contexts, str):
        texts, of_each, names = (
            [one_text("contexts", contexts)],
            [options_of("options", options)],
            [("contexts", "options")],
        )
    else:
        texts = many("contexts", contexts, "a str or a list of them")
        for i, text in enumerate(texts):
            one_text(f"contexts[{i}]", text)
        of_each, names = _options_of_each(options, len(texts))
    closings = [closing_behind(text) if closing is None else closing for text in texts]
    read = following(reader.tokenizer, reader.contexts(texts), of_each, closings, boundary)
    for (context_name, name), found in zip(names, read, strict=True):
        check_options(context_name, name, found)
        reader.check(context_name, found.tree)

    def answer(scores: Sequence[TargetScores]) -> Any:
        every = [choice(found, of_tree, reader.tokenizer.unknown) for found, of_tree in zip(read, scores, strict=True)]
        return every[0] if isinstance(contexts, str) else every

    return Question([found.tree for found in read], answer)


def options_of(name: str, options: Any) -> tuple[str, ...]:
    """The options of a context. Raises TypeError and ValueError for what is not as it must be."""
    texts = many(name, options, "a list of str")
    if not texts:
        raise ValueError(f"{name}: expected at least one option, got none")
    return tuple(one_text(f"{name}[{j}]", text) for j, text in enumerate(texts))


def _options_of_each(options: Any, num_contexts: int) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """The options of each context, and how messages name both."""
    given = many("options", options, "a list of str, or such a list for each context")
    if (not given and num_contexts) or any(isinstance(of, str) for of in given):  # one list for all
        own, names = [options_of("options", given)] * num_contexts, ["options"] * num_contexts
    else:
        same_length("options", given, num_contexts)
        names = [f"options[{i}]" for i in range(num_contexts)]
        own = list(map(options_of, names, given))
    return own, [(f"contexts[{i}]", name) for i, name in enumerate(names)]


def check_options(context_name: str, name: str, found: Following) -> None:
    """Raises ValueError for options that have no probability of their own after this context."""
    of: Branches = found.branches
    if of.blank is not None:
        raise ValueError(f"{_named(name, found, of.blank)} encodes to no token after {context_name}")
    if of.same is not None:
        one, two = (_named(name, found, i) for i in of.same)
        raise ValueError(f"{one} and {two} encode to the same tokens after {context_name}")
    if of.contained is not None:
        one, two = (_named(name, found, i) for i in of.contained)
        raise ValueError(
            f"the tokens of {one} begin those of {two} after {context_name}, and what stands behind them does not tell "
            "them apart; say what does with closing=, for example closing='\\n'"
        )


def _named(name: str, found: Following, i: int) -> str:
    return f"{name}[{i}] ({found.texts[i]!r})"


def choice(found: Following, scores: TargetScores, unknown: int | None) -> Choice:
    """Among the options ``found``, of which ``scores`` are; NaN for all where one has no probability."""
    logprobs = found.logprobs(scores)
    known = not np.isnan(logprobs).any()
    flags = dict.fromkeys(flag for i in range(len(found.texts)) for flag in found.flags(i, unknown))
    if found.branches.closing_mark:
        flags["closing_mark"] = None
    return Choice(
        options=found.texts,
        logprobs=logprobs if known else np.full_like(logprobs, np.nan),
        log_softmax=logprobs - np.logaddexp.reduce(logprobs) if known else np.full_like(logprobs, np.nan),
        flag=";".join(flags) or None,
    )
