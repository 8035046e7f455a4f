"""What the tests of runs share: models and data are made once a process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.scoring import (
    score,
)
from support.toy import (
    CONTEXT,
    TEMPLATE,
    Row,
    Toy,
    make_toy,
    make_toy_data,
    write_rows,
)

from psykern import Run


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy_run(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return score(toy.model, toy.data, tmp_path_factory.mktemp("toy-run"))


@pytest.fixture(scope="session")
def talking(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy model with a chat template, and rows of which two in three say something of the participant."""
    folder = shutil.copytree(toy.model, tmp_path_factory.mktemp("talking") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    known: list[Row] = [{"age": 24, "sex": "F"}, {"age": 999, "PHQ": "N/A"}, {"phq8": 3.0}]
    rows = [row | known[i % 3] for i, row in enumerate(toy.rows)]
    return replace(toy, model=folder, rows=rows, data=write_rows(folder.parent / "rows.jsonl", rows))


@pytest.fixture(scope="session")
def short_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model again, for texts of at most ``CONTEXT`` tokens: some transcripts fit, others do not."""
    folder = tmp_path_factory.mktemp("short-context")
    make_toy(folder, max_position_embeddings=CONTEXT)
    return folder
