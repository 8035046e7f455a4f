"""What the tests of runs share: models and data are made once a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.scoring import (
    score,
)
from support.toy import (
    CONTEXT,
    Toy,
    make_talking,
    make_toy,
    make_toy_data,
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
    return make_talking(toy, tmp_path_factory.mktemp("talking"))


@pytest.fixture(scope="session")
def short_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model again, for texts of at most ``CONTEXT`` tokens: some transcripts fit, others do not."""
    folder = tmp_path_factory.mktemp("short-context")
    make_toy(folder, max_position_embeddings=CONTEXT)
    return folder
