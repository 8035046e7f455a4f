"""The pipeline against an oracle that takes no short cut: the whole text through the tokenizer, the whole text through
transformers, one transcript and one answer option at a time, spans by the rules of the published page.

Toy transcripts have a tokenizer of their own and a token in front of every text, like Llama.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from support.scoring import (
    assert_same_logprobs,
    assert_same_scores,
    column_bytes,
    files,
    records,
    score,
)
from support.toy import (
    CONTEXT,
    Oracle,
    Toy,
    assert_options,
    assert_records,
    fitting,
    make_toy,
    responses,
    write_rows,
)

import psykern
from psykern import Run

CONDITIONS = pytest.mark.parametrize(
    ("protocol", "boundary"),
    [("exact", "joint"), ("exact", "split"), ("study", "joint")],
    ids=["exact-joint", "exact-split", "study"],
)


@CONDITIONS
def test_toy_records_equal_the_oracle(toy: Toy, tmp_path: Path, protocol: str, boundary: str) -> None:
    got = records(score(toy.model, toy.data, tmp_path, protocol=protocol, boundary=boundary))
    assert len(got) == len(toy.rows)
    for own, row in zip(got, toy.rows, strict=True):
        names = {(r["study"], r["experiment"], r["participant"]) for r in own}
        assert names == {(row["study"], row["experiment"], str(row["participant"]))}
        assert_records(own, toy.oracle.records(row["text"], protocol, boundary))


def test_toy_options_equal_the_oracle(toy: Toy, tmp_path: Path) -> None:
    for own, row in zip(records(score(toy.model, toy.data, tmp_path)), toy.rows, strict=True):
        given = row.get("options") or [None]
        for record in own:
            options = given if isinstance(given[0], str) else given[record["response_index"] % len(given)]
            if options:
                wanted = toy.oracle.options(row["text"], record["response_index"], options)
                assert_options(record, options, wanted)
            else:
                assert record["options"] is record["option_logprobs"] is record["option_index"] is None


def test_flags_of_toy_records(toy: Toy, toy_run: Run) -> None:
    ratings = [own for own in records(toy_run) if own[0]["study"] == "ratings"]
    minus = {record["flag"] for own in ratings for record in own if record["response"] == "-7"}
    assert minus >= {"straddles"}
    assert {own[0]["flag"].split(";")[-1] for own in ratings} == {"closing_mark"}  # options 1, 10, 100
    assert {own[1]["flag"] for own in ratings} <= {None, "straddles"}  # options 7, 1
    assert {record["flag"] for own in records(toy_run) for record in own if record["response"] == ""} == {"empty"}


@pytest.mark.parametrize("limit", [4, 7])
@pytest.mark.parametrize("source", ["observed", "observed-experiment"])
def test_observed_options_are_the_distinct_responses(toy: Toy, tmp_path: Path, source: str, limit: int) -> None:
    """Of a transcript, or of all of an experiment; blank ones do not count, and too many are none."""
    got = records(score(toy.model, toy.data, tmp_path, options=source, max_options=limit))
    seen: dict[tuple[str, ...], dict[str, None]] = {}
    keys = [(row["study"], row["experiment"]) for row in toy.rows]
    if source == "observed":
        keys = [(*key, str(i)) for i, key in enumerate(keys)]
    for key, row in zip(keys, toy.rows, strict=True):
        seen.setdefault(key, {}).update((m[1], None) for m in responses(row["text"]) if m[1].strip())
    assert max(map(len, seen.values())) in (5, 6, 7)  # of the words
    for key, own, row in zip(keys, got, toy.rows, strict=True):
        options = list(seen[key])
        if 2 <= len(options) <= limit:
            assert {tuple(record["options"]) for record in own} == {tuple(options)}
            assert_options(own[-1], options, toy.oracle.options(row["text"], len(own) - 1, options))
        else:
            assert {record["options"] for record in own} == {None}


def test_options_can_be_left_out(toy: Toy, tmp_path: Path) -> None:
    table = psykern.read_run(score(toy.model, toy.data, tmp_path, options="none").folder)
    for name in ("options", "option_logprobs", "option_log_softmax", "option_index"):
        assert table.column(name).null_count == len(table)


def test_is_argmax_takes_every_token_of_a_response(tmp_path: Path) -> None:
    """A model that always expects J: the embeddings share a direction, and J's row of the head is along it."""
    model = make_toy(tmp_path / "model", tie_word_embeddings=False)
    oracle = Oracle(model, tmp_path / "model")
    (letter,) = oracle.tokens("J", special=False).ids
    with torch.no_grad():
        model.model.embed_tokens.weight += 3
        model.lm_head.weight[letter] = model.model.norm.weight.sign()
    model.save_pretrained(tmp_path / "model")
    row = {"text": "You press <<J>> and <<JJ>> and <<JF>> and <<FJ>> and <<F>>.", "study": "s"}
    run = score(tmp_path / "model", write_rows(tmp_path / "rows.jsonl", [row]), tmp_path / "run")
    (own,) = records(run)
    assert [record["num_tokens"] for record in own] == [1, 2, 2, 2, 1]
    assert [record["is_argmax"] for record in own] == [True, True, False, False, False]
    assert_records(own, oracle.records(row["text"]))
    assert run.summary.accuracy == pytest.approx(0.4)


# Budgets, sharing, company, repetition


BUDGETS = {
    "wave-64": {"wave_tokens": 64},
    "wave-64-batch-64": {"wave_tokens": 64, "batch_tokens": 64},
    "wave-64-batch-7": {"wave_tokens": 64, "batch_tokens": 7},
    "batch-64": {"batch_tokens": 64},
    "share-all": {"min_share": 1},
    "share-all-wave-64": {"min_share": 1, "wave_tokens": 64, "batch_tokens": 64},
    "share-none": {"min_share": 10**6},
}


