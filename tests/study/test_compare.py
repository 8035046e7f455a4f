"""compare.py: planted differences, and an independent calculation."""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import CONFIGS, make_model
from support.simulated_runs import Humans, Row, rows, write_run
from support.toy import make_toy

import psykern
from psykern import ComparisonError, Settings
from psykern.study.bootstrap import aggregate
from psykern.study.compare import compare
from psykern.study.finished import StudyResponses
from psykern.study.models import BASE, StudyModel
from psykern.study.results import Comparison, ParticipantTable, RunResult
from psykern.study.two_runs import _pair_study

HUMANS = Humans(participants=30)
MODELS = {
    "base": StudyModel("base", "F", "F1", 1.0, BASE, None),
    "tuned": StudyModel("tuned", "F", "F1", 1.0, "instruction", "base"),
}


def compare_two(tmp_path: Path, base: list[Row], post: list[Row], **arguments: object) -> Comparison:
    runs = [write_run(tmp_path / "base", "org/base", base), write_run(tmp_path / "tuned", "org/tuned", post)]
    return compare(runs, models=MODELS, **arguments)


# Numbers


def test_a_planted_loss_of_fit_has_the_right_sign_and_size(tmp_path: Path) -> None:
    comparison = compare_two(tmp_path, rows(HUMANS), rows(HUMANS, shift=0.3, seed=2))
    (pair,) = comparison.pairs
    mean = pair.aggregate
    assert mean.difference.value == pytest.approx(0.3, abs=0.01)
    assert mean.difference.low < 0.3 < mean.difference.high < 0.35
    assert mean.d.low > 0
    assert (pair.studies_base_wins, pair.sign_test) == (1.0, 0.25)  # 2 / 2^3
    assert mean.participants_base_wins > 0.95
    assert mean.accuracy_difference.value < 0
    assert math.isnan(comparison.pairs[0].studies[2].option_difference.value)  # the study without options


def test_mere_overconfidence_disappears_at_the_best_temperature(tmp_path: Path) -> None:
    comparison = compare_two(tmp_path, rows(HUMANS), rows(HUMANS, sharpness=3.0))
    mean = comparison.pairs[0].aggregate
    assert mean.option_difference.low > 0.1
    assert mean.rescaled_difference.value == pytest.approx(0, abs=1e-5)
    assert mean.entropy_difference.value < 0
    base, tuned = comparison.runs
    assert tuned.temperature == pytest.approx(3 * base.temperature, rel=1e-4)
    assert tuned.calibration.overconfidence > 0.1 > abs(base.calibration.overconfidence)


def test_numbers_against_plain_loops(tmp_path: Path) -> None:
    base, post = rows(HUMANS), rows(HUMANS, shift=0.1, seed=3)
    base[4]["logprob"] = base[4]["is_argmax"] = base[4]["entropy"] = None  # scored by one model alone: in no pair
    tables: dict[str, ParticipantTable] = {}

    def keep(result: RunResult, table: ParticipantTable) -> None:
        tables[result.named.label] = table

    comparison = compare_two(tmp_path, base, post, on_run=keep)
    result, (pair,) = comparison.runs[1], comparison.pairs
    for number, study in enumerate(HUMANS.studies):
        one = [-r["logprob"] for r in post if r["study"] == study]
        assert result.studies[number].nll == pytest.approx(np.mean(one))
        assert result.studies[number].nll_sd == pytest.approx(np.std(one, ddof=1))
        both = [(-a["logprob"], -b["logprob"]) for a, b in zip(base, post, strict=True)
                if a["study"] == study and a["logprob"] is not None]  # fmt: skip
        x, y = np.array(both).T
        row = pair.studies[number]
        assert row.responses == len(x)
        assert (row.base_nll, row.post_nll) == pytest.approx((x.mean(), y.mean()))
        d = (y.mean() - x.mean()) / np.sqrt((x.std(ddof=1) ** 2 + y.std(ddof=1) ** 2) / 2)
        assert row.d.value == pytest.approx(d)
    assert pair.aggregate.d.value == pytest.approx(np.mean([row.d.value for row in pair.studies]))
    scored = [-r["logprob"] for r in base if r["logprob"] is not None]
    assert comparison.runs[0].response_weighted_nll == pytest.approx(np.mean(scored))
    per_participant = defaultdict(list)
    for row in base:
        if row["logprob"] is not None:
            per_participant[row["study"], row["experiment"], row["participant"]].append(-row["logprob"])
    table = tables["base"]
    assert dict(zip(table.participants, table.nll, strict=True)) == pytest.approx(
        {key: np.mean(values) for key, values in per_participant.items()}
    )
    assert comparison.runs[0].participant_nll == pytest.approx(np.mean(table.nll))


