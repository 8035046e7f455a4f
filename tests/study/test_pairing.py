"""pairing.py: every refusal, and files that name pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.simulated_runs import Humans, Row, rows, write_run

from psykern import ComparisonError
from psykern.study.compare import compare
from psykern.study.models import BASE, StudyModel

HUMANS = Humans(participants=30)
MODELS = {
    "base": StudyModel("base", "F", "F1", 1.0, BASE, None),
    "tuned": StudyModel("tuned", "F", "F1", 1.0, "instruction", "base"),
}


# Refusals

Change = Callable[[list[Row], dict[str, object]], list[Row]]


def _settings(**values: object) -> Change:
    def change(records: list[Row], manifest: dict[str, object]) -> list[Row]:
        manifest.update(values)
        return records

    return change


REFUSED: dict[str, tuple[Change, str]] = {
    "data": (_settings(data=[{"hash": "e" * 64}]), r"data: tuned was scored on other files than base.*eeee"),
    "protocol": (_settings(protocol="study"), 'protocol: base has "exact", tuned has "study"'),
    "boundary": (_settings(boundary="split"), 'boundary: base has "joint", tuned has "split"'),
    "marks": (_settings(marks="drop"), 'marks: base has "keep", tuned has "drop"'),
    "options": (_settings(options="observed"), 'options: base has "given", tuned has "observed"'),
    "limit": (_settings(limit=5), "limit: base has null, tuned has 5"),
    "discrete": (_settings(discrete="[A-Z]"), r'discrete: base has null, tuned has "\[A-Z\]"'),
    "condition": (_settings(condition="chat"), r"base has no partner"),
    "participant": (
        lambda records, _: [r for r in records if (r["study"], r["participant"]) != ("beta", "7")],
        r"tuned lacks 1 of the 90 participants of base; the first: beta, experiment 'beta-1', participant '7'",
    ),
    "study": (lambda records, _: [r for r in records if r["study"] != "beta"], "tuned lacks 30 of the 90"),
    "more participants": (
        lambda records, _: [*records, records[0] | {"participant": "x"}],
        "base lacks 1 of the 91 participants of tuned",
    ),
    "response": (lambda records, _: records[1:], r"has \d+ responses in base and \d+ in tuned; .* in 1 participants"),
    "index": (
        lambda records, _: [records[0] | {"response_index": -1}, *records[1:]],
        "are numbered differently in base and tuned",
    ),
    "text": (
        lambda records, _: [records[0] | {"response": "other"}, *records[1:]],
        r"those of alpha, experiment 'alpha-0', participant '0' have other texts in base than in tuned",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_with_what_differs(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    manifest: dict[str, object] = {}
    post = change(rows(HUMANS), manifest)
    runs = [
        write_run(tmp_path / "base", "org/base", rows(HUMANS)),
        write_run(tmp_path / "tuned", "org/tuned", post, **manifest),
    ]
    with pytest.raises(ComparisonError, match=message):
        compare(runs, models=MODELS)


def test_under_the_studys_protocol_texts_may_differ_by_tokenizer(tmp_path: Path) -> None:
    post = [row | {"response": row["response"] + "!"} for row in rows(HUMANS)]
    runs = [
        write_run(tmp_path / "base", "org/base", rows(HUMANS), protocol="study"),
        write_run(tmp_path / "tuned", "org/tuned", post, protocol="study"),
    ]
    assert len(compare(runs, models=MODELS).pairs) == 1


FILES = [{"hash": digest * 64} for digest in "ab"]


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("tuned", [{}, {"protocol": "study"}], ids=["exact", "study"])
def test_files_that_were_read_in_another_order(tuned: dict[str, object], shared: int, tmp_path: Path) -> None:
    """Transcripts of one participant, who has some in each file, would be set against each other."""
    records, counts = rows(HUMANS), {"counts": {"shared_participants": shared}}
    runs = [
        write_run(tmp_path / name, name, records, data=files, **counts, **tuned)
        for name, files in (("base", FILES), ("tuned", FILES[::-1]))
    ]
    if not shared:
        assert compare(runs, models=MODELS).pairs[0].aggregate.difference.value == 0
        return
    with pytest.raises(ComparisonError, match=r"data: tuned read the files in another order than base, .* 2 partic"):
        compare(runs, models=MODELS)


def test_an_empty_path_is_not_the_folder_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_run(tmp_path / "base", "base", rows(HUMANS)))
    with pytest.raises(ComparisonError, match="runs: expected folders, got an empty string"):
        compare([""], unpaired=True)


def test_a_run_without_its_partner(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "Qwen/Qwen3-8B", rows(HUMANS))
    with pytest.raises(ComparisonError, match=r"Qwen3-8B has no partner: its base Qwen3-8B-Base .*not among the runs"):
        compare([run])
    base = write_run(tmp_path / "base", "Qwen/Qwen3-4B-Base", rows(HUMANS))
    with pytest.raises(ComparisonError, match=r"Qwen3-4B-Base has no partner: no run of a model.*1 more"):
        compare([base, run])
    unknown = write_run(tmp_path / "unknown", "me/mine", rows(HUMANS))
    with pytest.raises(ComparisonError, match=r"mine has no partner: which base.*--models"):
        compare([unknown])
    alone = compare([base, run, unknown], unpaired=True)
    assert (len(alone.runs), alone.pairs) == (3, ())


def test_the_same_model_twice(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), "Qwen/Qwen3-8B", rows(HUMANS)) for i in range(2)]
    with pytest.raises(ComparisonError, match="are both Qwen3-8B in condition plain"):
        compare(runs)


def test_revisions_of_a_published_model_have_its_base(tmp_path: Path) -> None:
    ids = ["Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B@main"]
    runs = [write_run(tmp_path / str(i), model_id, rows(HUMANS)) for i, model_id in enumerate(ids)]
    (pair,) = compare(runs, draws=50).pairs
    assert (pair.pair.base.label, pair.pair.post.label) == ("Qwen3-8B-Base", "Qwen3-8B")


@pytest.mark.parametrize("hashes", [("a", "a"), ("a", "b")], ids=["one-commit", "two-commits"])
def test_conditions_of_two_revisions(hashes: tuple[str, str], tmp_path: Path) -> None:
    """A branch and the commit that it stands for are one; other weights would pass for the effect of a condition."""
    ids = (("Qwen/Qwen3-8B@main", "plain"), ("Qwen/Qwen3-8B@v1", "chat"))
    runs = [
        write_run(tmp_path / condition, model_id, rows(HUMANS), condition=condition, model_hash=model_hash)
        for (model_id, condition), model_hash in zip(ids, hashes, strict=True)
    ]
    if hashes[0] == hashes[1]:
        assert len(compare(runs, draws=50).conditions) == 1
    else:
        with pytest.raises(ComparisonError, match=r"is of Qwen/Qwen3-8B@v1 and its plain run of Qwen/Qwen3-8B@main"):
            compare(runs)


# Files that describe pairs, models and domains


def pairs_file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "pairs.csv").write_text(text)
    return tmp_path / "pairs.csv"


def test_pairs_from_a_file(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, f"me/{name}", rows(HUMANS, seed=i)) for i, name in enumerate("abc")]
    text = f"base,post,kind\n{runs[0]},b,reasoning\nme/a,c,\n"
    comparison = compare(runs, pairs=pairs_file(tmp_path, text), draws=50)
    assert [(p.pair.base.label, p.pair.post.label, p.pair.kind) for p in comparison.pairs] == [
        ("a", "b", "reasoning"),
        ("a", "c", "other"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base,post\na,x\n", r"pairs.csv:2: post: expected one of the runs \(a, b, b \(chat\)\), got 'x'"),
        ("base,post\na,a\n", "pairs.csv:2: base and post are the same run"),
        ("base,post\na,b (chat)\n", r"pairs.csv:2: condition: a has plain, b \(chat\) has chat"),
        ("base,post\na,me/b\n", "could be any of"),
        ("from,to\na,b\n", "expected the columns base, post"),
        ("base,post\n", "at least one row"),
    ],
)
def test_a_pairs_file_that_makes_no_sense(text: str, message: str, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, f"me/{name}", rows(HUMANS)) for name in "ab"]
    runs.append(write_run(tmp_path / "chat", "me/b", rows(HUMANS), condition="chat"))
    with pytest.raises(ComparisonError, match=message):
        compare(runs, pairs=pairs_file(tmp_path, text))
