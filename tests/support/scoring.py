"""Runs of the toy and of real transcripts, and what two of them have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from support.exactness import INVARIANCE
from support.toy import (
    Oracle,
    Row,
    by_transcript,
)

import psykern
from psykern import Run, Settings


def score(model: Path, data: Path | Sequence[Path], out: Path, **settings: Any) -> Run:
    return psykern.score(model, data, out, Settings(device="cpu", **settings))


def records(run: Run) -> list[list[Row]]:
    return by_transcript(psykern.read_run(run.folder))


def assert_no_close_call(oracle: Oracle, rows: Sequence[Row], protocol: str = "exact") -> None:
    """That ``assert_same_scores`` may compare ``is_argmax``: no rounding can choose another token."""
    for row in rows:
        assert not any(record.is_close_call for record in oracle.records(row["text"], protocol)), row["text"]


def assert_same_scores(one: pa.Table, two: pa.Table) -> None:
    for name in one.column_names:
        left, right = one.column(name), two.column(name)
        if pa.types.is_list(left.type):
            assert left.is_null().equals(right.is_null())
            left, right = pc.list_flatten(left), pc.list_flatten(right)
        if pa.types.is_floating(left.type):
            assert left.is_null().equals(right.is_null()), name
            tokens = np.maximum(1, one["num_tokens"].to_numpy()) if name == "logprob" else np.ones(len(left))
            difference = np.abs(left.to_numpy() - right.to_numpy()) / np.sqrt(tokens)
            assert np.nanmax(difference, initial=0) <= INVARIANCE, name
        else:
            assert left.equals(right), name


def assert_same_logprobs(one: Sequence[Sequence[Row]], two: Sequence[Sequence[Row]]) -> None:
    """Nulls where the other has nulls."""
    left, right = (np.array([r["logprob"] for own in of for r in own], dtype=np.float64) for of in (one, two))
    np.testing.assert_allclose(left, right, rtol=0, atol=INVARIANCE)


def column_bytes(table: pa.Table, name: str) -> list[bytes]:
    buffers = table.column(name).combine_chunks().buffers()
    return [buffer.to_pybytes() for buffer in buffers if buffer is not None]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