def test_option_metrics_of_a_study_against_plain_loops(tmp_path: Path) -> None:
    records = rows(HUMANS)
    row = compare_two(tmp_path, records, rows(HUMANS, seed=2)).runs[0].studies[0]
    of_study = [r for r in records if r["study"] == "alpha"]
    q = [np.exp(r["option_log_softmax"]) for r in of_study]
    chosen = [p[r["option_index"]] for p, r in zip(q, of_study, strict=True)]
    assert row.option_responses == len(q)
    assert row.option_nll == pytest.approx(-np.mean(np.log(chosen)), rel=1e-6)
    assert row.uniform_nll == pytest.approx(math.log(3))
    assert row.pseudo_r2 == pytest.approx(1 - row.option_nll / math.log(3))
    assert row.option_accuracy == np.mean([p.argmax() == r["option_index"] for p, r in zip(q, of_study, strict=True)])
    assert row.option_entropy == pytest.approx(np.mean([-(p * np.log(p)).sum() for p in q]), rel=1e-6)
    assert row.brier == pytest.approx(
        np.mean([1 - 2 * c + (p**2).sum() for p, c in zip(q, chosen, strict=True)]), rel=1e-6
    )
    assert row.bits == pytest.approx(row.nll / math.log(2))


def test_equal_models_differ_by_nothing(tmp_path: Path) -> None:
    (pair,) = compare_two(tmp_path, rows(HUMANS), rows(HUMANS)).pairs
    estimate = pair.aggregate.difference
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    assert pair.aggregate.d.value == 0 and math.isnan(pair.sign_test)
    assert pair.studies_base_wins == 0  # a tie is no win


def null_study(rng: np.random.Generator, name: str, participants: int) -> tuple[StudyResponses, StudyResponses]:
    """One study under two models that fit equally well: each response is a little easier for one or the other, and so
    is each participant."""
    offsets = np.concatenate([[0], np.cumsum(rng.integers(5, 30, participants))])
    person = np.repeat(np.arange(participants), np.diff(offsets))
    rows_ = len(person)
    common = np.exp(0.4 * rng.standard_normal(rows_) + 0.4 * rng.standard_normal(participants)[person])

    def model() -> StudyResponses:
        own = 0.1 * rng.standard_normal(participants)[person] + 0.2 * rng.standard_normal(rows_)
        nothing = np.zeros(rows_, np.float32)
        none = np.empty(0, np.int64)
        known = np.zeros(rows_, bool)
        return StudyResponses(
            name, offsets, common + own, nothing, nothing, known, np.empty(0, np.float32), offsets[:1], none
        )

    return model(), model()


@pytest.mark.slow
def test_intervals_of_equal_models_cover_zero() -> None:
    """1,000 comparisons through the code that a real one goes through; 95 ± 3 % of the intervals cover zero."""
    rng = np.random.default_rng(7)
    covered = dict.fromkeys(("difference", "d"), 0)
    for _ in range(1000):
        found = [_pair_study(*null_study(rng, f"s{i}", 25), (math.nan, math.nan), 400) for i in range(4)]
        for name in covered:
            points = [getattr(row, name).value for row, _ in found]
            estimate = aggregate(points, [drawn[name] for _, drawn in found])
            covered[name] += estimate.low <= 0 <= estimate.high
    assert all(920 <= count <= 980 for count in covered.values()), covered


