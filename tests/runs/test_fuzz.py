"""Rows, files and manifests of any content: a short form of ``benchmarks/fuzz.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support import fuzzing
from support.toy import make_toy, toy_rows, write_rows

FEW = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
RULES = {
    "rows": "no row is lost",
    "files": "a damaged file is named",
    "raw": "a file of any bytes is named",
    "manifests": "a foreign manifest is refused",
    "changed_manifests": "a changed manifest is refused, or its run goes on",
    "parts": "a damaged part is scored again",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_toy(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", toy_rows(count=1))


@pytest.mark.parametrize("rule", RULES)
def test_any_input(rule: str, model: Path, data: Path) -> None:
    """What each rule says is in ``RULES``."""
    FEW(fuzzing.rules(model, data, fuzzing.new_folder)[rule])()


def test_every_rule_is_tested(model: Path, data: Path) -> None:
    assert set(fuzzing.rules(model, data, fuzzing.new_folder)) == set(RULES)
