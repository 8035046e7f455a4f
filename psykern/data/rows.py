"""Rows of JSON Lines (plain, gzip, zip) and parquet files become transcripts, one at a time.

The rule: a row is used as it stands or refused with file, line and reason; nothing is repaired, and a bad row
never stops the rest. Only one row (of parquet: one small batch of rows) is in memory, whatever the file's size.

A row holds `text`, and if it likes `study`, `experiment`, `participant` (or `participant_reindexed`) and `options`;
what is known of the participant (the columns of :mod:`.persona`) is kept, other columns are ignored. What these may
hold is said in :mod:`.values`. A study's name is its column, else what :mod:`.files` makes of the file's name. A row
without a participant is a person of its own, called by the content of its file and its line.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core.errors import DataError, RowError, Source
from psykern.core.settings import SameParticipants
from psykern.core.types import Transcript
from psykern.data import persona
from psykern.data.dataset import Dataset
from psykern.data.files import DAMAGE, open_lines, partition_keys
from psykern.data.people import People
from psykern.data.values import answer_options, check_exact, identifier, is_blank, is_missing, kind, string

_IDS = ("experiment", "participant", "participant_reindexed")
_COLUMNS = ("text", "study", *_IDS, "options", *persona.COLUMNS)
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
    taken: Counter[str] = Counter()
    people = People(dataset, same_participants)

    def wanted(study: str) -> bool:
        return (studies is None or study in studies) and (limit is None or taken[study] < limit)

    for number, file in enumerate(dataset.files):
        for row in _rows_until_damage(file.path):
            if not row.may_name_study and not wanted(file.study):
                if file.path.suffix.lower() == ".parquet":
                    break  # columns are the same for all rows, so none of the others is wanted
                continue
            try:
                fields = row.load()
                study = _study(fields, file.study)
                if not wanted(study):
                    continue
                transcript = _transcript(fields, study, row.source, people.name(number, row.source.line))
            except ValueError as error:
                yield RowError(row.source, str(error))
                continue
            taken[study] += 1
            yield people.place(transcript, number)


@dataclass(frozen=True, slots=True)
class _Row:
    source: Source
    may_name_study: bool  # False: the row has no column `study`
    load: Callable[[], Mapping[str, object]]  # the row's columns; raises ValueError with the reason why there are none


def _rows_until_damage(path: Path) -> Iterator[_Row]:
    """All rows that can be reached; behind them, where a damaged file ends, one that says so when it is loaded."""
    source = Source(str(path), 0)
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        for row in _parquet_rows(path) if is_parquet else _json_rows(path):
            source = row.source
            yield row
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DAMAGE as error:
        unit = "row" if is_parquet else "line"
        reason = f"file is damaged or truncated after {unit} {source.line}: {error}"
        yield _Row(Source(source.file, source.line + 1), True, partial(_refuse, reason))


def _refuse(reason: str) -> Mapping[str, object]:
    raise ValueError(reason)


def _json_rows(path: Path) -> Iterator[_Row]:
    with open_lines(path) as (name, stream):
        for number, line in enumerate(stream, start=1):
            while line.startswith(codecs.BOM_UTF8):  # also where files that begin with one were put together
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _Row(Source(name, number), b'"study"' in line, partial(_parse, line))


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
        for name in _COLUMNS:
            if counts[name] > 1:
                raise ValueError(f"{name}: expected the key once, the row has it {counts[name]} times")
    return fields


def _parquet_rows(path: Path) -> Iterator[_Row]:
    number = 0
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as parquet:
        schema = parquet.schema_arrow
        columns = [name for name in schema.names if name in _COLUMNS]
        if reason := _unusable(schema, path):
            yield _Row(Source(str(path), 1), True, partial(_refuse, reason))
            return
        narrow = {name: width for name in columns if (width := _narrow(schema.field(name).type)) is not None}
        for group in range(parquet.num_row_groups):  # one by one, so that damage costs no row of the group before
            for batch in parquet.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=columns):
                for place in range(batch.num_rows):
                    number += 1
                    yield _Row(Source(str(path), number), "study" in columns, partial(_take, batch, place, narrow))


def _unusable(schema: pa.Schema, path: Path) -> str | None:
    """Why no row of a parquet file can be used; None: they can."""
    counts = Counter(schema.names)
    for key in partition_keys(path):
        if key in _COLUMNS and key != "study" and not counts[key]:
            return f"{key}: expected a column, it stands in the name of a folder alone; write the table in one piece"
    if not counts["text"]:
        return f"text: expected a column of that name, got columns {', '.join(schema.names)}"
    twice = next((name for name in _COLUMNS if counts[name] > 1), None)
    return twice and f"{twice}: expected one column of that name, got {counts[twice]}"


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
        fields[name] = _shortest(name, value, narrow[name]) if name in narrow else value
    return fields


def _shortest(name: str, value: object, width: type[np.floating]) -> object:
    """A narrow float, or a list of them, as its digits have it: 0.1 in 32 bits is 0.10000000149011612 in 64."""
    if isinstance(value, list):
        return [_shortest(name, item, width) for item in value]
    if not isinstance(value, float):
        return value
    if name in _IDS:
        check_exact(name, value, bits=np.finfo(width).nmant + 1)
    return float(str(width(value)))


def find_responses(text: str) -> np.ndarray:
    """[R, 2] int64: first and one-past-last character of each response, which stands between `<<` and `>>`.

    Marks are taken from left to right: `<<a>>>` is the response `a` and then `>`, `<<<a>>` is the response `<a`.
    Raises ValueError for nested or unbalanced marks; characters are counted from 0.
    """
    spans = []
    place = 0
    while (opened := text.find("<<", place)) >= 0:  # str.find is much faster than a regular expression here
        if (stray := text.find(">>", place, opened)) >= 0:
            raise ValueError(f"text: '>>' at character {stray} without '<<' before it")
        closed = text.find(">>", opened + 2)
        nested = text.find("<<", opened + 2, closed if closed >= 0 else len(text))
        if nested >= 0:
            raise ValueError(f"text: '<<' at character {nested} inside the response that '<<' at {opened} opens")
        if closed < 0:
            raise ValueError(f"text: '<<' at character {opened} is never closed")
        spans.append((opened + 2, closed))
        place = closed + 2
    if (stray := text.find(">>", place)) >= 0:
        raise ValueError(f"text: '>>' at character {stray} without '<<' before it")
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _transcript(fields: Mapping[str, object], study: str, source: Source, name: str) -> Transcript:
    """``name``: what the person is called where the row does not say."""
    text = fields.get("text")
    if is_missing(text):
        raise ValueError("text: missing")
    text = string("text", text)
    responses_char = find_responses(text)
    names = (fields.get("participant"), fields.get("participant_reindexed"))
    participant = next((value for value in names if not is_blank(value)), None)
    return Transcript(
        study=study,
        experiment=identifier("experiment", fields.get("experiment"), missing=""),
        participant=identifier("participant", participant, missing=name),
        text=text,
        responses_char=responses_char,
        options=answer_options(fields.get("options"), text, responses_char),
        source=source,
        metadata=persona.metadata(fields),
        has_id=participant is not None,
    )


def _study(fields: Mapping[str, object], default: str) -> str:
    study = fields.get("study")
    study = string("study", default if is_missing(study) else study)
    if is_blank(study):
        raise ValueError("study: expected a name, got an empty string")
    return study
