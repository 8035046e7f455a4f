"""Conditions chat, persona and discrete, against the oracle."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.scoring import (
    assert_same_scores,
    records,
    score,
)
from support.toy import (
    TEMPLATE,
    Row,
    Toy,
    assert_options,
    assert_records,
    expected,
    in_bytes,
    write_rows,
)
from tokenizers import Tokenizer

import psykern
from psykern import Settings
from psykern.scoring import loading


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


def test_special_tokens_in_a_template_tell_runs_and_caches_apart(talking: Toy, tmp_path: Path) -> None:
    """Two folders that are equal but for bos_token in tokenizer_config.json; the text begins with it."""
    cache, runs = tmp_path / "cache", []
    for token in ("!", "hello"):
        folder = shutil.copytree(talking.model, tmp_path / token)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(["!", "hello"])  # else bos_token makes another tokenizer, too
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": token}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        out, settings = tmp_path / f"run-{token}", Settings(device="cpu", condition="chat")
        runs.append(psykern.score(folder, talking.data, out, settings, cache=cache))
        written = shutil.copytree(folder, tmp_path / f"written-{token}")
        (written / "chat_template.jinja").write_text(token + TEMPLATE)
        wanted = score(written, talking.data, tmp_path / f"wanted-{token}", condition="chat")
        assert psykern.read_run(out).equals(psykern.read_run(wanted.folder))
    one, two = runs
    assert one.manifest.tokenizer_hash == two.manifest.tokenizer_hash
    assert one.manifest.model_hash == two.manifest.model_hash
    with pytest.raises(psykern.RunFolderError, match="differs in chat_template_hash"):
        psykern.score(tmp_path / "hello", talking.data, one.folder, settings)


def test_persona_records_are_those_of_the_interview_and_the_text(talking: Toy, tmp_path: Path) -> None:
    run = score(talking.model, talking.data, tmp_path / "run", condition="persona")
    age = "Interviewer: What is your age?\nInterviewee: 24.0\n\n"
    gender = "Interviewer: What is your gender?\nInterviewee: female\n\n"
    fronts = [age + gender, "", "Interviewer: What is your PHQ-8 score?\nInterviewee: 3\n\n"]
    told = [row | {"text": fronts[i % 3] + row["text"]} for i, row in enumerate(talking.rows) if fronts[i % 3]]
    other = score(talking.model, write_rows(tmp_path / "told.jsonl", told), tmp_path / "plain")
    one, two = psykern.read_run(run.folder), psykern.read_run(other.folder)
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
    model = loading.Model

    def load(*arguments: Any, **more: Any) -> Any:
        loads.append(arguments)
        return model(*arguments, **more)

    monkeypatch.setattr(loading, "Model", load)
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
