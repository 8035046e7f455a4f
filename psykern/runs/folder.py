"""A run's folder: one record per response, what was rejected, and how the run was made.

    RUN/manifest.json                    model, data, settings, versions, counts, times; "finished" is null until then
    RUN/responses/part-000000-….parquet  a unit's responses, one a row, columns as in SCHEMA
    RUN/rejects.jsonl                    one line per refused row: file, line, reason; absent when none was
    RUN/summary.json                     means per study and over studies

The rule: a file is there whole or not at all, and what a part holds follows from its name: the number of its unit, and
a hash of the unit's rows, the model and the settings. So the parts that are there are all that a run has to remember:
it can be stopped at any moment and go on, and several processes can write parts of one run. A part also holds, in its
schema's metadata, what its unit adds to counts, rejects and summary, and where its transcripts belong (``order``).
Equal tables give equal bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core.errors import RowError, RunFolderError, Source
from psykern.core.folder import Folder
from psykern.core.settings import check_date
from psykern.core.types import UnitInfo
from psykern.runs.manifest import IDENTITY, Counts, Manifest, Outcome, Recipe, identity, plain
from psykern.runs.order import PartOrder, in_order
from psykern.scoring.table import (
    SCHEMA,
)


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What one unit adds to a run beside its records."""

    counts: Counts
    rejects: tuple[RowError, ...]
    sums: Mapping[str, Sequence[float]]  # summary.SummaryAccumulator.sums


_METADATA = b"psykern"
_NO_UNIT = UnitInfo(0, "", "", 0)  # whose part a run without units has


@dataclass(frozen=True, slots=True, eq=False)
class RunFolder:
    """A run's folder while the run writes it. Every method raises RunFolderError, naming the path, when it cannot."""

    folder: Folder
    began: Mapping[str, Any]  # the manifest as JSON, as the run began
    _identity: str
    _parts: dict[str, UnitReport | None]  # by name, those that are known to be there; None: not read yet

    @classmethod
    def open(cls, path: str | Path, recipe: Recipe, *, resume: bool = True, any_date: bool = False) -> RunFolder:
        """Begin the run in a new or empty folder, or go on with the same run.

        With ``resume=False`` only a new or empty folder will do; with ``any_date`` a run there on another date is the
        same, and keeps it.
        Raises RunFolderError where something else stands in the folder, and where the run there is another; the message
        says in what the two differ.
        """
        folder = Folder.at(path)
        folder.create()
        found = folder.files()
        if found and not (resume and "manifest.json" in found):
            hint = "" if resume else " (or --resume, to go on with the run there)"
            raise RunFolderError(
                f"{path}: expected a new or empty folder to write the run to{hint}, it holds {found[0]}"
            )
        began = plain(dataclasses.asdict(Manifest.of(recipe, Outcome())))
        folder.write_new("manifest.json", _json_writer(began))
        began = _check_same(folder, began, any_date)  # one just written too: on a remote system another may have won
        parts: dict[str, UnitReport | None] = dict.fromkeys(folder.files("responses"))
        return cls(folder, began, json.dumps(identity(began), sort_keys=True), parts)

    def part_name(self, unit: UnitInfo) -> str:
        digest = hashlib.sha256(f"{self._identity}{unit.key}".encode()).hexdigest()
        return f"part-{unit.index:06d}-{digest[:16]}.parquet"

    def has(self, unit: UnitInfo) -> bool:
        """Whether the unit's part is there, as far as this process knows; one that cannot be read is not."""
        name = self.part_name(unit)
        if name in self._parts and self._parts[name] is None:
            try:
                self._parts[name] = _read_report(self.folder, f"responses/{name}")
            except RunFolderError:
                del self._parts[name]
        return name in self._parts

    def look_again(self) -> None:
        """Sees what other processes have written since."""
        for name in self.folder.files("responses"):
            self._parts.setdefault(name, None)

    def check_parts(self, units: Sequence[UnitInfo]) -> None:
        """Raises RunFolderError where parts are there that are of none of the run's ``units``: readers would count them
        beside those of the run."""
        own = {self.part_name(unit) for unit in units or [_NO_UNIT]}
        foreign = [name for name in self.folder.files("responses") if name.endswith(".parquet") and name not in own]
        if foreign:
            more = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
            raise RunFolderError(
                f"{self.folder.name('responses')}: holds parts that are not of this run, as another version of psykern "
                f"leaves them, or files of data under other names: {foreign[0]}{more}; take a new folder"
            )

    def write_part(self, unit: UnitInfo, table: pa.Table, report: UnitReport, order: PartOrder | None = None) -> str:
        """Write the unit's records ``table``, of :data:`SCHEMA`; gives the part's name. ``order``: where its
        transcripts belong, of a unit in a group."""
        if table.schema != SCHEMA:
            raise ValueError(f"part: expected the columns of table.SCHEMA, got {table.schema}")
        name = self.part_name(unit)
        placed = order.metadata() if order else {}
        table = table.replace_schema_metadata({_METADATA: json.dumps(_report_json(report)).encode(), **placed})
        self.folder.write(f"responses/{name}", lambda file: pq.write_table(table, file, compression="zstd"))
        self._parts[name] = report
        return name

    def reports(self, units: Iterable[UnitInfo]) -> Iterator[UnitReport]:
        """Of those units whose parts are there, in order."""
        for unit in units:
            if self.has(unit):
                report = self._parts[self.part_name(unit)]
                assert report is not None  # `has` reads it
                yield report

    def finish(self, manifest: Manifest, summary: Mapping[str, Any], rejects: Iterable[RowError]) -> None:
        """All parts are there: write the rest, the manifest last; ``summary`` is ``Summary.to_json()``."""
        if not self._parts:  # readers find the columns
            self.write_part(_NO_UNIT, SCHEMA.empty_table(), UnitReport(Counts(), (), {}))
        lines = [json.dumps(_reject_json(error)) + "\n" for error in rejects]
        if lines:
            self.folder.write("rejects.jsonl", lambda file: file.write("".join(lines).encode()))
        self.folder.write("summary.json", _json_writer(summary))
        self.folder.write("manifest.json", _json_writer(dataclasses.asdict(manifest)))
        self.folder.remove_unfinished("responses")


