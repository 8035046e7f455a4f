"""records.py: scores to records, and the folder that holds a run."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import resource
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from psykern.core.errors import RowError, RunFolderError, Source
from psykern.core.types import EncodedTranscript, TargetScores, UnitInfo
from psykern.runs.folder import (
    Counts,
    DataFile,
    Manifest,
    RunFolder,
    UnitReport,
    iter_run,
    library_versions,
    peak_memory_bytes,
    read_run,
)
from psykern.scoring.table import SCHEMA, to_table

ROOT = Path(__file__).resolve().parents[2]


def encoded(
    num_tokens: list[int],
    options: list[tuple[str, ...] | None] | None = None,
    option_index: list[int] | None = None,
    branch_tokens: list[int] | None = None,
    branch_scored_tok: list[int] | None = None,
    responses: list[str] | None = None,
    participant: str = "p1",
) -> EncodedTranscript:
    """A transcript whose responses have ``num_tokens`` scored tokens; token ids do not matter here."""
    count = len(num_tokens)
    options = options or [None] * count
    num_options = [len(o or ()) for o in options]
    branch_tokens = branch_tokens or [1] * sum(num_options)
    starts = 5 + 3 * np.arange(count)
    return EncodedTranscript(
        study="study",
        experiment="study/exp1",
        participant=participant,
        source=Source("data.jsonl", 1),
        token_ids=np.zeros(5 + 3 * count + sum(num_tokens), np.int32),
        responses=tuple(responses or [f"r{i}" for i in range(count)]),
        spans_tok=np.stack([starts, starts + num_tokens], axis=1).astype(np.int32),
        flags=tuple("empty" if n == 0 else None for n in num_tokens),
        options=tuple(options),
        option_index=np.array(option_index or [-1] * count, np.int32),
        branch_response=np.repeat(np.arange(count), num_options).astype(np.int32),
        branch_parent_tok=np.repeat(starts, num_options).astype(np.int32),
        branch_scored_tok=np.array(branch_scored_tok or [0] * len(branch_tokens), np.int32),
        branch_offsets=np.concatenate([[0], np.cumsum(branch_tokens)]).astype(np.int64),
        branch_token_ids=np.zeros(sum(branch_tokens), np.int32),
        num_dropped=0,
    )


def target_scores(logprob: list[float], is_argmax: list[bool] | None = None) -> TargetScores:
    """Scores whose entropies are 0.5, 1.5, 2.5, …"""
    count = len(logprob)
    return TargetScores(
        logprob=np.array(logprob, np.float32),
        is_argmax=np.array(is_argmax if is_argmax is not None else [True] * count, bool),
        entropy=np.arange(count, dtype=np.float32) + 0.5,
    )


def random_transcripts(rng: np.random.Generator, count: int) -> tuple[list[EncodedTranscript], TargetScores]:
    """Transcripts with empty responses, no responses, no options, and branches whose first tokens are not scored."""
    transcripts = []
    for i in range(count):
        num_tokens = rng.integers(0, 4, rng.integers(0, 6)).tolist()
        options = [
            tuple(f"o{k}" for k in range(n)) if (n := int(rng.integers(0, 4))) else None for _ in range(len(num_tokens))
        ]
        num_branches = sum(len(o or ()) for o in options)
        unscored = rng.integers(0, 3, num_branches)
        transcripts.append(
            encoded(
                num_tokens,
                options,
                option_index=[int(rng.integers(-1, len(o or ()))) for o in options],
                branch_tokens=(unscored + rng.integers(1, 4, num_branches)).tolist(),
                branch_scored_tok=unscored.tolist(),
                participant=f"p{i}",
            )
        )
    targets = sum(int(np.diff(t.spans_tok).sum()) for t in transcripts)
    targets += sum(int((np.diff(t.branch_offsets) - t.branch_scored_tok).sum()) for t in transcripts)
    return transcripts, target_scores((-5 * rng.random(targets)).tolist(), (rng.random(targets) < 0.7).tolist())


def records_by_loop(transcripts: list[EncodedTranscript], scores: TargetScores) -> list[dict[str, object]]:
    """The same records, one target at a time."""
    targets = iter(list(zip(scores.logprob.tolist(), scores.is_argmax.tolist(), scores.entropy.tolist(), strict=True)))
    rows = []
    for t in transcripts:
        for index, (start, end) in enumerate(t.spans_tok.tolist()):
            mine = [next(targets) for _ in range(start, end)]
            rows.append(
                {
                    "study": t.study,
                    "experiment": t.experiment,
                    "participant": t.participant,
                    "response_index": index,
                    "response": t.responses[index],
                    "num_tokens": len(mine),
                    "logprob": sum(m[0] for m in mine) if mine else None,
                    "is_argmax": all(m[1] for m in mine) if mine else None,
                    "entropy": mine[0][2] if mine else None,
                    "options": None if t.options[index] is None else list(t.options[index]),
                    "option_logprobs": None,
                    "option_log_softmax": None,
                    "option_index": None if t.option_index[index] < 0 else int(t.option_index[index]),
                    "flag": t.flags[index],
                }
            )
    first = 0
    for t in transcripts:
        scored = (np.diff(t.branch_offsets) - t.branch_scored_tok).tolist()
        for response, count in zip(t.branch_response.tolist(), scored, strict=True):
            row = rows[first + response]
            row["option_logprobs"] = [*(row["option_logprobs"] or []), sum(next(targets)[0] for _ in range(count))]
        first += len(t.responses)
    for row in rows:
        if row["option_logprobs"] is not None:
            logprobs = np.array(row["option_logprobs"])
            row["option_log_softmax"] = (logprobs - np.log(np.exp(logprobs).sum())).tolist()
    return rows


def manifest(**changes: object) -> Manifest:
    made = Manifest(
        model_id="tiny",
        model_hash="a1",
        tokenizer_hash="b2",
        data=(DataFile("data.jsonl", "c3", 10),),
        protocol="exact",
        condition="plain",
        discrete=None,
        chat_template_hash=None,
        boundary="joint",
        options="given",
        max_options=26,
        over_length="error",
        limit=None,
        studies=("study",),
        versions=library_versions("0.1.0"),
        device="cpu",
        dtype="float32",
        backend="reference",
        wave_tokens=4096,
        batch_tokens=256,
        min_share=32,
        unit_tokens=1000,
        counts=Counts(1, 2, 2, 30, 20, 0, 0, 0),
        seconds={"read": 0.5, "run": 2.0},
        tokens_per_second=15.0,
        responses_per_second=1.0,
        peak_memory_bytes=peak_memory_bytes(),
        peak_device_bytes=None,
        gpu_idle_share=None,
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:02+00:00",
    )
    return dataclasses.replace(made, **changes)


def test_record_of_two_tokens_and_two_options() -> None:
    transcript = encoded([2], [("A", "B")], [1], branch_tokens=[1, 3], branch_scored_tok=[0, 1])
    scores = target_scores([-0.25, -0.5, -1.0, -0.75, -0.25], [True, False, True, True, True])
    (row,) = to_table([transcript], scores).to_pylist()
    log_softmax = row.pop("option_log_softmax")
    assert log_softmax == pytest.approx([-np.log(2)] * 2, abs=1e-15)  # both options come to -1
    assert row == {
        "study": "study",
        "experiment": "study/exp1",
        "participant": "p1",
        "response_index": 0,
        "response": "r0",
        "num_tokens": 2,
        "logprob": -0.75,
        "is_argmax": False,
        "entropy": 0.5,
        "options": ["A", "B"],
        "option_logprobs": [-1.0, -1.0],
        "option_index": 1,
        "flag": None,
    }


@pytest.mark.parametrize("num_tokens", [[0], [0, 1], [1, 0], [1, 0, 0, 1], [0, 2, 0]], ids=str)
def test_empty_response_has_null_scores(num_tokens: list[int]) -> None:
    rows = to_table([encoded(num_tokens)], target_scores([-1.0] * sum(num_tokens))).to_pylist()
    assert [row["num_tokens"] for row in rows] == num_tokens
    assert [row["logprob"] for row in rows] == [-float(n) if n else None for n in num_tokens]
    assert [row["is_argmax"] for row in rows] == [True if n else None for n in num_tokens]
    assert [row["entropy"] is None for row in rows] == [n == 0 for n in num_tokens]
    assert [row["flag"] for row in rows] == ["empty" if n == 0 else None for n in num_tokens]


def test_transcripts_without_responses_have_no_rows() -> None:
    transcripts = [encoded([]), encoded([1, 1], participant="p2"), encoded([]), encoded([1], participant="p3")]
    table = to_table(transcripts, target_scores([-1.0, -2.0, -3.0]))
    assert table["participant"].to_pylist() == ["p2", "p2", "p3"]
    assert table["response_index"].to_pylist() == [0, 1, 0]
    assert table["logprob"].to_pylist() == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("transcripts", [[], [encoded([])]], ids=["no transcript", "no response"])
def test_nothing_is_an_empty_table(transcripts: list[EncodedTranscript]) -> None:
    table = to_table(transcripts, target_scores([]))
    assert table.schema == SCHEMA
    assert table.num_rows == 0


def test_option_log_softmax_is_stable_far_from_zero() -> None:
    transcript = encoded([1, 1], [("A", "B"), ("A",)], [0, 0])
    table = to_table([transcript], target_scores([-1.0, -1.0, -5000.0, -5001.0, -9000.0]))
    first, second = table["option_log_softmax"].to_pylist()
    assert first == pytest.approx([-np.log1p(np.exp(-1.0)), -1.0 - np.log1p(np.exp(-1.0))], abs=1e-12)
    assert second == [0.0]


def test_sum_is_float64() -> None:
    logprob = [-1000.0, *[-1e-5] * 100]  # each small one is lost in float32
    (row,) = to_table([encoded([101])], target_scores(logprob)).to_pylist()
    assert row["logprob"] == pytest.approx(-1000.001, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_random_transcripts_equal_a_plain_loop(seed: int) -> None:
    transcripts, scores = random_transcripts(np.random.default_rng(seed), 60)
    rows = to_table(transcripts, scores).to_pylist()
    expected = records_by_loop(transcripts, scores)
    assert any(row["logprob"] is None for row in expected) and any(row["options"] is None for row in expected)
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for column in ("logprob", "option_logprobs", "option_log_softmax"):
            assert row.pop(column) == pytest.approx(other.pop(column), abs=1e-12)
        assert row == other


def test_real_responses_come_through_unchanged(shared: Path) -> None:
    with gzip.open(shared / "psych" / "guenther2023associations_individual.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    responses = [re.findall("<<(.*?)>>", text) for text in texts]
    transcripts = [encoded([1] * len(r), responses=r, participant=str(i)) for i, r in enumerate(responses)]
    total = sum(map(len, responses))
    table = to_table(transcripts, target_scores((-np.arange(float(total))).tolist()))
    assert total > 1000
    assert table["response"].to_pylist() == [r for of_transcript in responses for r in of_transcript]
    assert table["logprob"].to_pylist() == (-np.arange(float(total))).tolist()


@pytest.mark.parametrize("count", [2, 4], ids=["too few", "too many"])
def test_scores_of_other_transcripts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected 3 targets.*got {count}"):
        to_table([encoded([3])], target_scores([-1.0] * count))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_response": np.array([1, 0], np.int32)}, "study, p1: expected one branch per option"),
        ({"branch_scored_tok": np.array([0, 1], np.int32)}, "at least one scored token"),
        ({"option_index": np.array([-1, 1], np.int32)}, "option_index"),
    ],
    ids=["wrong order", "nothing scored", "no such option"],
)
def test_branches_that_do_not_fit_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    transcript = dataclasses.replace(encoded([1, 1], [("A",), ("B",)]), **changes)
    targets = 4 - int(transcript.branch_scored_tok.sum())
    with pytest.raises(ValueError, match=message):
        to_table([transcript], target_scores([-1.0] * targets))


def unit(index: int = 0, key: str = "k", study: str = "study") -> UnitInfo:
    return UnitInfo(index, study, key, 100)


def begin(path: Path, resume: bool = True, **changes: object) -> RunFolder:
    return RunFolder.open(path, manifest(finished=None, **changes), resume=resume)


def report(*rejects: RowError, tokens: int = 0) -> UnitReport:
    return UnitReport(Counts(tokens=tokens, rejects=len(rejects)), rejects, {"study": [1.0, 0.1, 1 / 3]})


def test_parts_are_numbered_and_read_back_in_order(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    tables = [to_table(*random_transcripts(np.random.default_rng(seed), 20)) for seed in range(3)]
    names = [run.write_part(unit(i), table, report()) for i, table in reversed(list(enumerate(tables)))]
    assert [name[:12] for name in names] == ["part-000002-", "part-000001-", "part-000000-"]
    assert read_run(tmp_path / "run").equals(pa.concat_tables(tables))
    assert sum(batch.num_rows for batch in iter_run(tmp_path / "run")) == sum(table.num_rows for table in tables)
    some = read_run(tmp_path / "run", ["options", "study"])
    assert some.column_names == ["options", "study"]
    assert some["options"].to_pylist() == pa.concat_tables(tables)["options"].to_pylist()
    metadata = pq.ParquetFile(tmp_path / "run" / "responses" / names[0]).metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    parts = []
    for name in ("one", "two"):
        table = to_table(*random_transcripts(np.random.default_rng(0), 50))
        part = begin(tmp_path / name).write_part(unit(), table, report(tokens=3))
        parts.append((part, (tmp_path / name / "responses" / part).read_bytes()))
    assert parts[0] == parts[1]


def test_a_parts_name_follows_from_unit_model_and_settings(tmp_path: Path) -> None:
    one = begin(tmp_path / "one")
    names = {
        one.part_name(unit()),
        one.part_name(unit(index=1)),
        one.part_name(unit(key="other")),
        begin(tmp_path / "model", model_hash="a2").part_name(unit()),
        begin(tmp_path / "protocol", protocol="study").part_name(unit()),
        begin(tmp_path / "data", data=(DataFile("data.jsonl", "c4", 10),)).part_name(unit()),
    }
    assert len(names) == 6
    moved = begin(tmp_path / "moved", data=(DataFile("elsewhere.jsonl", "c3", 10),), model_id="copy", wave_tokens=9)
    assert moved.part_name(unit()) == one.part_name(unit())


def test_part_with_other_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SCHEMA"):
        begin(tmp_path / "run").write_part(unit(), SCHEMA.empty_table().drop(["flag"]), report())


def test_a_run_that_goes_on_knows_its_parts(tmp_path: Path) -> None:
    run = begin(tmp_path)
    bad = RowError(Source("a.jsonl", 3), 'marks are nested: "<<a<<"\nat 7')
    run.write_part(unit(0), SCHEMA.empty_table(), report(bad, tokens=3))
    run.write_part(unit(2), SCHEMA.empty_table(), report(tokens=4))
    again = begin(tmp_path, started="2027-01-01T00:00:00+00:00")
    assert again.manifest["started"] == "2026-01-01T00:00:00+00:00"
    units = [unit(i) for i in range(3)]
    assert [again.has(u) for u in units] == [True, False, True]
    first, second = again.reports(units)
    assert (first.counts, second.counts) == (Counts(tokens=3, rejects=1), Counts(tokens=4))
    assert first.sums == {"study": [1.0, 0.1, 1 / 3]}  # to the last bit
    assert [(e.source, e.reason) for e in first.rejects] == [(bad.source, bad.reason)]
    assert not again.has(unit(0, key="other rows"))


def test_a_damaged_part_counts_as_absent(tmp_path: Path) -> None:
    run = begin(tmp_path)
    part = tmp_path / "responses" / run.write_part(unit(), SCHEMA.empty_table(), report())
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    again = begin(tmp_path)
    assert not again.has(unit())
    again.write_part(unit(), SCHEMA.empty_table(), report())
    assert part.read_bytes() == whole


def test_what_another_process_wrote_is_seen(tmp_path: Path) -> None:
    one, two = begin(tmp_path), begin(tmp_path)
    two.write_part(unit(), SCHEMA.empty_table(), report())
    assert not one.has(unit())
    one.look_again()
    assert one.has(unit())


def test_run_without_responses_can_be_read(tmp_path: Path) -> None:
    begin(tmp_path).finish(manifest(), {}, [])
    table = read_run(tmp_path)
    assert (table.schema, table.num_rows) == (SCHEMA, 0)


def test_folder_may_exist_if_it_is_empty(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["manifest.json"]


def test_non_empty_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (True, False):
        with pytest.raises(RunFolderError, match=r"expected a new or empty folder.*holds notes\.txt"):
            begin(tmp_path, resume)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    begin(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    other = {"protocol": "study", "limit": 5, "data": (DataFile("data.jsonl", "c4", 10),)}
    with pytest.raises(RunFolderError) as raised:
        begin(tmp_path, **other)
    for part in (
        'protocol: "exact" there, "study" here',
        "limit: null there, 5 here",
        'data: ["c3"] there, ["c4"] here',
    ):
        assert part in str(raised.value)
    assert "model_hash" not in str(raised.value)
    with pytest.raises(RunFolderError, match=r"new or empty folder.*--resume.*manifest\.json"):
        begin(tmp_path, resume=False)
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"data": 3}', '{"data": [3]}', "[" * 100_000],
    ids=["empty", "open", "list", "no data", "data number", "file number", "deep"],
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"manifest\.json: cannot be read as a run's manifest"):
        begin(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == content


@pytest.mark.parametrize("name", ["started", "wave_tokens", "batch_tokens"])
@pytest.mark.parametrize("value", [None, True, 0, -1, 1.5, [], 2**31])
def test_a_run_does_not_go_on_with_what_is_no_budget_or_start(tmp_path: Path, name: str, value: object) -> None:
    begin(tmp_path)
    began = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(began | {name: value}))
    with pytest.raises(RunFolderError, match=rf"cannot be read as a run's manifest: ValueError: {name}: expected"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("below", "message"),
    [("file", "expected a folder.*got a file"), ("file/run", "cannot be written: Not a directory")],
    ids=["is a file", "below a file"],
)
def test_place_that_cannot_be_a_folder_is_refused(tmp_path: Path, below: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=message) as raised:
        begin(tmp_path / below)
    assert str(tmp_path / below) in str(raised.value)


def test_full_disk_leaves_no_part(tmp_path: Path) -> None:
    run = begin(tmp_path)
    table = to_table(*random_transcripts(np.random.default_rng(0), 200))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a write beyond 1,000 bytes fails as on a full disk
    try:
        with pytest.raises(RunFolderError, match=r"part-000000-\w+\.parquet: cannot be written"):
            run.write_part(unit(), table, report())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "responses").iterdir()) == []
    assert not run.has(unit())
    run.write_part(unit(), table, report())
    assert read_run(tmp_path).num_rows == table.num_rows


def test_interrupted_write_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    run = begin(tmp_path)
    monkeypatch.setattr("psykern.core.folder.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.write_part(unit(), SCHEMA.empty_table(), report())
    assert list((tmp_path / "responses").iterdir()) == []


def test_rejects_are_lines_of_json(tmp_path: Path) -> None:
    run = begin(tmp_path)
    rejects = [
        RowError(Source("a.jsonl", 3), 'marks are nested: "<<a<<"\nat 7'),
        RowError(Source("b.zip!prompts\udcff.jsonl", 4), "no text"),  # a file name that is not UTF-8
    ]
    run.finish(manifest(), {}, rejects)
    lines = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": "a.jsonl", "line": 3, "reason": 'marks are nested: "<<a<<"\nat 7'},
        {"file": "b.zip!prompts\udcff.jsonl", "line": 4, "reason": "no text"},
    ]


def test_what_cannot_be_written_at_the_end_is_an_error(tmp_path: Path) -> None:
    run = begin(tmp_path)
    (tmp_path / "rejects.jsonl").mkdir()
    with pytest.raises(RunFolderError, match=r"rejects\.jsonl: cannot be written: Is a directory"):
        run.finish(manifest(), {}, [RowError(Source("a.jsonl", 3), "no text")])
    assert json.loads((tmp_path / "manifest.json").read_text())["finished"] is None


def test_manifest_holds_every_field(tmp_path: Path) -> None:
    begin(tmp_path).finish(manifest(), {}, [])
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert list(written) == [field.name for field in dataclasses.fields(Manifest)]
    assert written["data"] == [{"path": "data.jsonl", "hash": "c3", "bytes": 10}]
    assert written["counts"]["computed_tokens"] == 20
    assert written["seconds"] == {"read": 0.5, "run": 2.0}
    assert written["versions"]["pyarrow"] == pa.__version__
    assert written["versions"]["psykern"] == "0.1.0"
    assert not (tmp_path / "rejects.jsonl").exists()


def test_json_has_no_nan(tmp_path: Path) -> None:
    summary = {"mean_nll": float("nan"), "studies": ({"scored": np.int64(3), "nll": [float("-inf"), 0.5]},)}
    begin(tmp_path).finish(manifest(tokens_per_second=float("inf"), seconds={"run": np.float32("nan")}), summary, [])

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    written = json.loads((tmp_path / "manifest.json").read_text(), parse_constant=fail)
    assert (written["tokens_per_second"], written["seconds"]) == (None, {"run": None})
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=fail)
    assert summary == {"mean_nll": None, "studies": [{"scored": 3, "nll": [None, 0.5]}]}


def test_library_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psykern.runs.folder.LIBRARIES", ("numpy", "no-such-library"))
    assert library_versions("1.2") == {
        "psykern": "1.2",
        "python": sys.version.split()[0],
        "numpy": np.__version__,
    }


def test_peak_memory_is_in_bytes() -> None:
    block = np.ones(25_000_000)  # 200 MB that are touched
    assert block.nbytes < peak_memory_bytes() < 2**37


@pytest.mark.parametrize("make", [None, "responses"], ids=["no folder", "no part"])
def test_folder_without_parts_is_an_error(tmp_path: Path, make: str | None) -> None:
    if make:
        (tmp_path / make).mkdir()
    with pytest.raises(RunFolderError, match="found no part"):
        read_run(tmp_path)


def test_damaged_part_is_named(tmp_path: Path) -> None:
    table = to_table(*random_transcripts(np.random.default_rng(0), 20))
    part = tmp_path / "responses" / begin(tmp_path).write_part(unit(), table, report())
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(RunFolderError, match=r"part-000000-\w+\.parquet: cannot be read"):
        read_run(tmp_path)


def test_foreign_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "responses").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "responses" / "part-00000.parquet")
    with pytest.raises(RunFolderError, match=r"part-00000\.parquet: expected the columns of a run, got \['text'\]"):
        read_run(tmp_path)
