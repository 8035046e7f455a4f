"""Rows in every container, and rows read."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core.errors import RowError
from psykern.core.types import Transcript
from psykern.data.dataset import Dataset
from psykern.data.read import read

ROWS: list[dict[str, object]] = [
    {"text": "Pick one: <<A>> then <<B>>.", "experiment": "exp1", "participant": 7, "options": ["A", "B"]},
    {"text": "Größe\n <<>>\x00 and <<ä 😀>>", "experiment": "exp1", "participant": 7},
    {"text": "nothing was answered", "experiment": "exp2", "participant": 8},
]


def json_lines(rows: Sequence[Mapping[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def in_parquet(rows: list[dict[str, object]], **options: object) -> bytes:
    packed = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), packed, **options)
    return packed.getvalue()


def write(path: Path, content: bytes = json_lines(ROWS)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def find(*data: str | Path) -> Dataset:
    return Dataset.find(data, hashed=False)


def accepted(rows: Iterable[Transcript | RowError]) -> Iterator[Transcript]:
    """The rows; raises the first that is refused."""
    for row in rows:
        if isinstance(row, RowError):
            raise row
        yield row


def read_all(*data: str | Path, **options: Any) -> tuple[list[Transcript], list[RowError]]:
    """What is accepted and what is refused."""
    rows = list(read(find(*data), **options))
    return [row for row in rows if isinstance(row, Transcript)], [row for row in rows if isinstance(row, RowError)]
