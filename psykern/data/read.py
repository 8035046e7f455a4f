"""Rows of JSON Lines (plain, gzip, zip) and parquet files, one at a time.

Only one row (of parquet: one small batch of rows) is in memory, whatever the file's size. A study's name is its row's
column, else what :mod:`.files` makes of the file's name. A row without a participant is a person of its own, called by
the content of its file and its line.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core.errors import DataError, RowError, Source
from psykern.core.settings import SameParticipants
from psykern.core.types import Transcript
from psykern.data.arrow import loads
from psykern.data.dataset import Dataset
from psykern.data.files import DAMAGE, open_lines, partition_keys
from psykern.data.people import People
from psykern.data.rows import COLUMNS, Choice, Row, refuse, transcripts, unusable
from psykern.data.values import kind

_PARQUET_BATCH = 64  # rows decoded together
_PARQUET_BUFFER = 1 << 20  # bytes read ahead per column, instead of the whole column of a row group

# An object is a tuple of its pairs, as a dict would keep the last of two equal keys in silence.
_JSON = json.JSONDecoder(object_pairs_hook=tuple)


def read(
    dataset: Dataset,
    *,
    studies: Collection[str] | None = None,
    limit: int | None = None,
    same_participants: SameParticipants = "merge",
) -> Iterator[Transcript | RowError]:
    """Transcripts in the order of the files and their rows; the error of a bad row stands in its place.

    `studies` keeps only those studies, `limit` only the first accepted transcripts of each study; rows that they
    leave out are not checked. A damaged file gives one error, at the line reached. Raises DataError for a file that
    cannot be opened or an archive with no rows to find, and as :meth:`.people.People.place` does.
    """
    choice, people = Choice(studies, limit), People(dataset, same_participants)
    for number, file in enumerate(dataset.files):
        rows = _rows_until_damage(file.path)
        if _is_parquet(file.path):  # columns are the same for all rows: where one is not wanted, none of the others is
            rows = takewhile(partial(_may_be_wanted, choice, file.study), rows)
        for row in transcripts(rows, file.study, choice, partial(people.name, number)):
            yield row if isinstance(row, RowError) else people.place(row, number)


def _may_be_wanted(choice: Choice, study: str, row: Row) -> bool:
    return row.may_name_study or choice.wants(study)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _rows_until_damage(path: Path) -> Iterator[Row]:
    """All rows that can be reached; behind them, where a damaged file ends, one that says so when it is loaded."""
    source = Source(str(path), 0)
    is_parquet = _is_parquet(path)
    try:
        for row in _parquet_rows(path) if is_parquet else _json_rows(path):
            source = row.source
            yield row
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DAMAGE as error:
        unit = "row" if is_parquet else "line"
        reason = f"file is damaged or truncated after {unit} {source.line}: {error}"
        yield Row(Source(source.file, source.line + 1), True, partial(refuse, reason))


def _json_rows(path: Path) -> Iterator[Row]:
    with open_lines(path) as (name, stream):
        for number, line in enumerate(stream, start=1):
            while line.startswith(codecs.BOM_UTF8):  # also where files that begin with one were put together
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield Row(Source(name, number), b'"study"' in line, partial(_parse, line))


def _parse(line: bytes) -> Mapping[str, object]:
    try:
        pairs = _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"0x{line[error.start]:02x}"
        raise ValueError(f"not UTF-8: byte {byte} at byte {error.start} of the line ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (character {error.pos} of the line)") from error
    except ValueError as error:  # an integer longer than Python converts
        reason = str(error).split(";")[0]  # behind it stands advice for programmers
        raise ValueError(f"not JSON that can be read: {reason}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error
    if not isinstance(pairs, tuple):
        raise ValueError(f"row: expected an object, got {kind(pairs)}")
    fields: dict[str, object] = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        for name in COLUMNS:
            if counts[name] > 1:
                raise ValueError(f"{name}: expected the key once, the row has it {counts[name]} times")
    return fields


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as parquet:
        schema = parquet.schema_arrow
        columns = [name for name in schema.names if name in COLUMNS]
        if reason := _only_in_folder(schema, path) or unusable(schema.names):
            yield Row(Source(str(path), 1), True, partial(refuse, reason))
            return
        for group in range(parquet.num_row_groups):  # one by one, so that damage costs no row of the group before
            for batch in parquet.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=columns):
                for load in loads(batch):
                    number += 1
                    yield Row(Source(str(path), number), "study" in columns, load)


def _only_in_folder(schema: pa.Schema, path: Path) -> str | None:
    """Why a file of a partitioned table cannot be used; None: it can."""
    for key in partition_keys(path):
        if key in COLUMNS and key != "study" and key not in schema.names:
            return f"{key}: expected a column, it stands in the name of a folder alone; write the table in one piece"
    return None