def test_order_of_files_changes_nothing(tmp_path: Path) -> None:
    base, post = rows(HUMANS), rows(HUMANS, shift=0.1)
    transcripts = defaultdict(list)
    for row in post:
        transcripts[row["study"], row["experiment"], row["participant"]].append(row)
    shuffled = list(transcripts.values())
    random.Random(1).shuffle(shuffled)
    one = compare_two(tmp_path / "one", base, post)
    two = compare_two(tmp_path / "two", base, [row for rows_ in shuffled for row in rows_])
    assert one.pairs[0].aggregate == two.pairs[0].aggregate


def test_effects_by_kind_generation_and_domain(tmp_path: Path) -> None:
    domains = {"alpha": "games", "beta": "games"}
    comparison = compare_two(tmp_path, rows(HUMANS), rows(HUMANS, shift=0.2), domains=domains)
    effects = {(e.group_by, e.group): e for e in comparison.effects}
    assert set(effects) == {("kind", "instruction"), ("generation", "F1"), ("domain", "games")}
    studies = comparison.pairs[0].studies
    assert effects["domain", "games"].d.value == pytest.approx((studies[0].d.value + studies[1].d.value) / 2)
    assert effects["kind", "instruction"].d == comparison.pairs[0].aggregate.d
    assert math.isnan(effects["kind", "instruction"].published)  # not one of the study's models


def test_the_studys_models_pair_and_show_its_numbers(tmp_path: Path) -> None:
    models = ("Qwen2.5-3B", "Qwen2.5-3B-Instruct", "Qwen2.5-VL-3B-Instruct", "Qwen2.5-7B", "Qwen2.5-7B-Instruct")
    runs = [write_run(tmp_path / name, f"Qwen/{name}", rows(HUMANS, seed=i)) for i, name in enumerate(models)]
    comparison = compare(runs, draws=50)
    names = [(p.pair.base.label, p.pair.post.label, p.pair.kind) for p in comparison.pairs]
    assert names == [
        ("Qwen2.5-3B", "Qwen2.5-3B-Instruct", "instruction"),
        ("Qwen2.5-3B", "Qwen2.5-VL-3B-Instruct", "vision"),
        ("Qwen2.5-7B", "Qwen2.5-7B-Instruct", "instruction"),
    ]
    effect = next(e for e in comparison.effects if (e.group_by, e.group) == ("generation", "Qwen2.5"))
    assert (effect.pairs, effect.published) == (2, 0.04)
    assert effect.d.value == pytest.approx(
        np.mean([p.aggregate.d.value for p in (comparison.pairs[0], comparison.pairs[2])])
    )


def test_plain_against_chat(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder / "plain", "org/tuned", rows(HUMANS))
    trimmed = [row | {"response": row["response"].lower()} for row in rows(HUMANS, shift=0.2)]  # a template may trim
    write_run(folder / "chat", "org/tuned", trimmed, condition="chat")
    base = write_run(tmp_path / "base", "org/base", rows(HUMANS))
    comparison = compare([folder, base], models=MODELS)
    assert [(p.pair.base.label, p.pair.post.label) for p in comparison.pairs] == [("base", "tuned")]
    (chat,) = comparison.conditions
    assert (chat.pair.base.label, chat.pair.post.label, chat.pair.kind) == ("tuned", "tuned (chat)", "chat")
    assert chat.aggregate.difference.value == pytest.approx(0.2, abs=0.01)


def test_persona_is_compared_on_the_participants_it_has(tmp_path: Path) -> None:
    """The others' numbers, however far off, change nothing."""
    known = {"0", "3", "4", "11"}
    plain = [row | ({} if row["participant"] in known else {"logprob": -50.0}) for row in rows(HUMANS)]
    told = [row for row in rows(HUMANS, shift=0.2) if row["participant"] in known and row["study"] != "beta"]
    same = [row for row in rows(HUMANS) if row["participant"] in known and row["study"] != "beta"]
    for name, other in (("all", plain), ("same", same)):
        write_run(tmp_path / name / "plain", "org/tuned", other)
        write_run(tmp_path / name / "persona", "org/tuned", told, condition="persona")
    results = []
    for name in ("all", "same"):
        comparison = compare([tmp_path / name], models=MODELS, unpaired=True)
        (pair,) = comparison.conditions
        results.append(([s.difference for s in pair.studies], [s.participants for s in pair.studies]))
    assert results[0] == results[1]
    assert results[0][1] == [4, 4]
    assert [value.value for value in results[0][0]] == pytest.approx([0.2, 0.2], abs=0.03)


