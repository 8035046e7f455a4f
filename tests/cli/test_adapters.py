"""Adapters on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.adapters import make_adapter
from support.command import assert_error, manifest, psykern_command, score
from support.toy import Toy, make_toy


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        make_adapter(folder / name, make_toy(folder / "base"), seed=seed, r=2, target_modules=["v_proj"])
    return [folder / "a", folder / "b"]


def test_several_adapters_and_conditions(
    toy: Toy, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = adapters
    run, limit = tmp_path / "run", ("--limit", "1", "--quiet")
    assert score(toy.model, toy.data, run, "--adapter", a, "--adapter", b, "--condition", "plain,persona", *limit) == 0
    printed = capsys.readouterr().out
    hashes = set()
    for name in ("a/plain", "a/persona", "b/plain", "b/persona"):
        assert f"{run / name}:\n" in printed
        hashes.add(manifest(run / name)["model_hash"])
    assert len(hashes) == 2
    assert score(toy.model, toy.data, tmp_path / "one", "--adapter", b, *limit) == 0
    assert manifest(tmp_path / "one")["model_hash"] == manifest(run / "b" / "plain")["model_hash"]


def test_a_plan_is_of_one_adapter(toy: Toy, adapters: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = adapters
    assert psykern_command("plan", toy.model, toy.data, "--adapter", a, "--quiet") == 0
    assert "tokens" in capsys.readouterr().out
    status = psykern_command("plan", toy.model, toy.data, "--adapter", a, "--adapter", b)
    assert_error(capsys, status, f"adapter: a plan is of one adapter, got {a},{b}")


def test_adapters_of_one_name(
    toy: Toy, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = score(toy.model, toy.data, tmp_path / "run", "--adapter", adapters[0], "--adapter", f"{adapters[0]}/")
    assert_error(capsys, status, "adapter: expected folders of different names, got")
