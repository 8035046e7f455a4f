"""What can go wrong for a reason that the user can act on."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Where a row came from; as a string for messages."""

    file: str  # path, or path!member for an archive; empty: the row was in memory
    line: int  # 1-based line of a JSON Lines file, 1-based row of a parquet file; in memory the index, from 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else f"rows[{self.line}]"


class RowError(PsykernError):
    """One row cannot be used; the rest of the data can.

    ``source`` says where the row stands, ``reason`` why it is refused.
    """

    def __init__(self, source: Source, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowError], tuple[Source, str]]:
        return RowError, (self.source, self.reason)  # an exception pickles its message alone


class RejectedRowsWarning(UserWarning):
    """Some rows in memory could not be used, and the caller did not ask which."""


class SlowDtypeWarning(UserWarning):
    """The processor has no fast products of the dtype that was asked for; the message says what that costs."""


class NoSharingWarning(UserWarning):
    """The model is computed in one pass for each sequence, common beginnings again and again; the message says why."""


class BackendError(RuntimeError):
    """A backend that was asked for by name is not available; the message says how to get it."""
