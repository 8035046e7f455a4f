"""The hand-offs between psykern's rooms: frozen dataclasses. (Waves are the engine's own: ``engine/plan.py``.)

    rows ─ read ─► Transcript ─ encode ─► EncodedTranscript ─ plan ─► Wave… ─ run ─► TargetScores ─ write ─► parquet

Index spaces carry a suffix: ``_char`` counts characters of a text, ``_tok`` tokens of one transcript,
``_row`` rows of a wave. Ragged data is CSR: values and an array of offsets one longer than the number of lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from psykern.core.errors import RowError, Source


@dataclass(frozen=True, slots=True, eq=False)
class Transcript:
    """One participant's session as prose, with its responses located. Filled by ``data.rows.transcripts``."""

    study: str
    experiment: str
    participant: str
    text: str  # as in the data, with the marks << and >>
    responses_char: np.ndarray  # [R, 2] int64, first and one-past-last character between the marks
    options: tuple[tuple[str, ...], ...] | None  # [R] answer options of each response; None: the row gives none
    source: Source
    metadata: tuple[tuple[str, str], ...] = ()  # what is known of the participant, see data/persona.py
    has_id: bool = True  # False: the row names no participant
    joins_files: bool = False  # the first row by which a participant of one file is in a second one too
    repeats: bool = False  # an earlier row has the same participant and text
    place: int = 0  # in the data, among what its unit's group holds; see UnitInfo


@dataclass(frozen=True, slots=True)
class UnitInfo:
    """What is known of a unit of work before its rows are read again. Filled by ``data.units.units``."""

    index: int  # from 0
    study: str  # of its transcripts; empty: it has none
    key: str  # hexadecimal hash of its rows
    characters: int  # of its texts
    group: int | None = (
        None  # index of the first of those units whose rows lie among each other in the data; None: alone
    )


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTranscript:
    """One transcript as tokens, with the tokens to score. Filled by ``data.encode.Encoder``.

    A response's scored tokens are ``token_ids[start:end]``; start == end means that there is nothing to score
    (an empty response, or no token before the first). An option is a *branch*: ``branch_token_ids`` of that
    option follow the first ``branch_parent_tok`` tokens of the transcript, and its tokens from
    ``branch_scored_tok`` on are scored. Branches stand in order of response, then of option.
    """

    study: str
    experiment: str
    participant: str
    source: Source
    token_ids: np.ndarray  # [T] int32
    responses: tuple[str, ...]  # [R] text of each response
    spans_tok: np.ndarray  # [R, 2] int32
    flags: tuple[str | None, ...]  # [R] see data/encode.py; None: nothing to say
    options: tuple[tuple[str, ...] | None, ...]  # [R] None: the response has no options
    option_index: np.ndarray  # [R] int32, the option that is the response; -1: none
    branch_response: np.ndarray  # [B] int32, response that each branch is an option of
    branch_parent_tok: np.ndarray  # [B] int32, tokens of the transcript before the branch; 0: none
    branch_scored_tok: np.ndarray  # [B] int32, first scored token, counted within the branch
    branch_offsets: np.ndarray  # [B+1] int64, into branch_token_ids
    branch_token_ids: np.ndarray  # [branch_offsets[-1]] int32
    num_dropped: int  # responses that the over-length policy "truncate" left out
    place: int = 0  # as Transcript has it


@dataclass(frozen=True, slots=True, eq=False)
class EncodedUnit:
    """A unit of work as tokens. Filled by ``data.feed.Feed``, from rows or from the token cache."""

    info: UnitInfo
    transcripts: tuple[EncodedTranscript, ...]  # whole, whatever the model's context; without those that were refused
    rejects: tuple[RowError, ...]  # rows refused when they were read or encoded
    without_metadata: int  # transcripts that the condition persona left out
    without_id: int = 0  # rows that name no participant
    shared_participants: int = 0  # people who are in more than one file, each counted once in all units
    repeated: int = 0  # rows that repeat an earlier one of their participant


class Targeted(Protocol):
    """A sequence of tokens of which some are scored, and branches: what a plan is made of. Fields as
    :class:`EncodedTranscript` has them."""

    @property
    def token_ids(self) -> np.ndarray: ...
    @property
    def spans_tok(self) -> np.ndarray: ...
    @property
    def branch_parent_tok(self) -> np.ndarray: ...
    @property
    def branch_scored_tok(self) -> np.ndarray: ...
    @property
    def branch_offsets(self) -> np.ndarray: ...
    @property
    def branch_token_ids(self) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """A sequence of tokens and branches of which nothing else is known. Filled by ``scoring``, from texts."""

    token_ids: np.ndarray  # [T] int32
    spans_tok: np.ndarray  # [R, 2] int32
    branch_parent_tok: np.ndarray  # [B] int32, tokens of the sequence before the branch; 0: none
    branch_scored_tok: np.ndarray  # [B] int32, first scored token, counted within the branch
    branch_offsets: np.ndarray  # [B+1] int64, into branch_token_ids
    branch_token_ids: np.ndarray  # [branch_offsets[-1]] int32

    @classmethod
    def bare(cls, token_ids: np.ndarray) -> TokenTree:
        """A sequence of which nothing is scored."""
        none = np.empty(0, np.int32)
        return cls(token_ids, none.reshape(0, 2), none, none, np.zeros(1, np.int64), none)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of a target's distribution beside what :class:`TargetScores` always holds."""

    rank: bool = False
    top_k: int = 0
    full: bool = False
    mass: tuple[int, ...] = ()  # ids of tokens whose probability together is wanted


NOTHING_MORE = Wanted()


@dataclass(frozen=True, slots=True, eq=False)
class TargetScores:
    """Scores by target id. First the tokens of all responses (transcripts in order, responses in order, tokens in
    order), then those of all branches in the same manner. Filled by ``Engine``."""

    logprob: np.ndarray  # [targets] float32, nats
    is_argmax: np.ndarray  # [targets] bool, the token is the vocabulary's argmax (lowest id on ties)
    entropy: np.ndarray  # [targets] float32, nats, of the distribution that the token was drawn from
    rank: np.ndarray | None = None  # [targets] int64, 1: no token is likelier; None: not wanted, as of the next four
    top_ids: np.ndarray | None = None  # [targets, K] int64, the likeliest tokens, the likeliest first
    top_logprobs: np.ndarray | None = None  # [targets, K] float32, nats
    full: np.ndarray | None = None  # [targets, V] float32, nats, of every token of the vocabulary
    mass: np.ndarray | None = None  # [targets] float32, nats, of the tokens ``Wanted.mass`` together
