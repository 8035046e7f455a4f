"""The pipeline against an oracle that takes no short cut: the whole text through the tokenizer, the whole text through
transformers, one transcript and one answer option at a time, spans by the rules of the published page.

Toy transcripts have a tokenizer of their own and a token in front of every text, like Llama; the real ones come with
Qwen3's tokenizer from the shared data folder.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from support.toy import (
    CONTEXT,
    Oracle,
    Row,
    Toy,
    assert_options,
    assert_records,
    by_transcript,
    expected,
    fitting,
    in_bytes,
    make_toy,
    make_toy_data,
    responses,
    write_rows,
)
from torch.utils.flop_counter import FlopCounterMode

import psykern
from psykern import Run, Settings
from psykern.engine import engine

pipeline = importlib.import_module("psykern.runs.run")  # the package's attribute of that name is the function

INVARIANCE = 1e-5  # nats, between budgets and batch mates


# What the tests run on


# The oracle


# Toy transcripts: the whole pipeline, without the shared folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy_data(tmp_path_factory.mktemp("toy"))


def score(model: Path, data: Path | Sequence[Path], out: Path, **settings: Any) -> Run:
    return psykern.score(model, data, out, Settings(device="cpu", **settings))


def records(run: Run) -> list[list[Row]]:
    return by_transcript(psykern.read_run(run.folder))


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


def assert_no_close_call(oracle: Oracle, rows: Sequence[Row], protocol: str = "exact") -> None:
    """That ``assert_same_scores`` may compare ``is_argmax``: no rounding can choose another token."""
    for row in rows:
        assert not any(record.is_close_call for record in oracle.records(row["text"], protocol)), row["text"]


def test_the_toys_tokens_are_no_close_calls(toy: Toy) -> None:
    assert_no_close_call(toy.oracle, toy.rows)


def assert_same_scores(one: pa.Table, two: pa.Table) -> None:
    for name in one.column_names:
        left, right = one.column(name), two.column(name)
        if pa.types.is_list(left.type):
            assert left.is_null().equals(right.is_null())
            left, right = pc.list_flatten(left), pc.list_flatten(right)
        if pa.types.is_floating(left.type):
            assert left.is_null().equals(right.is_null()), name
            difference = np.abs(left.drop_null().to_numpy() - right.drop_null().to_numpy())
            assert difference.max(initial=0) <= INVARIANCE, name
        else:
            assert left.equals(right), name


BUDGETS = {
    "wave-64": {"wave_tokens": 64},
    "wave-64-batch-64": {"wave_tokens": 64, "batch_tokens": 64},
    "wave-64-batch-7": {"wave_tokens": 64, "batch_tokens": 7},
    "batch-64": {"batch_tokens": 64},
    "share-all": {"min_share": 1},
    "share-all-wave-64": {"min_share": 1, "wave_tokens": 64, "batch_tokens": 64},
    "share-none": {"min_share": 10**6},
}


@pytest.fixture(scope="module")
def toy_run(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return score(toy.model, toy.data, tmp_path_factory.mktemp("toy-run"))


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
    assert run.summary.mean_nll == pytest.approx(toy_run.summary.mean_nll, abs=INVARIANCE)


def test_equal_runs_give_equal_bytes(toy: Toy, toy_run: Run, tmp_path: Path) -> None:
    run = score(toy.model, toy.data, tmp_path)
    one, two = (psykern.read_run(r.folder) for r in (run, toy_run))
    for name in one.column_names:
        assert column_bytes(one, name) == column_bytes(two, name), name
    assert files(run.folder) == files(toy_run.folder)
    for file in files(run.folder) - {"manifest.json"}:  # it holds times
        assert (run.folder / file).read_bytes() == (toy_run.folder / file).read_bytes(), file


def assert_same_logprobs(one: Sequence[Sequence[Row]], two: Sequence[Sequence[Row]]) -> None:
    """Nulls where the other has nulls."""
    left, right = (np.array([r["logprob"] for own in of for r in own], dtype=np.float64) for of in (one, two))
    np.testing.assert_allclose(left, right, rtol=0, atol=INVARIANCE)


def column_bytes(table: pa.Table, name: str) -> list[bytes]:
    buffers = table.column(name).combine_chunks().buffers()
    return [buffer.to_pybytes() for buffer in buffers if buffer is not None]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Conditions

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"


@pytest.fixture(scope="module")
def talking(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy model with a chat template, and rows of which two in three say something of the participant."""
    folder = shutil.copytree(toy.model, tmp_path_factory.mktemp("talking") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    known: list[Row] = [{"age": 24, "sex": "F"}, {"age": 999, "PHQ": "N/A"}, {"phq8": 3.0}]
    rows = [row | known[i % 3] for i, row in enumerate(toy.rows)]
    return replace(toy, model=folder, rows=rows, data=write_rows(folder.parent / "rows.jsonl", rows))


def chat_text(row: Row) -> tuple[str, list[tuple[int, int]]]:
    """A row in the toy template, and the characters of its responses."""
    text, places = "", []
    for number, piece in enumerate(re.split("<<|>>", row["text"])):
        if number % 2:
            text += "assistant: "
            places.append((len(text), len(text) + len(piece)))
            text += f"{piece}\n\n"
        elif piece:
            text += f"user: {piece}\n\n"
    return text, places


def test_chat_records_equal_the_oracle(talking: Toy, tmp_path: Path) -> None:
    got = records(score(talking.model, talking.data, tmp_path, condition="chat"))
    for own, row in zip(got, talking.rows, strict=True):
        text, places = chat_text(row)
        tokens = talking.oracle.tokens(text, special=False)
        spans = [tokens.overlapping(*in_bytes(text, place)) for place in places]
        scores = talking.oracle.rows(tokens.ids, sorted({i for of in spans for i in of}))
        wanted = [expected(text[a:b], [scores[i] for i in of]) for (a, b), of in zip(places, spans, strict=True)]
        assert_records(own, wanted)


def test_chat_options_equal_the_oracle(talking: Toy, tmp_path: Path) -> None:
    """Each option in the response's place; where one begins another, with the line break behind the turn."""
    got = records(score(talking.model, talking.data, tmp_path, condition="chat"))
    compared = 0
    for own, row in zip(got, talking.rows, strict=True):
        text, places = chat_text(row)
        for record, (a, b) in zip(own[:4], places, strict=False):
            logprobs = []
            for option in record["options"] or ():
                changed = f"{text[:a]}{option}{text[b:]}"
                mark = 2 if "closing_mark" in (record["flag"] or "") else 0
                tokens = talking.oracle.tokens(changed, special=False)
                of = tokens.overlapping(*in_bytes(changed, (a, a + len(option) + mark)))
                logprobs.append(math.fsum(s.logprob for s in talking.oracle.rows(tokens.ids, of).values()))
            if logprobs:
                assert_options(record, record["options"], logprobs)
                compared += 1
    assert compared > 20


def test_persona_records_are_those_of_the_interview_and_the_text(talking: Toy, tmp_path: Path) -> None:
    run = score(talking.model, talking.data, tmp_path / "run", condition="persona")
    age = "Interviewer: What is your age?\nInterviewee: 24.0\n\n"
    gender = "Interviewer: What is your gender?\nInterviewee: female\n\n"
    fronts = [age + gender, "", "Interviewer: What is your PHQ-8 score?\nInterviewee: 3\n\n"]
    told = [row | {"text": fronts[i % 3] + row["text"]} for i, row in enumerate(talking.rows) if fronts[i % 3]]
    other = score(talking.model, write_rows(tmp_path / "told.jsonl", told), tmp_path / "plain")
    one, two = psykern.read_run(run.folder), psykern.read_run(other.folder)
    assert_no_close_call(talking.oracle, told)
    assert_same_scores(one, two)
    assert run.manifest.condition == "persona"
    assert run.manifest.counts.without_metadata_transcripts == len(talking.rows) - len(told)


@pytest.mark.parametrize("protocol", ["exact", "study"])
def test_discrete_responses_are_scored_in_a_text_where_the_others_have_no_marks(
    toy: Toy, tmp_path: Path, protocol: str
) -> None:
    run = score(toy.model, toy.data, tmp_path / "run", discrete="[A-Z]", options="observed", protocol=protocol)
    rows = [
        {k: v for k, v in row.items() if k != "options"}
        | {"text": re.sub("<<(.*?)>>", lambda m: m[0] if re.fullmatch("[A-Z]", m[1]) else m[1], row["text"])}
        for row in toy.rows
    ]
    wanted = score(
        toy.model, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "other", options="observed", protocol=protocol
    )
    assert_no_close_call(toy.oracle, rows, protocol)
    assert_same_scores(psykern.read_run(run.folder), psykern.read_run(wanted.folder))
    assert run.manifest.discrete == "[A-Z]" and run.manifest.counts.responses == wanted.manifest.counts.responses > 0


def test_observed_options_of_experiments_are_discrete_too(toy: Toy, tmp_path: Path) -> None:
    run = score(toy.model, toy.data, tmp_path, discrete="yes|end|first", options="observed-experiment")
    table = psykern.read_run(run.folder).to_pylist()
    assert {row["study"] for row in table} == {"words"}
    assert {tuple(sorted(row["options"])) for row in table} == {("end", "first", "yes")}


def test_conditions_share_one_load_and_score_as_alone(
    talking: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    model = pipeline.Model

    def load(*arguments: Any, **more: Any) -> Any:
        loads.append(arguments)
        return model(*arguments, **more)

    monkeypatch.setattr(pipeline, "Model", load)
    names = ("persona", "plain", "chat")
    runs = psykern.score_conditions(talking.model, talking.data, tmp_path / "all", names, Settings(device="cpu"))
    assert len(loads) == 1
    hashes = []
    for name, run in zip(names, runs, strict=True):
        assert run.folder == tmp_path / "all" / name
        alone = score(talking.model, talking.data, tmp_path / name, condition=name)
        parts = [sorted((Path(of.folder) / "responses").iterdir()) for of in (run, alone)]
        assert [part.read_bytes() for part in parts[0]] == [part.read_bytes() for part in parts[1]]
        manifest = json.loads((run.folder / "manifest.json").read_text())
        assert (manifest["condition"], manifest["discrete"]) == (name, None)
        hashes.append(manifest["chat_template_hash"])
    assert hashes == [None, None, f"sha256:{hashlib.sha256(TEMPLATE.encode()).hexdigest()}"]


def test_conditions_must_differ(talking: Toy, tmp_path: Path) -> None:
    for conditions, message in ((("plain", "plain"), "got plain,plain"), ((), "got none")):
        with pytest.raises(ValueError, match=f"condition: expected different ones, {message}"):
            psykern.score_conditions(talking.model, talking.data, tmp_path / "run", conditions)
    assert not (tmp_path / "run").exists()


# Manifest, summary, plan


def test_the_manifest_says_how_the_run_was_made(toy: Toy, toy_run: Run) -> None:
    manifest = json.loads((toy_run.folder / "manifest.json").read_text())
    assert manifest["model_id"] == str(toy.model)
    assert manifest["model_hash"].startswith("sha256:")
    assert manifest["tokenizer_hash"] == sha256(toy.model / "tokenizer.json")
    size = toy.data.stat().st_size
    assert manifest["data"] == [{"path": str(toy.data), "hash": sha256(toy.data), "bytes": size}]
    settings = Settings()
    for name in ("protocol", "boundary", "options", "max_options", "over_length", "limit", "studies"):
        assert manifest[name] == getattr(settings, name)
    assert (manifest["wave_tokens"], manifest["batch_tokens"]) == astuple(engine.CPU_BUDGETS)
    assert manifest["peak_device_bytes"] is None and manifest["gpu_idle_share"] is None
    assert (manifest["device"], manifest["dtype"]) == ("cpu", "float32")
    assert manifest["backend"] == psykern.kernels.resolve("auto", torch.device("cpu"))
    assert {"psykern", "python", "torch", "transformers", "tokenizers", "numpy", "pyarrow"} <= set(manifest["versions"])
    assert manifest["versions"]["psykern"] == psykern.__version__
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["peak_memory_bytes"] > 2**20
    started, finished = (datetime.fromisoformat(manifest[name]) for name in ("started", "finished"))
    assert started <= finished
    assert started.utcoffset() is not None


def test_the_manifest_counts_time(toy_run: Run) -> None:
    seconds = dict(toy_run.manifest.seconds)
    total = seconds.pop("total")
    assert set(seconds) >= {"load", "read", "encode", "plan", "run", "write", "hash"}
    assert min(seconds.values()) > 0
    assert max(seconds.values()) <= total  # the phases overlap
    counts = toy_run.manifest.counts
    assert toy_run.manifest.tokens_per_second == pytest.approx(counts.tokens / total, rel=0.1)
    assert toy_run.manifest.responses_per_second == pytest.approx(counts.responses / total, rel=0.1)


@pytest.mark.parametrize("min_share", [1, 10**6], ids=["shared", "unshared"])
def test_the_manifest_counts_tokens(toy: Toy, tmp_path: Path, min_share: int) -> None:
    """A transcript's last scored token is predicted, not computed; what is shared is a trie of the others."""
    counts = score(toy.model, toy.data, tmp_path, options="none", min_share=min_share).manifest.counts
    spans = [toy.oracle.spans(row["text"], "exact", "joint") for row in toy.rows]
    lasts = [max(place for of in places for place in of) for _, places in spans]
    assert counts.transcripts == len(toy.rows)
    assert counts.responses == sum(len(places) for _, places in spans)
    assert counts.scored_responses == sum(bool(of) for _, places in spans for of in places) < counts.responses
    assert counts.tokens == sum(last + 1 for last in lasts)
    prefixes = {  # shared within a study
        (row["study"], *ids[: k + 1])
        for row, (ids, _), last in zip(toy.rows, spans, lasts, strict=True)
        for k in range(last)
    }
    assert counts.computed_tokens == (len(prefixes) if min_share == 1 else sum(lasts))
    assert counts.rejects == counts.over_length_transcripts == counts.dropped_responses == 0


def test_hashes_tell_models_and_data_apart(toy: Toy, toy_run: Run, tmp_path: Path) -> None:
    other = shutil.copytree(toy.model, tmp_path / "model")
    make_model(other, seed=1, vocab_size=512, **CONFIGS["qwen3"])
    data = write_rows(tmp_path / "data.jsonl", toy.rows[:1])
    manifest = score(other, data, tmp_path / "run").manifest
    assert manifest.model_hash != toy_run.manifest.model_hash
    assert manifest.tokenizer_hash == toy_run.manifest.tokenizer_hash
    assert manifest.data[0].hash != toy_run.manifest.data[0].hash


def sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_the_summary_is_the_mean_over_studies_of_the_records(toy_run: Run) -> None:
    table = psykern.read_run(toy_run.folder).to_pylist()
    summary = json.loads((toy_run.folder / "summary.json").read_text())
    assert summary == toy_run.summary.to_json() | {"studies": summary["studies"]}
    means = []
    for study in summary["studies"]:
        own = [r for r in table if r["study"] == study["study"]]
        scored = [r for r in own if r["logprob"] is not None]
        assert (study["responses"], study["scored"]) == (len(own), len(scored))
        means.append(-math.fsum(r["logprob"] for r in scored) / len(scored))
        assert study["mean_nll"] == pytest.approx(means[-1])
        assert study["accuracy"] == pytest.approx(sum(r["is_argmax"] for r in scored) / len(scored))
    assert [study["study"] for study in summary["studies"]] == ["bandit", "ratings", "words"]
    assert summary["mean_nll"] == pytest.approx(math.fsum(means) / 3)


@pytest.mark.parametrize(
    "settings", [{}, {"protocol": "study"}, {"options": "observed"}], ids=["default", "study", "observed"]
)
def test_the_estimate_counts_what_a_run_computes(toy: Toy, tmp_path: Path, settings: dict[str, Any]) -> None:
    counts = score(toy.model, toy.data, tmp_path, **settings).manifest.counts
    estimate = psykern.estimate(toy.model, toy.data, Settings(device="cpu", **settings))
    assert [study.study for study in estimate.studies] == ["bandit", "ratings", "words"]
    for name in ("transcripts", "responses", "tokens", "computed_tokens"):
        assert sum(getattr(study, name) for study in estimate.studies) == getattr(counts, name), name


def test_the_estimate_counts_what_studies_share(toy: Toy, tmp_path: Path) -> None:
    """Studies whose transcripts begin alike, as parts of one experiment do."""
    front = "Thank you for taking part in this experiment. Please read what follows with care. " * 3
    data = write_rows(tmp_path / "rows.jsonl", [row | {"text": front + row["text"]} for row in toy.rows])
    counts = score(toy.model, data, tmp_path / "run").manifest.counts
    estimate = psykern.estimate(toy.model, data, Settings(device="cpu"))
    assert sum(study.computed_tokens for study in estimate.studies) == counts.computed_tokens


def test_the_estimate_of_several_units(toy: Toy, tmp_path: Path) -> None:
    """Counts add up; memory is that of the largest unit."""
    settings = Settings(device="cpu", min_share=10**6)
    one = psykern.estimate(toy.model, toy.data, settings)
    several = psykern.estimate(toy.model, toy.data, replace(settings, unit_tokens=1))
    largest: dict[str, int] = {}
    for row in toy.rows:
        (alone,) = psykern.estimate(toy.model, write_rows(tmp_path / "rows.jsonl", [row]), settings).studies
        largest[alone.study] = max(alone.wave_bytes, largest.get(alone.study, 0))
    for whole, parts in zip(one.studies, several.studies, strict=True):
        assert parts.wave_bytes == largest[parts.study] < whole.wave_bytes
        assert replace(parts, wave_bytes=whole.wave_bytes) == whole


def test_the_estimate_of_operations(toy: Toy, tmp_path: Path) -> None:
    """By hand, from config.json: one transcript, no options. And the matrix products that torch counts in a run."""
    data = write_rows(tmp_path / "rows.jsonl", toy.rows[:1])
    estimate = psykern.estimate(toy.model, data, Settings(device="cpu", options="none"))
    _, places = toy.oracle.spans(toy.rows[0]["text"], "exact", "joint")
    targets = [place for of in places for place in of]
    rows, scored = max(targets), len(targets)
    config = json.loads((toy.model / "config.json").read_text())
    layers, hidden, inner = (config[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    queries, keys = (config["head_dim"] * config[k] for k in ("num_attention_heads", "num_key_value_heads"))
    all_rows = 2 * rows * 2 * hidden * keys  # keys and values
    query_rows = 2 * (2 * hidden * queries + 3 * hidden * inner)  # per row: queries, output, three of the MLP
    (study,) = estimate.studies
    assert study.flops_body == layers * all_rows + ((layers - 1) * rows + scored) * query_rows
    seen = (layers - 1) * rows * (rows + 1) // 2 + sum(targets)  # the row before place p sees p keys
    assert study.flops_attention == 4 * queries * seen
    assert study.flops_head == 2 * scored * hidden * config["vocab_size"]
    assert study.scored_rows == scored
    assert (study.transcripts, study.responses, study.branches) == (1, len(places), 0)
    with FlopCounterMode(display=False) as counter:
        score(toy.model, data, tmp_path / "run", options="none", backend="reference")
    products = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert products == study.flops_body + study.flops_head


def test_the_estimate_needs_no_weights(toy: Toy, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(toy.model / name, tmp_path / name)
    assert psykern.estimate(tmp_path, toy.data) == psykern.estimate(toy.model, toy.data)


def test_a_smaller_wave_needs_less_memory(toy: Toy) -> None:
    few, many = (psykern.estimate(toy.model, toy.data, Settings(device="cpu", wave_tokens=n)) for n in (64, 4096))
    for small, large in zip(few.studies, many.studies, strict=True):
        assert small.wave_bytes < large.wave_bytes
        assert small.computed_tokens == large.computed_tokens
        assert large.wave_bytes >= 4 * 64 * 2 * large.computed_tokens  # hidden states and a layer's keys, in float32


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
    assert run.manifest.studies == ("words", "bandit")


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


@pytest.fixture(scope="module")
def short_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model again, for texts of at most ``CONTEXT`` tokens: some transcripts fit, others do not."""
    folder = tmp_path_factory.mktemp("short-context")
    make_toy(folder, max_position_embeddings=CONTEXT)
    return folder


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "Exact"}, "protocol: expected one of exact, study, got 'Exact'"),
        ({"options": "all"}, "options: expected one of none, given, observed"),
        ({"dtype": "float16"}, "dtype: expected one of auto, float32, bfloat16"),
        ({"max_options": 0}, "max_options: expected at least 1, got 0"),
        ({"limit": -1}, "limit: expected at least 1, got -1"),
        ({"wave_tokens": 0}, "wave_tokens: expected at least 1"),
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1"),
        ({"min_share": 0}, "min_share: expected at least 1"),
        ({"condition": "vision"}, "condition: expected one of plain, chat, persona, got 'vision'"),
        ({"discrete": "[A-"}, r"discrete: expected a regular expression, got '\[A-': unterminated"),
        ({"protocol": "study", "boundary": "split"}, "boundary: .* boundary='joint'"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings_say_what_they_expect(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


# Real transcripts, Qwen3's tokenizer


@dataclass(frozen=True)
class Sample:
    study: str
    experiment: str = ""  # part of its name
    count: int = 1  # the shortest transcripts of the study
    with_empty: bool = False  # only those with an empty response
    options: tuple[str, ...] | None = None


SAMPLES = {
    "thoma": Sample("thoma2025riskychoice", count=3),
    "franke": Sample("franke2024bayesian"),
    "associations": Sample("guenther2023associations_individual"),
    "substitutions": Sample("guenther2024substitutions", count=2),
    "vantiel-words": Sample("vantiel2021probabilistic_pragmatics", "exp1b"),
    "vantiel-line-break": Sample("vantiel2021probabilistic_pragmatics", "exp2b", options=("0", "1", "10", "100", "50")),
    "alsobay": Sample("alsobay2025publicGoodsGame", count=2),
    "little": Sample("little2024functionestimation"),
    "jagadish": Sample("jagadish2023zero", options=("1", "2", "3", "4", "5", "6")),
    "frey": Sample("frey2017mpl", count=2, options=("A", "B")),
    "haridi": Sample("haridi2024memory", with_empty=True),
}


SPLIT_SAMPLES = ("alsobay", "associations", "thoma", "vantiel-line-break", "vantiel-words")  # the short ones


@dataclass(frozen=True)
class Real:
    model: Path
    data: Path
    rows: dict[str, list[Row]]  # by name of the sample, as the folder ``data`` holds them
    oracle: Oracle


def sample_rows(shared: Path, sample: Sample) -> list[Row]:
    with gzip.open(shared / "psych" / f"{sample.study}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if sample.experiment in row["experiment"] and "<<" in row["text"]]
    rows = [row for row in rows if not sample.with_empty or "<<>>" in row["text"]]
    shortest = sorted(rows, key=lambda row: len(row["text"]))[: sample.count]
    kept = ("experiment", "participant", "text")
    return [{k: row[k] for k in kept} | {"options": sample.options and list(sample.options)} for row in shortest]


def with_qwen3_tokenizer(shared: Path, folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared / "tokenizers" / "qwen3" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    model = make_model(
        folder / "model",
        model_type="qwen2",
        vocab_size=151_936,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        initializer_range=0.1,  # at 0.2 the sum over a leaking run of 1,541 tokens rounds by 1e-4 in transformers too
    )
    with_qwen3_tokenizer(shared, folder / "model")
    rows = {name: sample_rows(shared, sample) for name, sample in SAMPLES.items()}
    for name, own in rows.items():
        write_rows(folder / "data" / f"{name}.jsonl", own)
    return Real(folder / "model", folder / "data", rows, Oracle(model, folder / "model"))


RealTable = Callable[[str, str], pa.Table]


@pytest.fixture(scope="module")
def real_table(real: Real, tmp_path_factory: pytest.TempPathFactory) -> RealTable:
    """The records of the samples, scored in one run per condition; their study is the sample's name."""

    @cache
    def scored(protocol: str, boundary: str) -> pa.Table:
        names = SPLIT_SAMPLES if boundary == "split" else SAMPLES
        data = [real.data / f"{name}.jsonl" for name in names]
        run = score(real.model, data, tmp_path_factory.mktemp("run"), protocol=protocol, boundary=boundary)
        return psykern.read_run(run.folder)

    return scored


def of_studies(table: pa.Table, *studies: str) -> pa.Table:
    return table.filter(pc.is_in(table.column("study"), pa.array(studies)))


@pytest.mark.parametrize(
    ("protocol", "boundary", "name"),
    [("exact", "joint", name) for name in SAMPLES]
    + [("exact", "split", name) for name in SPLIT_SAMPLES]
    + [("study", "joint", name) for name in SAMPLES],
)
def test_real_records_equal_the_oracle(
    real: Real, real_table: RealTable, protocol: str, boundary: str, name: str
) -> None:
    got = by_transcript(of_studies(real_table(protocol, boundary), name))
    for own, row in zip(got, real.rows[name], strict=True):
        assert {record["participant"] for record in own} == {str(row["participant"])}
        assert_records(own, real.oracle.records(row["text"], protocol, boundary))


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("jagadish", "exact"),
        ("jagadish", "study"),
        ("frey", "exact"),
        ("frey", "study"),
        ("vantiel-line-break", "exact"),
    ],
)
def test_real_options_equal_the_oracle(real: Real, real_table: RealTable, name: str, protocol: str) -> None:
    """A few responses of the first transcript."""
    own, row = by_transcript(of_studies(real_table(protocol, "joint"), name))[0], real.rows[name][0]
    assert len(own) == len(list(responses(row["text"])))  # none leaks into the next
    for record in own[:: len(own) // 2]:
        wanted = real.oracle.options(row["text"], record["response_index"], row["options"], protocol)
        assert_options(record, row["options"], wanted)


def test_real_observed_options_equal_the_oracle(real: Real, tmp_path: Path) -> None:
    """Letters of the participant's own, from the data."""
    got = records(score(real.model, real.data / "thoma.jsonl", tmp_path, options="observed"))
    for own, row in zip(got, real.rows["thoma"], strict=True):
        seen = list(dict.fromkeys(m[1] for m in responses(row["text"])))
        if len(seen) < 2:
            assert {record["options"] for record in own} == {None}
            continue
        for record in own[::4]:
            assert_options(record, seen, real.oracle.options(row["text"], record["response_index"], seen))


@pytest.mark.parametrize(
    "budgets",
    [{"wave_tokens": 64, "batch_tokens": 64}, {"min_share": 1, "wave_tokens": 500}, {"min_share": 10**6}],
    ids=["64-rows", "share-all", "share-none"],
)
def test_real_scores_do_not_depend_on_budgets_and_company(
    real: Real, real_table: RealTable, tmp_path: Path, budgets: dict[str, int]
) -> None:
    names = "substitutions", "thoma", "vantiel-line-break"
    assert_no_close_call(real.oracle, [row for name in names for row in real.rows[name]])
    few = score(real.model, [real.data / f"{name}.jsonl" for name in names], tmp_path, **budgets)
    assert_same_scores(psykern.read_run(few.folder), of_studies(real_table("exact", "joint"), *names))


def test_a_real_transcript_alone_scores_the_same(real: Real, real_table: RealTable, tmp_path: Path) -> None:
    """The second of two that share a front of some hundred tokens."""
    data = write_rows(tmp_path / "substitutions.jsonl", real.rows["substitutions"][1:])
    (alone,) = records(score(real.model, data, tmp_path / "run"))
    together = by_transcript(of_studies(real_table("exact", "joint"), "substitutions"))
    assert_same_logprobs([alone], together[1:])


def test_a_response_with_nothing_before_it_has_no_probability(real: Real, tmp_path: Path) -> None:
    """Qwen puts no token in front of a text; `<<` alone is no context for the token that begins with it."""
    row = {"study": "s", "text": "<<A>> was the first, <<B>> the second."}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    (own,) = records(score(real.model, data, tmp_path / "run"))
    assert_records(own, real.oracle.records(row["text"]))


@pytest.fixture
def emptied_folder(tmp_path: Path) -> Iterator[Path]:
    """For what is too large to leave behind for a look, as pytest does."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_the_shape_of_qwen_0_5b_on_real_transcripts(shared: Path, emptied_folder: Path) -> None:
    """Hidden 896, 14 heads on 2, 4 layers: long sums in other orders than transformers' still agree."""
    model = make_model(
        emptied_folder / "model",
        model_type="qwen2",
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=4,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        initializer_range=0.05,
    )
    folder = with_qwen3_tokenizer(shared, emptied_folder / "model")
    oracle = Oracle(model, folder)
    names = ("alsobay", "associations", "franke", "thoma", "vantiel-words")
    rows = {name: sample_rows(shared, SAMPLES[name])[0] for name in names}
    data = [write_rows(emptied_folder / f"{name}.jsonl", [row]) for name, row in rows.items()]
    run = score(folder, data, emptied_folder / "run")
    assert len(records(run)) == len(rows)
    for own, row in zip(records(run), rows.values(), strict=True):
        assert_records(own, oracle.records(row["text"]))
