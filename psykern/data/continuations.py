"""Contexts as tokens, and the branches of what may follow them: continuations and answer options.

A context is a text's beginning, with the tokenizer's special tokens in front of it and none behind. What follows is
tokenized with it as one string (*joint*): its tokens are those that overlap its characters, also one that begins in the
context, and its branch begins where the context's tokens change. Or it is tokenized alone (*split*) and put behind.

A context that grows is tokenized anew only from a few words before its end on, as long as those keep their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from psykern.data.branches import JointText, Placed, joint_branches, split_branches
from psykern.data.protocol import CLOSE_MARK
from psykern.data.tokenizer import Snippets, Tokenizer, Tokens, tokenize

_WINDOW_WORDS = 2  # whole pre-tokens between a window's first one, which must stay as it is, and the context's end

Boundary = Literal["joint", "split"]


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """A text's beginning."""

    text: str
    tokens: Tokens  # special tokens in front, none behind


def contexts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Context]:
    """Each of ``texts`` as tokens."""
    return [Context(*of) for of in zip(texts, tokenize(replace(tokenizer, back=()), texts), strict=True)]


def extended(tokenizer: Tokenizer, context: Context, text: str) -> Context:
    """The context with ``text`` behind it, token for token as :func:`contexts` of the whole."""
    if not text:
        return context
    whole = context.text + text
    begin = _window(tokenizer, context)
    tokens = _continued(tokenizer, context, text, begin) if begin > len(tokenizer.front) else None
    return contexts(tokenizer, [whole])[0] if tokens is None else Context(whole, tokens)


def _window(tokenizer: Tokenizer, context: Context) -> int:
    """The token from which on the context is tokenized again: an added token may begin no earlier, and neither may a
    word that the text behind it changes."""
    tokens, own = context.tokens, len(tokenizer.front)
    if len(tokens.ids) == own:
        return own
    reach = int(np.searchsorted(tokens.start_char, len(context.text) - tokenizer.longest_added, side="right")) - 1
    word = min(tokens.word[-1] - _WINDOW_WORDS, tokens.word[max(reach, 0)])
    return max(own, int(np.searchsorted(tokens.word, word, side="left")))


def _continued(tokenizer: Tokenizer, context: Context, text: str, begin: int) -> Tokens | None:
    """The context's tokens before ``begin`` and those of the rest with ``text``; None: the rest alone has other tokens
    than in the context, or ``text`` changes its first word."""
    known = context.tokens
    left = int(known.start_char[begin])
    window = context.text[left:]
    inside = replace(tokenizer, backend=tokenizer.inside or tokenizer.backend, front=(), back=())
    old, new = tokenize(inside, [window, window + text])
    if tokenizer.anew and np.isin(new.ids, list(tokenizer.anew)).any():  # behind which it begins as in front of a text
        return None
    first = int(np.searchsorted(old.word, old.word[:1], side="right")[0]) if len(old.ids) else 0  # tokens of a word
    same_first = all(np.array_equal(getattr(old, name)[:first], getattr(new, name)[:first]) for name in _FIELDS)
    if not (first and same_first and _is_same(known, old, begin, left)):
        return None
    if len(new.ids) > first and new.word[first] == new.word[0]:
        return None
    moved = {"ids": 0, "start_char": left, "end_char": left, "word": known.word[begin] - old.word[0]}
    return Tokens(
        **{name: np.concatenate([getattr(known, name)[:begin], getattr(new, name) + by]) for name, by in moved.items()}
    )


_FIELDS = ("ids", "start_char", "end_char")


def _is_same(known: Tokens, window: Tokens, begin: int, left: int) -> bool:
    return (
        np.array_equal(known.ids[begin:], window.ids)
        and np.array_equal(known.start_char[begin:], window.start_char + left)
        and np.array_equal(known.end_char[begin:], window.end_char + left)
    )


def closing_behind(text: str) -> str:
    """What stands behind an option of a context unless somebody says: the closing mark inside a response, else
    nothing."""
    return CLOSE_MARK if text.rfind("<<") > text.rfind(CLOSE_MARK) else ""


def option_branches(
    tokenizer: Tokenizer,
    contexts: Sequence[Context],
    options: Sequence[tuple[str, ...]],
    closings: Sequence[str],
    boundary: Boundary,
) -> list[Placed]:
    """The branches of each context's options, of which there is at least one; ``closings``: what stands behind them.

    Raises ValueError for ``boundary="split"`` with a tokenizer that puts something in front of every piece of a text.
    """
    if boundary == "split":
        return _split(tokenizer, contexts, options, closings)
    bare = replace(tokenizer, back=())
    joints = [
        JointText(
            text=context.text,
            tokens=context.tokens,
            marks_char=np.array([[len(context.text)] * 2]),
            closes=[""],
            inserts=[tuple((option, closing) for option in of)],
            close_chars=len(closing),
            reach_chars=tokenizer.longest_added,
        )
        for context, of, closing in zip(contexts, options, closings, strict=True)
    ]
    return [placed for (placed,) in joint_branches(bare, joints) if placed is not None]


def _split(
    tokenizer: Tokenizer, contexts: Sequence[Context], options: Sequence[tuple[str, ...]], closings: Sequence[str]
) -> list[Placed]:
    if tokenizer.inside is None:
        raise ValueError(
            'boundary: "split" cannot be had with this tokenizer, which puts something in front of each piece of a '
            'text, or strips it, and psykern cannot turn that off; use boundary="joint"'
        )
    texts = dict.fromkeys(text for of in options for text in of) | dict.fromkeys(closings)
    snippets = Snippets(tokenizer, texts, inside=True)
    return [
        (len(context.tokens.ids), split_branches(of, closing, snippets, len(closing)))
        for context, of, closing in zip(contexts, options, closings, strict=True)
    ]
