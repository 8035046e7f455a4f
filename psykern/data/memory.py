"""Rows in memory, whatever holds them: dicts, texts, data frames, Arrow tables and readers, data sets, any iterable.

The rule is that of files (:mod:`.rows`): what pandas, polars, numpy and Arrow write for nothing (NaN, ``pd.NA``, NaT,
null) is missing, and a number is what its digits say, whichever of their types it has. None of these libraries is
imported: a frame is what has a frame's methods. A row without a participant is a person of its own, ``row:<index>``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from psykern.core.errors import RowError, Source
from psykern.core.types import Transcript
from psykern.data import arrow
from psykern.data.rows import COLUMNS, Choice, Row, transcripts, unusable
from psykern.data.values import kind

Load = Callable[[], Mapping[str, object]]  # as of a Row

_TAKEN = "dicts or texts in a list or another iterable, a pandas or polars frame, an Arrow table, a datasets.Dataset"
_BATCH = 64  # rows taken from a frame together
_NOTHING = ("NAType", "NaTType")  # of pandas, by name as pandas may not be there


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one kind of holder."""

    loads: Callable[[], Iterator[Load]]  # goes through them
    once: bool  # which can be done once only

    @classmethod
    def of(cls, rows: object) -> Rows:
        """Raises TypeError for what holds no rows, ValueError for a table without a column ``text``."""
        _refuse(rows)
        holder: Any = rows
        if hasattr(holder, "iloc") and hasattr(holder, "columns"):
            _check([str(name) for name in holder.columns])
            return cls(partial(_of_frame, holder), once=False)
        if hasattr(holder, "with_format") and hasattr(holder, "column_names"):
            return cls(partial(_of_dataset, holder), once=False)
        table = _table(holder)
        if table is not None:
            _check(table.schema.names)
            return cls(partial(_of_batches, holder, [table]), once=isinstance(holder, pa.RecordBatchReader))
        if not isinstance(holder, Iterable):
            raise TypeError(f"rows: expected {_TAKEN}, got {type(rows).__name__}")
        return cls(lambda: (partial(_item, item) for item in holder), once=isinstance(holder, Iterator))

    def kept(self) -> Rows:
        """These, which may be gone through as often as wanted; all are in memory then."""
        if not self.once:
            return self
        every = list(self.loads())
        return Rows(lambda: iter(every), once=False)

    def transcripts(self, study: str, choice: Choice) -> Iterator[Transcript | RowError]:
        """As :func:`.rows.transcripts` has it; ``study``: of rows that do not name theirs."""
        rows = (Row(Source("", index), True, load) for index, load in enumerate(self.loads()))
        return transcripts(rows, study, choice, lambda index: f"row:{index}")


def _refuse(rows: object) -> None:
    """Raises TypeError for what could be taken for rows and is not."""
    if isinstance(rows, str):
        raise TypeError("rows: expected a list, got one text; for a single row give [text], for files psykern.score")
    if isinstance(rows, Mapping):
        raise TypeError("rows: expected a list, got one dict; for a single row give [row], of several data sets one")
    if isinstance(rows, (Path, io.IOBase)):
        raise TypeError(f"rows: expected {_TAKEN}, got {type(rows).__name__}; for files take psykern.score")
    if hasattr(rows, "iloc") and not hasattr(rows, "columns") and "text" in getattr(rows, "index", ()):
        raise TypeError("rows: expected a list, got one row of a frame; for that row alone give frame.iloc[[number]]")
    if isinstance(rows, np.ndarray) and not rows.ndim:
        raise TypeError(f"rows: expected {_TAKEN}, got an array without dimensions")
    if isinstance(rows, (bytes, bytearray, memoryview)):
        raise TypeError(f"rows: expected {_TAKEN}, got {type(rows).__name__}; decode it first")


def _check(columns: Sequence[str]) -> None:
    reason = unusable(columns)
    if reason is not None:
        raise ValueError(reason)


