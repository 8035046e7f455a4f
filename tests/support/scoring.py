"""Runs of the toy and of real transcripts, and what two of them have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from support.toy import (
    Row,
    by_transcript,
)

import psykern
from psykern import Run, Settings


def score(model: Path, data: Path | Sequence[Path], out: Path, **settings: Any) -> Run:
    return psykern.score(model, data, out, Settings(device="cpu", **settings))


def records(run: Run) -> list[list[Row]]:
    return by_transcript(psykern.read_run(run.folder))


def assert_same_scores(one: pa.Table, two: pa.Table) -> None:
    """To the bit, as psykern's own kernels on a CPU promise."""
    assert one.column_names == two.column_names
    for name in one.column_names:
        assert one.column(name).equals(two.column(name)), name


def assert_same_logprobs(one: Sequence[Sequence[Row]], two: Sequence[Sequence[Row]]) -> None:
    """Nulls where the other has nulls."""
    left, right = (np.array([r["logprob"] for own in of for r in own], dtype=np.float64) for of in (one, two))
    np.testing.assert_array_equal(left, right)


def column_bytes(table: pa.Table, name: str) -> list[bytes]:
    buffers = table.column(name).combine_chunks().buffers()
    return [buffer.to_pybytes() for buffer in buffers if buffer is not None]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