def test_a_domains_file_without_its_columns(tmp_path: Path) -> None:
    (tmp_path / "domains.csv").write_text("name,domain\na,b\n")
    run = write_run(tmp_path / "run", "me/m", rows(HUMANS))
    with pytest.raises(ComparisonError, match="expected the columns study and domain"):
        compare([run], domains=tmp_path / "domains.csv", unpaired=True)


# Real runs


TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "head_dim": 16,
}


def up_to_a_response(row: Row, characters: int) -> Row:
    """The row with its text cut behind the first closing mark after so many characters."""
    end = row["text"].find(">>", characters)
    return row if end < 0 else row | {"text": row["text"][: end + 2]}


def test_the_study_aggregate_on_all_shared_studies(shared: Path, tmp_path: Path) -> None:
    """Two tiny models score a few cut transcripts of each of the 15 studies; the aggregate and d are calculated again
    from the records by plain Python, as the study's scripts do it."""
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted((shared / "psych").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            cut = [up_to_a_response(json.loads(line), 2500) for line, _ in zip(file, range(10), strict=False)]
        (data / f"{path.name.removesuffix('.jsonl.gz')}.jsonl").write_text("\n".join(map(json.dumps, cut)))
    make_toy(tmp_path / "base", **TINY)
    make_toy(tmp_path / "tuned", **TINY)
    make_model(tmp_path / "tuned", seed=1, vocab_size=512, **CONFIGS["qwen3"] | TINY)
    settings = Settings(device="cpu", options="observed")
    names = ("base", "tuned")
    folders = [psykern.score(tmp_path / name, data, tmp_path / f"run-{name}", settings).folder for name in names]
    comparison = compare(folders, models=MODELS, draws=200)

    nll: list[dict[str, list[float]]] = []
    for folder in folders:
        by_study = defaultdict(list)
        for row in psykern.read_run(folder, columns=["study", "logprob"]).to_pylist():
            if row["logprob"] is not None:
                by_study[row["study"]].append(-row["logprob"])
        nll.append(by_study)
    assert len(nll[0]) == 15
    means = [[sum(values) / len(values) for _, values in sorted(of.items())] for of in nll]
    for result, expected in zip(comparison.runs, means, strict=True):
        assert [row.nll for row in result.studies] == pytest.approx(expected)
        assert result.aggregate.nll == pytest.approx(sum(expected) / 15)
        summary = json.loads((result.named.run.path / "summary.json").read_text())
        assert result.aggregate.nll == pytest.approx(summary["mean_nll"])
        assert result.response_weighted_nll == pytest.approx(summary["response_weighted_nll"])
        assert result.aggregate.option_nll == pytest.approx(summary["mean_option_nll"], rel=1e-6)
        assert result.aggregate.accuracy == pytest.approx(summary["accuracy"])

    def sd(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))

    d = [
        (sum(post) / len(post) - sum(base) / len(base)) / math.sqrt((sd(base) ** 2 + sd(post) ** 2) / 2)
        for (_, base), (_, post) in zip(sorted(nll[0].items()), sorted(nll[1].items()), strict=True)
    ]
    assert comparison.pairs[0].aggregate.d.value == pytest.approx(sum(d) / 15)


def test_the_published_domain_table_of_the_demo_names_its_studies() -> None:
    from psykern import demo

    with demo.DOMAINS.open() as file:
        assert {row["study"] for row in csv.DictReader(file)} == {
            path.name.removesuffix(".jsonl.gz") for path in demo.SAMPLE.glob("*.jsonl.gz")
        }
