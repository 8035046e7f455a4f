"""Rows of Arrow's record batches, with each number as its digits have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import pyarrow as pa

from psykern.data.rows import COLUMNS, IDS
from psykern.data.values import check_exact


def loads(batch: pa.RecordBatch) -> Iterator[Callable[[], Mapping[str, object]]]:
    """``Row.load`` of each row, of the columns that rows may have. :func:`.rows.unusable` must have nothing against
    these."""
    own = batch.select([name for name in batch.schema.names if name in COLUMNS])
    narrow = {field.name: width for field in own.schema if (width := _narrow(field.type)) is not None}
    for place in range(own.num_rows):
        yield partial(_take, own, place, narrow)


def _narrow(column: pa.DataType) -> type[np.floating] | None:
    """The type of a column's numbers, or of those in its lists, where they are floats of less than 64 bits."""
    while hasattr(column, "value_type"):  # of lists, their views, dictionaries
        column = column.value_type
    if pa.types.is_float16(column):
        return np.float16
    return np.float32 if pa.types.is_float32(column) else None


def _take(batch: pa.RecordBatch, place: int, narrow: Mapping[str, type[np.floating]]) -> Mapping[str, object]:
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = column[place].as_py()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})") from error
        except (OverflowError, ValueError) as error:  # a date beyond Python's, nanoseconds
            reason = str(error).split(". ")[0]  # behind it stands advice for programmers
            raise ValueError(f"{name}: cannot be read: {reason}; write it as a string") from error
        fields[name] = shortest(name, value, narrow[name]) if name in narrow else value
    return fields


def shortest(name: str, value: object, width: type[np.floating]) -> object:
    """A narrow float, or a list of them, as its digits have it: 0.1 in 32 bits is 0.10000000149011612 in 64."""
    if isinstance(value, list):
        return [shortest(name, item, width) for item in value]
    if not isinstance(value, float):
        return value
    if name in IDS:
        check_exact(name, value, bits=np.finfo(width).nmant + 1)
    return float(str(width(value)))
