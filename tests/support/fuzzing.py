"""What the fuzzers feed to psykern, and what must hold: an error a user can act on or a run that accounts for every
row, and nothing written outside the run's folder. Used by ``tests/runs/test_fuzz.py`` and by ``benchmarks/fuzz.py``."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

import psykern
from psykern import Settings

_WORDS = st.sampled_from(
    [
        "<<",
        ">>",
        "<<A>>",
        "<<",
        "A",
        " ",
        "\n",
        "é",
        "\u0301",
        "\x00",
        "\ud800",
        "<<>>",
        "machine J",
        ".",
        "-7",
        "<",
        ">",
    ]
)
_TEXT = st.one_of(st.text(max_size=40), st.lists(_WORDS, max_size=12).map("".join))
_VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXT, inner, max_size=3)),
    max_leaves=6,
)
_NAME = st.one_of(st.sampled_from(["s", "../../up", "/tmp/x", "..", "a/b", "\x00", "a\nb", ""]), _VALUE)
_OPTIONS = st.lists(st.one_of(_TEXT, st.lists(_TEXT, max_size=3)), max_size=3)
_ROW = st.fixed_dictionaries(
    {"text": st.one_of(st.just("You say <<A>>, then <<B>>."), _TEXT, _VALUE)},
    optional={
        "study": _NAME,
        "experiment": _NAME,
        "participant": _NAME,
        "options": st.one_of(st.just(["A", "B"]), _OPTIONS, _VALUE),
        "age": _VALUE,
        "gender": _VALUE,
    },
)
ROWS = st.lists(_ROW, max_size=5)
_LINE = st.one_of(
    _ROW.map(lambda row: json.dumps(row).encode()),
    _VALUE.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")),
)
LINES = st.lists(_LINE, max_size=5)
SETTINGS = st.builds(
    Settings,
    device=st.just("cpu"),
    protocol=st.sampled_from(["exact", "study"]),
    options=st.sampled_from(["none", "given", "observed", "observed-experiment"]),
    condition=st.sampled_from(["plain", "persona"]),
    discrete=st.sampled_from([None, "[A-Z]"]),
    over_length=st.just("skip"),
    unit_tokens=st.sampled_from([1, 50, 2**17]),
)
PACKINGS = st.sampled_from(["jsonl", "jsonl.gz", "zip"])
SUFFIXES = st.sampled_from(["jsonl", "jsonl.gz", "zip", "parquet"])
# Bytes of the packed file that are changed, and where it is cut: shares of its length.
DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3)
CUT = st.one_of(st.just(1.0), st.floats(0, 1))
MANIFEST_FIELDS = st.sampled_from(
    [
        "started",
        "date",
        "wave_tokens",
        "batch_tokens",
        "data",
        "protocol",
        "limit",
        "studies",
        "versions",
        "counts",
        "finished",
    ]
)
CHANGES = st.dictionaries(MANIFEST_FIELDS, _VALUE, max_size=3)
REMOVED = st.lists(MANIFEST_FIELDS, max_size=2)
JSON_TEXT = st.one_of(_VALUE.map(json.dumps), st.text(max_size=30))


NewFolder = Callable[[str], AbstractContextManager[Path]]  # for one input of the rule so named


@contextmanager
def new_folder(rule: str) -> Iterator[Path]:
    """A folder for one input, deep enough that a step or two upwards is seen too."""
    with tempfile.TemporaryDirectory(prefix=f"psykern-fuzz-{rule}-") as parent:
        folder = Path(parent) / "a" / "b"
        folder.mkdir(parents=True)
        yield folder


def pack(lines: list[bytes], packing: str, member: str = "prompts.jsonl") -> bytes:
    content = b"".join(line + b"\n" for line in lines)
    if packing == "jsonl.gz":
        return gzip.compress(content, mtime=0)
    if packing == "zip":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, content)
        return stream.getvalue()
    return content


def check_rows(model: Path, lines: list[bytes], packing: str, settings: Settings, folder: Path) -> None:
    """Every row of an undamaged file is in the records or among the rejects, by count and by name."""
    data = folder / f"study.{packing}"
    data.write_bytes(pack(lines, packing, "../../prompts.jsonl"))
    num_rows = sum(bool(_without_mark(i, line).strip()) for i, line in enumerate(lines))
    run = score_or_error(model, data, settings, folder)
    if run is None:
        return
    counts = run.manifest.counts
    left_out = counts.over_length_transcripts + counts.without_metadata_transcripts
    assert counts.transcripts + left_out + counts.rejects == num_rows
    rejects = folder / "run" / "rejects.jsonl"
    named = [json.loads(line)["line"] for line in rejects.read_text().splitlines()] if rejects.exists() else []
    assert len(named) == len(set(named)) == counts.rejects
    assert psykern.read_run(folder / "run").num_rows == counts.responses


def _without_mark(number: int, line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


def check_damaged(
    model: Path, content: bytes, suffix: str, damage: list[tuple[float, int]], cut: float, folder: Path
) -> None:
    """A file of any bytes gives an error that names it, or a run."""
    broken = bytearray(content)
    for place, value in damage:
        if broken:
            broken[int(place * len(broken))] = value
    data = folder / f"study.{suffix}"
    data.write_bytes(bytes(broken[: int(cut * len(broken))]))
    run = score_or_error(model, data, Settings(device="cpu"), folder)
    if run is not None:
        assert psykern.read_run(folder / "run").num_rows == run.manifest.counts.responses


def check_manifest(model: Path, data: Path, text: str, folder: Path) -> None:
    """A run's folder with any manifest is refused, and left as it is."""
    (folder / "run").mkdir()
    path = folder / "run" / "manifest.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    before = path.read_bytes()
    assert score_or_error(model, data, Settings(device="cpu"), folder) is None
    assert path.read_bytes() == before


