"""The hand-offs between psykern's modules: frozen dataclasses, and the errors a user can meet.

    rows ─ read ─► Transcript ─ encode ─► EncodedTranscript ─ plan ─► Wave… ─ run ─► TargetScores ─ write ─► parquet

Index spaces carry a suffix: ``_char`` counts characters of a text, ``_tok`` tokens of one transcript,
``_row`` rows of a wave. Ragged data is CSR: values and an array of offsets one longer than the number of lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Protocol = Literal["exact", "study"]
Condition = Literal["plain", "chat", "persona"]
Boundary = Literal["joint", "split"]
OptionSource = Literal["none", "given", "observed", "observed-experiment"]
OverLength = Literal["error", "skip", "truncate"]


class PsykernError(Exception):
    """Base of every error that psykern raises for a reason the user can act on."""


class DataError(PsykernError):
    """Input data cannot be found or read at all (a bad row alone is a :class:`RowError`)."""


class CheckpointError(PsykernError):
    """A model folder, its config, weights or tokenizer cannot be used."""


class RunFolderError(PsykernError):
    """The folder for a run's records cannot be used."""


class ComparisonError(PsykernError):
    """Runs cannot be compared; the message says what differs or is missing."""


class NonFiniteError(PsykernError):
    """A score is NaN or infinite; the message names the layer where it began."""


class OutOfMemoryError(PsykernError):
    """The machine or device ran out of memory; the message says which budget to lower."""


class InterruptedRun(PsykernError):
    """A run was asked to stop and did so; what is finished stays, and the same command goes on from there."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row came from."""

    file: str  # path, or path!member for an archive
    line: int  # 1-based line of a JSON Lines file, 1-based row of a parquet file


class RowError(PsykernError):
    """One row cannot be used; the rest of the data can.

    ``source`` says where the row stands, ``reason`` why it is refused.
    """

    def __init__(self, source: Source, reason: str) -> None:
        super().__init__(f"{source.file}:{source.line}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowError], tuple[Source, str]]:
        return RowError, (self.source, self.reason)  # an exception pickles its message alone


@dataclass(frozen=True, slots=True, eq=False)
class Transcript:
    """One participant's session as prose, with its responses located. Filled by ``transcripts.read``."""

    study: str
    experiment: str
    participant: str
    text: str  # as in the data, with the marks << and >>
    responses_char: np.ndarray  # [R, 2] int64, first and one-past-last character between the marks
    options: tuple[tuple[str, ...], ...] | None  # [R] answer options of each response; None: the row gives none
    source: Source
    metadata: tuple[tuple[str, str], ...] = ()  # what is known of the participant, see persona.py


@dataclass(frozen=True, slots=True)
class UnitInfo:
    """What is known of a unit of work before its rows are read again. Filled by ``units.units``."""

    index: int  # from 0, in order of the data
    study: str  # of its transcripts; empty: it has none
    key: str  # hexadecimal hash of its rows
    characters: int  # of its texts


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTranscript:
    """One transcript as tokens, with the tokens to score. Filled by ``encode.Encoder.encode``.

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
    flags: tuple[str | None, ...]  # [R] see records.py; None: nothing to say
    options: tuple[tuple[str, ...] | None, ...]  # [R] None: the response has no options
    option_index: np.ndarray  # [R] int32, the option that is the response; -1: none
    branch_response: np.ndarray  # [B] int32, response that each branch is an option of
    branch_parent_tok: np.ndarray  # [B] int32, tokens of the transcript before the branch, at least 1
    branch_scored_tok: np.ndarray  # [B] int32, first scored token, counted within the branch
    branch_offsets: np.ndarray  # [B+1] int64, into branch_token_ids
    branch_token_ids: np.ndarray  # [branch_offsets[-1]] int32
    num_dropped: int  # responses that the over-length policy "truncate" left out


@dataclass(frozen=True, slots=True, eq=False)
class EncodedUnit:
    """A unit of work as tokens. Filled by ``feed.Feed``, from rows or from the token cache."""

    info: UnitInfo
    transcripts: tuple[EncodedTranscript, ...]  # whole, whatever the model's context; without those that were refused
    rejects: tuple[RowError, ...]  # rows refused when they were read or encoded
    without_metadata: int  # transcripts that the condition persona left out


@dataclass(frozen=True, slots=True, eq=False)
class Wave:
    """Rows that are computed together, one layer after the other. Filled by ``plan.Plan``.

    The wave's key/value store has ``num_carried + N`` rows: first those carried from the wave before, then its own.
    A segment here is a run of rows of one batch with one list of visible keys: ``key_ranges`` of store rows, which
    concatenated are the path from the transcript's first token to the segment's last, so the key at place j of
    that list has position j, and a query sees the keys up to its own position.
    A *target* is a token whose log-probability is wanted; the row before it predicts it.
    """

    index: int
    token_ids: np.ndarray  # [N] int32
    positions: np.ndarray  # [N] int32, tokens before this one on its path
    num_carried: int  # C
    keep_rows: np.ndarray  # [C'] int64, ascending rows of the store that the next wave carries
    batch_offsets: np.ndarray  # [B+1] int32, rows of the wave
    batch_segments: np.ndarray  # [B+1] int32, segments of each batch
    segment_offsets: np.ndarray  # [S+1] int32, rows of the wave
    range_offsets: np.ndarray  # [S+1] int32, into key_ranges
    key_ranges: np.ndarray  # [range_offsets[-1], 2] int32, rows of the store
    response_rows: np.ndarray  # [R] int32, ascending rows of the wave that predict a target
    target_offsets: np.ndarray  # [R+1] int64, into target_token_ids
    target_token_ids: np.ndarray  # [nnz] int32
    target_ids: np.ndarray  # [nnz] int64, whose targets these are: indices into TargetScores


@dataclass(frozen=True, slots=True, eq=False)
class TargetScores:
    """Scores by target id. First the tokens of all responses (transcripts in order, responses in order, tokens in
    order), then those of all branches in the same manner. Filled by ``engine.run``."""

    logprob: np.ndarray  # [targets] float32, nats
    is_argmax: np.ndarray  # [targets] bool, the token is the vocabulary's argmax (lowest id on ties)
    entropy: np.ndarray  # [targets] float32, nats, of the distribution that the token was drawn from
