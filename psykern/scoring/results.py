"""What a :class:`.Scorer` answers: frozen objects of numbers and NumPy arrays. Log-probabilities are in nats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """Each token of a text, or of its scored part."""

    ids: np.ndarray  # [T] int32
    text: tuple[str, ...]  # [T] the characters that each token stands for
    offsets: np.ndarray  # [T, 2] int64, first and one-past-last of them in the text that was scored; < 0: before it
    logprob: np.ndarray  # [T] float32, nats; NaN: no token before it, so no probability
    entropy: np.ndarray  # [T] float32, nats, of the distribution that the token was drawn from; NaN likewise
    rank: np.ndarray | None  # [T] int64, 1: no token is likelier, 0: no probability; None: not asked for


@dataclass(frozen=True, slots=True, eq=False)
class TokenLogprobs:
    """The scored tokens of a sequence of token ids."""

    ids: np.ndarray  # [n] int32
    logprob: np.ndarray  # [n] float32, nats, of each given all tokens before it
    is_greedy: np.ndarray  # [n] bool, it is the vocabulary's argmax
    entropy: np.ndarray  # [n] float32, nats, of the distribution that it was drawn from
    rank: np.ndarray | None  # [n] int64, 1: no token is likelier; None: not asked for
    mass: np.ndarray | None  # [n] float32, nats, of the tokens asked for together; None: not asked for


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that could not be used."""

    index: int  # of the row, from 0
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Logprob:
    """A continuation of a context."""

    logprob: float  # nats, sum over its tokens; NaN: it has no probability, see flag
    num_tokens: int  # scored; 0 where it has no probability
    is_greedy: bool  # each of them is the vocabulary's argmax
    num_chars: int  # of the continuation
    num_bytes: int  # of it in UTF-8
    unconditional: float | None  # nats, the same continuation after ``pmi_context``; None: not asked for
    # What is unusual, as in a record: "straddles" (its first token begins in the context), "no_context" (no token
    # before its first one, so no probability), "unknown" (a token is the tokenizer's unknown one); joined by ";"
    flag: str | None
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
    logprobs: np.ndarray  # [O] float64, nats, sum over each option's scored tokens; NaN: no probability, see flag
    log_softmax: np.ndarray  # [O] float64, nats, over the options; NaN likewise
    # What is unusual, as in a record: as of :class:`Logprob`, of any option, where "straddles" says also that a token
    # reaches into what stands behind it; "closing_mark": that was scored, too, as one option's tokens begin another's
    flag: str | None

    @property
    def index(self) -> int:
        """Of the likeliest option; the first of equals. Raises ValueError where they have no probability."""
        if np.isnan(self.logprobs[0]):
            raise ValueError(f"the options have no probability (flag {self.flag!r}), so none is the likeliest")
        return int(self.logprobs.argmax())

    @property
    def option(self) -> str:
        """The likeliest option."""
        return self.options[self.index]

    @property
    def margin(self) -> float:
        """Nats by which it is likelier than the next; infinite where it is the only one, NaN without probability."""
        if len(self.options) == 1:
            return float("nan") if np.isnan(self.logprobs[0]) else float("inf")
        second, first = np.partition(self.logprobs, -2)[-2:]
        return float(first - second)


@dataclass(frozen=True, slots=True, eq=False)
class Surprisal:
    """A text by token and by word, a word being a run of characters other than white space."""

    text: str
    tokens: TokenScores  # offsets are counted in ``text``, without what was read in front of it
    words: tuple[str, ...]  # [W]
    word_offsets: np.ndarray  # [W, 2] int64, first and one-past-last character in ``text``
    word_surprisal: np.ndarray  # [W] float64, nats; NaN: a token without probability, or none that ends in the word
    word_num_tokens: np.ndarray  # [W] int64

    @property
    def token_surprisal(self) -> np.ndarray:
        """[T] float64, nats; NaN: no token before it."""
        surprisal: np.ndarray = -self.tokens.logprob.astype(np.float64)
        return surprisal

    @property
    def token_bits(self) -> np.ndarray:
        """[T] float64, bits."""
        bits: np.ndarray = self.token_surprisal / np.log(2)
        return bits

    @property
    def word_bits(self) -> np.ndarray:
        """[W] float64, bits."""
        bits: np.ndarray = self.word_surprisal / np.log(2)
        return bits


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """The likeliest next tokens at places of contexts, the likeliest first; axes as :meth:`.Scorer.distributions`
    has them."""

    ids: np.ndarray  # [n, K] int64
    logprobs: np.ndarray  # [n, K] float32, nats