def check_changed_manifest(model: Path, data: Path, changes: dict[str, Any], removed: list[str], folder: Path) -> None:
    """A run that began and whose manifest was changed is refused or goes on, whole."""
    with suppress(psykern.InterruptedRun):
        psykern.score(model, data, folder / "run", Settings(device="cpu"), stop=lambda: True)
    path = folder / "run" / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name not in removed}))
    run = score_or_error(model, data, Settings(device="cpu"), folder)
    assert run is None or run.manifest.finished is not None


def check_part(model: Path, data: Path, content: bytes, place: float, length: float, folder: Path) -> None:
    """A part that was cut, and overwritten in the middle, is scored again."""
    run = psykern.score(model, data, folder / "run", Settings(device="cpu"))
    part = next((folder / "run" / "responses").iterdir())
    whole = part.read_bytes()
    start, stop = int(place * len(whole)), int(length * len(whole))
    part.write_bytes((whole[:start] + content + whole[start + len(content) :])[:stop])
    again = score_or_error(model, data, Settings(device="cpu"), folder)
    assert again is not None and again.manifest.counts == run.manifest.counts
    assert part.read_bytes() == whole


def score_or_error(model: Path, data: Path, settings: Settings, folder: Path) -> psykern.Run | None:
    """None: refused, with an error that a user can act on."""
    before = _files(folder.parent)
    try:
        return psykern.score(model, data, folder / "run", settings, cache=folder / "cache")
    except psykern.PsykernError as error:
        assert str(error)
        return None
    finally:
        new = _files(folder.parent) - before
        assert all(path.is_relative_to(folder / "run") or path.is_relative_to(folder / "cache") for path in new), new


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def parquet_of(lines: list[bytes]) -> bytes:
    """Those lines that are rows with a text, as parquet."""
    texts = []
    for line in lines:
        try:
            row: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("text"), str) and "\ud800" not in row["text"]:
            texts.append(row["text"].encode("utf-8", "ignore").decode())
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), stream)
    return stream.getvalue()


def rules(model: Path, data: Path, new_folder: NewFolder) -> dict[str, Callable[..., None]]:
    """Each rule as hypothesis calls it, over what it is fed with; every input gets a new folder."""

    def rows(lines: list[bytes], packing: str, chosen: Any) -> None:
        with new_folder("rows") as folder:
            check_rows(model, lines, packing, chosen, folder)

    def files(lines: list[bytes], suffix: str, damage: list[tuple[float, int]], cut: float) -> None:
        content = parquet_of(lines) if suffix == "parquet" else pack(lines, suffix)
        with new_folder("files") as folder:
            check_damaged(model, content, suffix, damage, cut, folder)

    def raw(content: bytes, suffix: str) -> None:
        with new_folder("raw") as folder:
            check_damaged(model, content, suffix, [], 1.0, folder)

    def manifests(text: str) -> None:
        with new_folder("manifests") as folder:
            check_manifest(model, data, text, folder)

    def changed(changes: dict[str, Any], removed: list[str]) -> None:
        with new_folder("changed_manifests") as folder:
            check_changed_manifest(model, data, changes, removed, folder)

    def parts(content: bytes, place: float, length: float) -> None:
        with new_folder("parts") as folder:
            check_part(model, data, content, place, length, folder)

    share = st.floats(0, 1, exclude_max=True)
    return {
        "rows": given(lines=LINES, packing=PACKINGS, chosen=SETTINGS)(rows),
        "files": given(lines=LINES, suffix=SUFFIXES, damage=DAMAGE, cut=CUT)(files),
        "raw": given(content=st.binary(max_size=300), suffix=SUFFIXES)(raw),
        "manifests": given(text=JSON_TEXT)(manifests),
        "changed_manifests": given(changes=CHANGES, removed=REMOVED)(changed),
        "parts": given(content=st.binary(max_size=50), place=share, length=share)(parts),
    }
