"""Untrusted input, drawn at random, and what must hold of a run on it.

The rule: whatever stands in rows, files, a manifest or a part, a run ends well or with a PsykernError; every input row
is then among the transcripts or among the rejects, by count; nothing is written outside the run's folder.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

import psykern
from psykern import PsykernError, Run, Settings, demo

Row = dict[str, Any]

HOSTILE = (
    "..",
    "../../escaped",
    "/tmp/psykern-escaped",
    "a/b",
    "a\x00b",
    "a\nb",
    ".",
    "",
    "~",
    "\ud800",
    "\ufeff",
    "📉",
)
MOST_ROWS = 6

texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from(HOSTILE),
    st.lists(st.sampled_from(["<<", ">>", "<", ">", "J", "press ", "10", "-7", "é", "\n", "\x00"]), max_size=20).map(
        "".join
    ),
    st.lists(
        st.sampled_from(["You press <<J>>. ", "Rate: <<10>>\n", "<<>>", "say <<a dog, a cat>>; "]), max_size=8
    ).map("".join),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
options = st.one_of(st.lists(st.sampled_from(["J", "F", "1", "10", "-7", ""]), max_size=4), values)
rows: st.SearchStrategy[Row] = st.fixed_dictionaries(
    {"text": st.one_of(texts, texts, values)},
    optional={
        "study": st.one_of(texts, values),
        "experiment": st.one_of(texts, values),
        "participant": st.one_of(texts, values),
        "options": options,
        "age": values,
        "gender": values,
    },
)
settings = st.builds(
    Settings,
    device=st.just("cpu"),
    over_length=st.just("skip"),
    protocol=st.sampled_from(["exact", "study"]),
    options=st.sampled_from(["none", "given", "observed", "observed-experiment"]),
    unit_tokens=st.sampled_from([1, 20, 1000]),
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A file of JSON Lines: rows, JSON that is none, and bytes that are no text."""
    line = st.one_of(rows.map(_json), rows.map(_json), values.map(_json), st.binary(max_size=40))
    return b"\n".join(draw(st.lists(line, min_size=1, max_size=MOST_ROWS)))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` cut off, or with some bytes changed, or as it is."""
    kind = draw(st.sampled_from(["whole", "cut", "changed"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    changed = bytearray(content)
    if kind == "changed" and content:
        for place in draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
            changed[place] = draw(st.integers(0, 255))
    return bytes(changed)


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def as_parquet(table: list[Row]) -> bytes:
    """Rows of strings, numbers and lists of strings; what else they hold is left out."""
    columns = {name: pa.array([_text(row.get(name)) for row in table], pa.string()) for name in ("text", "study")}
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def count_lines(content: bytes) -> int:
    """Rows of a file of JSON Lines: those that are not blank."""
    return sum(1 for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip())


@contextmanager
def place() -> Iterator[Path]:
    """A folder for a run, ``…/a/b/run``, not made yet; fails where something else below ``…`` is not as it was."""
    with tempfile.TemporaryDirectory(prefix="psykern-fuzz-") as outer:
        run = Path(outer) / "a" / "b" / "run"
        run.parent.mkdir(parents=True)
        yield run
        others = sorted(
            str(path.relative_to(outer)) for path in Path(outer).rglob("*") if run not in [path, *path.parents]
        )
        assert others in (["a", "a/b"], ["a", "a/b", "a/b/data"]), others
        assert not Path("/tmp/psykern-escaped").exists()


def score(name: str, content: bytes, run: Path, how: Settings) -> Run | None:
    """A run on one file ``name`` of that content; None: it was refused, and nothing claims to be a finished run."""
    data = run.parent / "data"
    data.mkdir()
    (data / name).write_bytes(content)
    try:
        done = psykern.score(demo.MODEL, data / name, run, how)
    except PsykernError:
        with suppress(FileNotFoundError):
            assert json.loads((run / "manifest.json").read_bytes())["finished"] is None
        return None
    finally:
        shutil.rmtree(data / name, ignore_errors=True)
        (data / name).unlink(missing_ok=True)
        data.rmdir()
    check_counts(done)
    return done


def check_counts(run: Run) -> None:
    """What the manifest counts is what stands in the folder."""
    counts = run.manifest.counts
    rejects = Path(run.folder) / "rejects.jsonl"
    assert counts.rejects == (len(rejects.read_bytes().splitlines()) if rejects.exists() else 0)
    assert counts.responses == len(psykern.read_run(run.folder, columns=["study"]))


def rows_of(run: Run) -> int:
    counts = run.manifest.counts
    return counts.transcripts + counts.rejects + counts.over_length_transcripts


def unpacked(name: str, content: bytes) -> int | None:
    """Rows of the packed file; None where it is damaged."""
    try:
        if name.endswith(".gz"):
            return count_lines(gzip.decompress(content))
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return count_lines(archive.read(archive.infolist()[0]))
    except Exception:  # any failure at all means that it is damaged
        return None


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _text(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    return value.encode("utf-8", "replace").decode()
