"""Rows in whatever can hold them; small stand-ins for pandas' and datasets' own, which need not be installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from support.toy import Row


def frames(rows: list[Row]) -> dict[str, Any]:
    """``rows`` in what can hold them here."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])

    class Stream:
        """What polars and others give."""

        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return table.__arrow_c_stream__(requested_schema)

    return {
        "generator": (row for row in rows),
        "table": table,
        "chunks": pa.concat_tables([table[:2], table[2:]]),
        "batch": table.combine_chunks().to_batches()[0],
        "reader": table.to_reader(max_chunksize=3),
        "stream": Stream(),
        "structs": table.to_struct_array(),
        "frame": Frame(rows),
        "data set": DataSet(table),
        "stream of a data set": Streamed(rows),
    }


class Series:
    def __init__(self, values: list[Any], dtype: Any) -> None:
        self.values, self.dtype = values, dtype

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


class NAType:
    """pandas.NA: equal to nothing, true of nothing."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None  # type: ignore[assignment]


class Frame:
    """As much of a pandas frame as is asked for; a gap is NaN in a column of numbers and pd.NA in others."""

    def __init__(self, rows: list[Row]) -> None:
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self.rows = rows

    @property
    def iloc(self) -> Any:
        return _Places(self)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Series:
        values = [row.get(name) for row in self.rows]
        if all(value is None or isinstance(value, (int, float)) for value in values):
            return Series([np.nan if value is None else float(value) for value in values], np.dtype(np.float64))
        values = [NAType() if value is None else value for value in values]
        return Series([np.array(v, object) if isinstance(v, list) else v for v in values], np.dtype(object))


class _Places:
    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    def __getitem__(self, places: slice) -> Frame:
        part = Frame(self.frame.rows[places])
        part.columns = self.frame.columns
        return part


class DataSet:
    """As much of a datasets.Dataset as is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.column_names = table, table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def select_columns(self, names: list[str]) -> DataSet:
        return DataSet(self.table.select(names))

    def with_format(self, name: str) -> DataSet:
        assert name == "arrow"
        return self

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        return (self.table[i : i + batch_size] for i in range(0, len(self), batch_size))


class Streamed:
    """A datasets.IterableDataset, whose columns are not known."""

    column_names = None

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def with_format(self, name: None) -> Streamed:
        assert name is None
        return self

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)
