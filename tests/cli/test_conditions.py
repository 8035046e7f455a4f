"""Several conditions in one call, and discrete responses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.command import assert_error, manifest, psykern_command, score
from support.toy import Toy, responses

import psykern
from psykern.study.finished import open_runs


def test_several_conditions_are_runs_of_one_folder(
    toy: Toy, broken_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (broken_model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    (broken_model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert score(broken_model, toy.data, tmp_path / "run", "--condition", "plain,chat,persona", "--quiet") == 0
    printed = capsys.readouterr().out
    for name in ("plain", "chat", "persona"):
        assert f"{name}:\n" in printed and f"records: {tmp_path / 'run' / name}\n" in printed
        assert json.loads((tmp_path / "run" / name / "manifest.json").read_text())["condition"] == name
    assert f"nothing is known of the participants of {len(toy.rows)} transcripts: left out" in printed
    assert [run.condition for run in open_runs(tmp_path / "run")] == ["chat", "persona", "plain"]


def test_chat_without_a_template_leaves_by_an_error(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = score(toy.model, toy.data, tmp_path / "run", "--condition", "plain,chat")
    assert_error(capsys, status, f"{toy.model}: condition chat needs a chat template", "the tokenizer has none")
    assert not list((tmp_path / "run").rglob("*.parquet"))


@pytest.mark.parametrize("value", ["talk", "plain,plain", "plain,", ""])
def test_a_condition_that_is_none(value: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(toy.model, toy.data, tmp_path / "run", "--condition", value) == 2
    assert f"--condition: expected different ones of plain, chat, persona, got {value!r}" in capsys.readouterr().err


def test_a_plan_is_of_one_condition(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    status = psykern_command("plan", toy.model, toy.data, "--condition", "plain,persona")
    assert_error(capsys, status, "condition: a plan is of one condition, got plain,persona")


@pytest.mark.parametrize(("given", "pattern"), [([], "[A-Z]"), (["[0-9]+"], "[0-9]+")], ids=["letters", "pattern"])
def test_discrete_keeps_matching_responses(given: list[str], pattern: str, toy: Toy, tmp_path: Path) -> None:
    assert score(toy.model, toy.data, tmp_path, "--quiet", "--discrete", *given) == 0
    kept = psykern.read_run(tmp_path).column("response").to_pylist()
    assert len(kept) == sum(bool(re.fullmatch(pattern, m[1])) for row in toy.rows for m in responses(row["text"])) > 0
    assert json.loads((tmp_path / "manifest.json").read_text())["discrete"] == pattern


def test_discrete_says_what_it_expects(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(toy.model, toy.data, tmp_path / "run", "--discrete", "[A-") == 2
    assert "discrete: expected a regular expression, got '[A-'" in capsys.readouterr().err


def test_a_date_is_for_templates_that_print_it(toy: Toy, broken_model: Path, tmp_path: Path) -> None:
    (broken_model / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    (broken_model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    date = ("--date", "2026-11-30", "--quiet")
    assert score(broken_model, toy.data, tmp_path / "run", "--condition", "plain,chat", *date) == 0
    assert [manifest(tmp_path / "run" / name)["date"] for name in ("plain", "chat")] == [None, "2026-11-30"]
    assert psykern_command("plan", broken_model, toy.data, "--condition", "chat", *date) == 0


def test_a_date_that_is_none_is_wrong_usage(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(toy.model, toy.data, tmp_path / "run", "--date", "30.11.2026") == 2
    assert "date: expected a day as YYYY-MM-DD, got '30.11.2026'" in capsys.readouterr().err
