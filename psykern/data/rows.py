"""Rows of JSON Lines (plain, gzip, zip) and parquet files become transcripts, one at a time.

The rule: a row is used as it stands or refused with file, line and reason; nothing is repaired, and a bad row
never stops the rest. Only one row (of parquet: one small batch of rows) is in memory, whatever the file's size.

A row holds `text`, and if it likes `study`, `experiment`, `participant` (or `participant_reindexed`) and `options`;
what is known of the participant (the columns of :mod:`.persona`) is kept, other columns are ignored. None and
NaN count as missing. A study's name is its column, else what :mod:`.files` makes of the file's name.
"""

from __future__ import annotations

import codecs
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core.errors import DataError, RowError, Source
from psykern.core.types import Transcript
from psykern.data import persona
from psykern.data.dataset import Dataset
from psykern.data.files import DAMAGE, open_lines

_COLUMNS = ("text", "study", "experiment", "participant", "participant_reindexed", "options", *persona.COLUMNS)
_PARQUET_BATCH = 64  # rows decoded together
_PARQUET_BUFFER = 1 << 20  # bytes read ahead per column, instead of the whole column of a row group

_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def read(
    dataset: Dataset, *, studies: Collection[str] | None = None, limit: int | None = None
) -> Iterator[Transcript | RowError]:
    """Transcripts in the order of the files and their rows; the error of a bad row stands in its place.

    `studies` keeps only those studies, `limit` only the first accepted transcripts of each study; rows that they
    leave out are not checked. A damaged file gives one error, at the line reached. Raises DataError for a file that
    cannot be opened or an archive with no rows to find.
    """
    taken: Counter[str] = Counter()

    def wanted(study: str) -> bool:
        return (studies is None or study in studies) and (limit is None or taken[study] < limit)

    for file in dataset.files:
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
                transcript = _transcript(fields, study, row.source)
            except ValueError as error:
                yield RowError(row.source, str(error))
                continue
            taken[study] += 1
            yield transcript


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
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _Row(Source(name, number), b'"study"' in line, partial(_parse, line))


def _parse(line: bytes) -> Mapping[str, object]:
    try:
        fields = json.loads(line.decode("utf-8"))
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
    if not isinstance(fields, dict):
        raise ValueError(f"row: expected an object, got {_kind(fields)}")
    return fields


def _parquet_rows(path: Path) -> Iterator[_Row]:
    number = 0
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as parquet:
        columns = [name for name in parquet.schema_arrow.names if name in _COLUMNS]
        if "text" not in columns:
            reason = f"text: expected a column of that name, got columns {', '.join(parquet.schema_arrow.names)}"
            yield _Row(Source(str(path), 1), True, partial(_refuse, reason))
            return
        for group in range(parquet.num_row_groups):  # one by one, so that damage costs no row of the group before
            for batch in parquet.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=columns):
                for place in range(batch.num_rows):
                    number += 1
                    yield _Row(Source(str(path), number), "study" in columns, partial(_take, batch, place))


def _take(batch: pa.RecordBatch, place: int) -> Mapping[str, object]:
    try:
        columns = zip(batch.schema.names, batch.columns, strict=True)
        return {name: column[place].as_py() for name, column in columns}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})") from error


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


def _transcript(fields: Mapping[str, object], study: str, source: Source) -> Transcript:
    text = fields.get("text")
    if _is_missing(text):
        raise ValueError("text: missing")
    text = _string("text", text)
    responses_char = find_responses(text)
    participant = fields.get("participant")
    if _is_missing(participant):
        participant = fields.get("participant_reindexed")
    return Transcript(
        study=study,
        experiment=_string_or_number("experiment", fields.get("experiment"), missing=""),
        participant=_string_or_number("participant", participant, missing=str(source.line)),
        text=text,
        responses_char=responses_char,
        options=_options(fields.get("options"), len(responses_char)),
        source=source,
        metadata=persona.metadata(fields),
    )


def _study(fields: Mapping[str, object], default: str) -> str:
    study = fields.get("study")
    study = _string("study", default if _is_missing(study) else study)
    if not study:
        raise ValueError("study: expected a name, got an empty string")
    return study


def _options(value: object, num_responses: int) -> tuple[tuple[str, ...], ...] | None:
    """One tuple per response, from one list for all responses or one list (or null) per response."""
    if _is_missing(value):
        return None
    if not isinstance(value, list):
        raise ValueError(f"options: expected a list, got {_kind(value)}")
    per_response = any(isinstance(item, list) for item in value) or (value != [] and all(map(_is_missing, value)))
    if not per_response:
        return (_option_list("options", value),) * num_responses
    if len(value) != num_responses:
        raise ValueError(f"options: expected one list for each of {num_responses} responses, got {len(value)} lists")
    equal: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal lists become one object
    lists = (_option_list(f"options of response {number}", item) for number, item in enumerate(value, start=1))
    return tuple(equal.setdefault(options, options) for options in lists)


def _option_list(name: str, value: object) -> tuple[str, ...]:
    if _is_missing(value):
        return ()
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list or null, got {_kind(value)}")
    options: dict[str, None] = {}  # an ordered set
    for number, item in enumerate(value, start=1):
        is_number = isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)
        option = str(item) if is_number else _string(f"{name}: option {number}", item)
        if not option:
            raise ValueError(f"{name}: option {number} is empty")
        if option in options:
            raise ValueError(f"{name}: option {number} repeats {option!r}")
        options[option] = None
    return tuple(options)


def _string_or_number(name: str, value: object, *, missing: str) -> str:
    """Numbers as people write ids: 7 and 7.0 are both `7`."""
    if _is_missing(value):
        return missing
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return _string(name, value)
    raise ValueError(f"{name}: expected a string or a number, got {_kind(value)}")


def _string(name: str, value: object) -> str:
    """The value if it is a string that UTF-8 can hold; JSON's escapes can spell half of a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {_kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            raise ValueError(f"{name}: lone surrogate {code} at character {error.start}, not Unicode text") from error
    return value


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: object) -> str:
    """A value's type for messages, as JSON calls it."""
    return _KINDS.get(type(value), type(value).__name__)
