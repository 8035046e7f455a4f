"""What a caller gives, checked and as tokens. What cannot be scored is refused by the name that the caller knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from psykern.core.types import TokenTree
from psykern.data.continuations import Context, contexts
from psykern.data.tokenizer import Tokenizer
from psykern.data.values import string
from psykern.data.word_starts import word_starts

_SHOWN = 40  # characters of a text in a message


def one_text(name: str, value: Any) -> str:
    """Raises TypeError where ``value`` is no text, ValueError where it holds half of a character."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {_shown(value)}; a missing text is to be left out beforehand")
    return string(name, value)


def many(name: str, value: Any, of: str) -> list[Any]:
    """A list of what ``of`` says. Raises TypeError where ``value`` is something else."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected {of}, got {_shown(value)}")
    return list(value)


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Raises ValueError where ``value`` is none of ``known``."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def same_length(name: str, values: Sequence[Any], num_contexts: int) -> None:
    """Raises ValueError where there is not one of ``values`` for each context."""
    if len(values) != num_contexts:
        raise ValueError(f"{name}: expected {num_contexts}, one for each context, got {len(values)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= _SHOWN else text[:_SHOWN] + '…'} ({type(value).__name__})"


@dataclass(frozen=True, eq=False)
class Reader:
    """Makes tokens of texts for one model."""

    tokenizer: Tokenizer
    bos: int | None  # the tokenizer's bos_token, else its eos_token, else that of config.json; None: there is none
    vocab_size: int  # rows of the model's embedding
    max_positions: int  # tokens of its context
    known: Mapping[str, Context] = field(default_factory=dict)  # texts that are tokens already

    @cached_property
    def word_starts(self) -> tuple[int, ...]:
        """Ids of the tokens that begin a new word, or end the text. Raises ValueError where no token says so."""
        return tuple(i for i in word_starts(self.tokenizer) if i < self.vocab_size)

    def contexts(self, texts: Sequence[str]) -> list[Context]:
        """Each of ``texts`` as tokens; equal ones are tokenized once."""
        distinct = [text for text in dict.fromkeys(texts) if text not in self.known]
        new = dict(zip(distinct, contexts(self.tokenizer, distinct), strict=True))
        return [self.known[text] if text in self.known else new[text] for text in texts]

    def knowing(self, contexts: Iterable[Context]) -> Reader:
        """The same, which does not tokenize these again."""
        return replace(self, known={context.text: context for context in contexts})

    def check_whole(self, name: str, context: Context) -> None:
        """Raises ValueError where the model cannot read all of ``context``, to which ``name`` was appended."""
        ids = context.tokens.ids
        if len(ids) > self.max_positions:
            raise ValueError(
                f"{name}: the session would have {len(ids):,} tokens, the model reads {self.max_positions:,}; nothing "
                "is appended"
            )
        self.check(name, TokenTree.bare(ids))

    def check(self, name: str, tree: TokenTree) -> None:
        """Raises ValueError where the model cannot compute what ``name`` comes to."""
        spans = tree.spans_tok[:, 1].max(initial=1) - 1
        needed = int(max(spans, (tree.branch_parent_tok + np.diff(tree.branch_offsets) - 1).max(initial=0)))
        if needed > self.max_positions:
            raise ValueError(
                f"{name}: needs {needed:,} tokens of context, the model has {self.max_positions:,}; shorten the text"
            )
        token = int(max(tree.token_ids.max(initial=-1), tree.branch_token_ids.max(initial=-1)))
        if token >= self.vocab_size:
            text = self.tokenizer.backend.id_to_token(token)
            raise ValueError(
                f"{name}: token {token:,} ({text!r}) is not among the {self.vocab_size:,} rows of the model's "
                "embedding; take it out of the text"
            )