def date_in(path: str | Path) -> str | None:
    """The date that the prompts of the run at ``path`` hold; None: none is there that can be read. What is wrong with
    it, :meth:`RunFolder.open` says."""
    with suppress(RunFolderError, ValueError, KeyError, TypeError, RecursionError):
        date = json.loads(Folder.at(path).read("manifest.json"))["date"]
        check_date(date)
        return str(date)
    return None


def _check_same(folder: Folder, mine: dict[str, Any], any_date: bool) -> dict[str, Any]:
    """The manifest that is there. Raises RunFolderError where it is of another run; with ``any_date`` one on another
    date is not."""
    path = folder.name("manifest.json")
    try:
        there = json.loads(folder.read("manifest.json"))
        one, two = identity(there), identity(mine)
        _check_beginning(there)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunFolderError(f"{path}: cannot be read as a run's manifest: {type(error).__name__}: {error}") from error
    if any_date and "date" in one and "date" in two:  # where one has none, what its prompts hold is not known
        two["date"] = one["date"]
    differences = [
        f"{name}: {_short(one.get(name, there.get(name)))} there, {_short(two.get(name, mine.get(name)))} here"
        for name in IDENTITY
        if one.get(name) != two.get(name)
    ]
    if differences:
        raise RunFolderError(f"{folder.path}: holds another run, which differs in {'; '.join(differences)}")
    return dict(there)


def _check_beginning(manifest: Mapping[str, Any]) -> None:
    """What a run that goes on takes over from the one that began. Raises ValueError, KeyError."""
    if not isinstance(manifest["started"], str):
        raise ValueError(f"started: expected a string, got {_short(manifest['started'])}")
    if manifest.get("date") is not None:
        check_date(manifest["date"])
    for name in ("wave_tokens", "batch_tokens"):
        value = manifest[name]
        if not (type(value) is int and 1 <= value < 2**31):  # JSON's true is an int of Python's
            raise ValueError(f"{name}: expected a number from 1 to {2**31 - 1}, got {_short(value)}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _json_writer(value: Mapping[str, Any]) -> Callable[[IO[bytes]], object]:
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    return lambda file: file.write(text.encode())


def _reject_json(error: RowError) -> dict[str, Any]:
    return {"file": error.source.file, "line": error.source.line, "reason": error.reason}


def _report_json(report: UnitReport) -> dict[str, Any]:
    return {
        "counts": dataclasses.asdict(report.counts),
        "rejects": [_reject_json(error) for error in report.rejects],
        "sums": report.sums,
    }


def _read_report(folder: Folder, name: str) -> UnitReport:
    try:
        with folder.open(name) as file:
            metadata = pq.read_schema(file).metadata or {}
        report = json.loads(metadata[_METADATA])
        rejects = tuple(RowError(Source(r["file"], r["line"]), r["reason"]) for r in report["rejects"])
        return UnitReport(Counts(**report["counts"]), rejects, report["sums"])
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunFolderError(f"{folder.name(name)}: cannot be read: {error}") from error


def read_run(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All responses of the run at ``path``, or ``columns`` of them, in the order of the data. Raises RunFolderError
    when there are none."""
    names = SCHEMA.names if columns is None else columns
    schema = pa.schema([SCHEMA.field(name) for name in names])
    return pa.Table.from_batches(iter_run(path, columns), schema=schema)


def iter_run(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The run's responses batch by batch in the order of the data; memory does not grow with the run."""
    folder = Folder.at(path)
    parts = [name for name in folder.files("responses") if name.startswith("part-") and name.endswith(".parquet")]
    if not parts:
        raise RunFolderError(f"{path}: expected a run's folder with responses/part-*.parquet, found no part")
    names = SCHEMA.names if columns is None else list(columns)
    schema = pa.schema([SCHEMA.field(name) for name in names])
    for batch in in_order(_batches(folder, parts, names)):
        yield batch.replace_schema_metadata(schema.metadata)


def _batches(folder: Folder, parts: Sequence[str], names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for part in parts:
        try:
            with folder.open(f"responses/{part}") as stream, pq.ParquetFile(stream) as file:
                if file.schema_arrow != SCHEMA:
                    raise RunFolderError(
                        f"{folder.name(part)}: expected the columns of a run, got {file.schema_arrow.names}"
                    )
                for batch in file.iter_batches(columns=names):
                    yield batch.select(names)
        except (OSError, pa.ArrowException) as error:
            raise RunFolderError(f"{folder.name(part)}: cannot be read: {error}") from error