def _table(rows: Any) -> pa.Table | pa.RecordBatchReader | None:
    """``rows`` as Arrow has them; None: they are no table of Arrow's. What is in a stream is not read yet."""
    if isinstance(rows, (pa.Table, pa.RecordBatchReader)):
        return rows
    if isinstance(rows, (pa.Array, pa.ChunkedArray, pa.Scalar)):
        return None
    if hasattr(rows, "__arrow_c_stream__"):
        with suppress(pa.ArrowInvalid, pa.ArrowTypeError):  # a series: its items are no columns
            return pa.RecordBatchReader.from_stream(rows)
        return None
    return pa.Table.from_batches([pa.record_batch(rows)]) if hasattr(rows, "__arrow_c_array__") else None


def _of_batches(rows: object, begun: list[pa.Table | pa.RecordBatchReader]) -> Iterator[Load]:
    """``begun``: the table of the first time, as a stream may be there once only."""
    table = begun.pop() if begun else _table(rows)
    assert table is not None
    for batch in table.to_batches() if isinstance(table, pa.Table) else table:
        yield from arrow.loads(batch)


def _of_dataset(rows: Any) -> Iterator[Load]:
    """Of a ``datasets.Dataset`` or ``IterableDataset``, without the columns that no row has use for, as pictures."""
    if rows.column_names is not None:  # those of a stream may be known when its first row is there
        _check(rows.column_names)
        rows = rows.select_columns([name for name in rows.column_names if name in COLUMNS])
    if not hasattr(rows, "__len__"):  # a stream may find another type of a column in each of its tables
        yield from (partial(_item, row) for row in rows.with_format(None))
        return
    for table in rows.with_format("arrow").iter(batch_size=_BATCH):
        yield from _of_batches(table, [])


def _of_frame(frame: Any) -> Iterator[Load]:
    """Of a pandas frame, whose columns may hold values of several types, as Arrow's may not."""
    names = [name for name in frame.columns if isinstance(name, str) and name in COLUMNS]
    widths = {name: _width(frame[name].dtype) for name in names}
    for first in range(0, len(frame), _BATCH):
        part = frame.iloc[first : first + _BATCH]
        for values in zip(*(part[name] for name in names), strict=True):
            yield partial(_cells, dict(zip(names, values, strict=True)), widths)


def _width(dtype: Any) -> type[np.floating] | None:
    """As ``arrow`` has it, of a column of pandas."""
    numbers = getattr(getattr(dtype, "numpy_dtype", dtype), "type", None)
    return next((width for width in (np.float16, np.float32) if numbers is width), None)


def _cells(fields: Mapping[str, object], widths: Mapping[str, type[np.floating] | None]) -> Mapping[str, object]:
    cells = {}
    for name, value in fields.items():
        width = widths[name]
        cells[name] = _cell(name, value) if width is None else arrow.shortest(name, _cell(name, value), width)
    return cells


def _item(item: object) -> Mapping[str, object]:
    """The columns of a row that is a dict or a text."""
    if isinstance(item, pa.Scalar):
        item = item.as_py()
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, Mapping):
        raise ValueError(f"row: expected a dict or a text, got {'a tuple' if isinstance(item, tuple) else kind(item)}")
    return {name: _cell(name, item[name]) for name in COLUMNS if name in item}


def _cell(name: str, value: Any) -> object:
    """A value as Python has it."""
    if isinstance(value, np.floating) and value.itemsize < 8:
        return arrow.shortest(name, float(value), type(value))
    if isinstance(value, np.ndarray) and not value.ndim:
        return _cell(name, value[()])
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else value.astype("datetime64[us]").item()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, pa.Scalar):
        return value.as_py()
    if isinstance(value, np.ndarray):
        return [_cell(name, item) for item in value]
    if isinstance(value, (list, tuple)):
        return [_cell(name, item) for item in value]
    if type(value).__name__ in _NOTHING:
        return None
    to_list = getattr(value, "tolist", None) or getattr(value, "to_list", None) or getattr(value, "to_pylist", None)
    return _cell(name, to_list()) if to_list is not None else value
