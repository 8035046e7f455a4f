"""A toy model with data, and a copy of the model to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.toy import Toy, make_toy_data


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy_data(tmp_path_factory.mktemp("toy"), count=3)


@pytest.fixture
def broken_model(toy: Toy, tmp_path: Path) -> Path:
    """A copy of the toy model's folder to damage."""
    return shutil.copytree(toy.model, tmp_path / "broken-model")