@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=BUDGETS)
def test_budgets_and_sharing_do_not_change_scores(
    toy: Toy, toy_run: Run, tmp_path: Path, budgets: dict[str, int]
) -> None:
    run = score(toy.model, toy.data, tmp_path, **budgets)
    assert_same_scores(psykern.read_run(run.folder), psykern.read_run(toy_run.folder))


def test_company_does_not_change_scores(toy: Toy, toy_run: Run, tmp_path: Path) -> None:
    alone = []
    for i, row in enumerate(toy.rows):
        data = write_rows(tmp_path / f"{i}.jsonl", [row])
        alone.append(psykern.read_run(score(toy.model, data, tmp_path / str(i)).folder))
    assert_same_scores(pa.concat_tables(alone), psykern.read_run(toy_run.folder))


def test_units_do_not_change_scores(toy: Toy, toy_run: Run, tmp_path: Path) -> None:
    run = score(toy.model, toy.data, tmp_path, unit_tokens=300)
    assert len(list((run.folder / "responses").iterdir())) > 3
    assert_same_scores(psykern.read_run(run.folder), psykern.read_run(toy_run.folder))
    assert run.manifest.counts.tokens == toy_run.manifest.counts.tokens
    assert run.summary.mean_nll == pytest.approx(toy_run.summary.mean_nll, rel=1e-12)


def test_equal_runs_give_equal_bytes(toy: Toy, toy_run: Run, tmp_path: Path) -> None:
    run = score(toy.model, toy.data, tmp_path)
    one, two = (psykern.read_run(r.folder) for r in (run, toy_run))
    for name in one.column_names:
        assert column_bytes(one, name) == column_bytes(two, name), name
    assert files(run.folder) == files(toy_run.folder)
    for file in files(run.folder) - {"manifest.json"}:  # it holds times
        assert (run.folder / file).read_bytes() == (toy_run.folder / file).read_bytes(), file


# Conditions


# Manifest, summary, plan


# Which rows and which part of them


def test_limit_takes_the_first_transcripts_of_each_study(toy: Toy, tmp_path: Path) -> None:
    got = records(score(toy.model, toy.data, tmp_path, limit=2))
    assert [(own[0]["study"], own[0]["participant"]) for own in got] == [
        ("bandit", "0"),
        ("bandit", "1"),
        ("ratings", "p0"),
        ("ratings", "p1"),
        ("words", "0"),
        ("words", "1"),
    ]


def test_studies_take_only_these(toy: Toy, tmp_path: Path) -> None:
    run = score(toy.model, toy.data, tmp_path, studies=("words", "bandit"))
    assert {own[0]["study"] for own in records(run)} == {"words", "bandit"}
    assert run.manifest.studies == ("bandit", "words")  # in order: how they were named is not what is scored


def test_a_function_call_prints_nothing(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(toy.model, toy.data, tmp_path, limit=1)
    assert capsys.readouterr() == ("", "")


def test_several_data_paths_and_folders(toy: Toy, toy_run: Run, tmp_path: Path) -> None:
    """Studies in files of their own, one of them in a folder, in any order: records come sorted by study."""
    rows = {s: [row for row in toy.rows if row["study"] == s] for s in ("bandit", "ratings", "words")}
    words = write_rows(tmp_path / "words.jsonl", rows["words"])
    write_rows(tmp_path / "folder/ratings.jsonl", rows["ratings"])
    write_rows(tmp_path / "folder/bandit.jsonl", rows["bandit"])
    run = score(toy.model, [words, tmp_path / "folder"], tmp_path / "run")
    assert psykern.read_run(run.folder).equals(psykern.read_run(toy_run.folder))
    assert [Path(file.path).stem for file in run.manifest.data] == ["bandit", "ratings", "words"]


def test_too_long_is_an_error_that_names_the_row(toy: Toy, short_context: Path, tmp_path: Path) -> None:
    with pytest.raises(
        psykern.PsykernError, match=rf"rows\.jsonl:1: bandit, participant 0: needs \d+ .* has {CONTEXT};"
    ):
        score(short_context, toy.data, tmp_path, options="none")


def test_too_long_can_be_skipped(toy: Toy, toy_run: Run, short_context: Path, tmp_path: Path) -> None:
    run = score(short_context, toy.data, tmp_path, options="none", over_length="skip")
    fits = [fitting(toy, row) == len(list(responses(row["text"]))) for row in toy.rows]
    assert 0 < sum(fits) < len(fits)
    assert run.manifest.counts.over_length_transcripts == fits.count(False)
    assert run.manifest.counts.transcripts == fits.count(True)
    assert run.manifest.counts.dropped_responses == 0
    kept = [own for own, fit in zip(records(toy_run), fits, strict=True) if fit]
    assert_same_logprobs(records(run), kept)


def test_too_long_can_be_truncated(toy: Toy, toy_run: Run, short_context: Path, tmp_path: Path) -> None:
    run = score(short_context, toy.data, tmp_path, options="none", over_length="truncate")
    kept = [own[: fitting(toy, row)] for own, row in zip(records(toy_run), toy.rows, strict=True)]
    got = records(run)
    assert [len(own) for own in got] == [len(own) for own in kept]
    assert run.manifest.counts.dropped_responses == sum(map(len, records(toy_run))) - sum(map(len, kept)) > 0
    assert run.manifest.counts.responses == sum(map(len, kept))
    assert run.manifest.counts.over_length_transcripts == 0
    assert_same_logprobs(got, kept)
