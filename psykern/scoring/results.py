"""What a :class:`.Scorer` answers: frozen objects of numbers and NumPy arrays. Log-probabilities are in nats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """Each token of a text, or of its scored part."""

    ids: np.ndarray  # [T] int32
    text: tuple[str, ...]  # [T] the characters that each token stands for
    offsets: np.ndarray  # [T, 2] int64, first and one-past-last of them, counted in the text that was scored
    logprob: np.ndarray  # [T] float32, nats; NaN: no token before it, so no probability
    entropy: np.ndarray  # [T] float32, nats, of the distribution that the token was drawn from; NaN likewise
    rank: np.ndarray | None  # [T] int64, 1: no token is likelier, 0: no probability; None: not asked for


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that could not be used."""

    index: int  # of the row, from 0
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Logprob:
    """A continuation of a context."""

    logprob: float  # nats, sum over its tokens; NaN: nothing could be scored, see flag
    num_tokens: int  # scored
    is_greedy: bool  # each of them is the vocabulary's argmax
    num_chars: int  # of the continuation
    num_bytes: int  # of it in UTF-8
    unconditional: float | None  # nats, the same tokens after ``pmi_context``; None: not asked for
    flag: str | None  # as of a record: what is unusual about it
    tokens: TokenScores | None  # None: not asked for

    @property
    def per_token(self) -> float:
        """Nats per token; NaN where there is none."""
        return self.logprob / self.num_tokens if self.num_tokens else float("nan")

    @property
    def per_char(self) -> float:
        """Nats per character (code point)."""
        return self.logprob / self.num_chars if self.num_chars else float("nan")

    @property
    def per_byte(self) -> float:
        """Nats per byte of UTF-8."""
        return self.logprob / self.num_bytes if self.num_bytes else float("nan")

    @property
    def pmi(self) -> float | None:
        """Nats by which the context makes it likelier than ``pmi_context`` does; None: not asked for."""
        return None if self.unconditional is None else self.logprob - self.unconditional


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A choice among answer options."""

    options: tuple[str, ...]  # [O]
    logprobs: np.ndarray  # [O] float64, nats, sum over each option's scored tokens
    log_softmax: np.ndarray  # [O] float64, nats, over the options
    flag: str | None  # as of a record: what is unusual about it

    @property
    def index(self) -> int:
        """Of the likeliest option; the first of equals."""
        return int(self.logprobs.argmax())

    @property
    def option(self) -> str:
        """The likeliest option."""
        return self.options[self.index]

    @property
    def margin(self) -> float:
        """Nats by which it is likelier than the next; infinite where it is the only one."""
        if len(self.options) == 1:
            return float("inf")
        second, first = np.partition(self.logprobs, -2)[-2:]
        return float(first - second)
