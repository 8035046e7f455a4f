"""Folders, machines and wishes that cannot be, and runs that are stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.command import assert_error, manifest, psykern_command, score
from support.toy import Toy

import psykern
from psykern import kernels
from psykern.engine import engine
from psykern.engine.engine import Engine
from psykern.kernels import dispatch


def test_a_run_is_never_overwritten(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert score(toy.model, toy.data, run, "--limit", 1) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert_error(capsys, score(toy.model, toy.data, run), run, "holds another run", "limit: 1 there, null here")
    refused = score(toy.model, toy.data, run, "--limit", 1, "--no-resume")
    assert_error(capsys, refused, run, "expected a new or empty folder", "it holds manifest.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused = score(toy.model, toy.data, tmp_path / "mine")
    assert_error(capsys, refused, tmp_path / "mine", "expected a new or empty folder", "it holds notes.txt")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/psykern-run")):
        assert_error(capsys, score(toy.model, toy.data, out), out)
    assert (tmp_path / "file").read_text() == "mine"
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert_error(capsys, score(toy.model, toy.data, tmp_path / "locked"), "cannot be written: Permission denied")


def test_too_little_memory_says_which_budget_to_lower(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "free_bytes", lambda device: 2**20)
    status = score(toy.model, toy.data, tmp_path / "run")
    assert_error(capsys, status, "MiB are free", "lower --wave-tokens", "--batch-tokens")


def test_an_allocation_that_fails_says_which_budget_to_lower(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("psykern.models.layer.Layer.__call__", fail)
    assert_error(capsys, score(toy.model, toy.data, tmp_path / "run"), "out of memory", "lower --wave-tokens")


@pytest.mark.parametrize("backend", [name for name in get_args(kernels.Backend) if name not in ("auto", "reference")])
def test_a_backend_that_is_missing_says_how_to_get_it(
    backend: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = score(toy.model, toy.data, tmp_path / "run", "--backend", backend)
    try:
        kernels.resolve(backend, torch.device("cpu"))
    except kernels.BackendError:
        assert_error(capsys, status, f"backend '{backend}' is not available on cpu", dispatch._HOW_TO_GET[backend])
        assert not (tmp_path / "run").exists()
    else:
        assert status == 0
        assert manifest(tmp_path / "run")["backend"] == backend


@pytest.mark.parametrize("command", ["score", "plan"])
def test_cuda_without_a_gpu(
    command: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ["--out", tmp_path / "run"] if command == "score" else []
    status = psykern_command(command, toy.model, toy.data, *out, "--device", "cuda")
    assert_error(capsys, status, "device 'cuda' was asked for", "no CUDA device")
    assert not (tmp_path / "run").exists()


def test_one_gpu_of_several_is_no_cluster(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    status = psykern_command("score", toy.model, toy.data, "--out", out, "--ray", "--device", "cuda:1")
    assert_error(capsys, status, "device: expected auto, cpu or cuda, as Ray gives each worker its GPU, got cuda:1")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wave-tokens", "0"], "wave_tokens: expected at least 1, got 0"),
        (["--batch-tokens", "-5"], "batch_tokens: expected at least 1, got -5"),
        (["--min-share", "0"], "min_share: expected at least 1, got 0"),
        (["--max-options", "0"], "max_options: expected at least 1, got 0"),
        (["--limit", "0"], "limit: expected at least 1, got 0"),
        (["--limit", "ten"], "argument --limit: invalid int value: 'ten'"),
        (["--wave-tokens", "1e5"], "argument --wave-tokens: invalid int value: '1e5'"),
        (["--protocol", "chat"], "argument --protocol: invalid choice: 'chat'"),
        (["--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
        (["--device", "gpu"], "device: expected auto, cpu, cuda or cuda:N, N from 0 on, got 'gpu'"),
        (
            ["--protocol", "study", "--boundary", "split"],
            "boundary: the study's protocol tokenizes a text as one string",
        ),
        (["--studies"], "argument --studies: expected at least one argument"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_2_and_touches_nothing(
    options: list[str], message: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(toy.model, toy.data, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["score"], ["score", "model"], ["score", "model", "data"], ["plan", "model"], ["x"]]
)
def test_too_few_arguments_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert psykern_command(*arguments) == 2
    assert "usage: psykern" in capsys.readouterr().err


STOPS = {
    "interrupted": (KeyboardInterrupt(), 130, "interrupted"),
    "not-finite": (psykern.NonFiniteError("scores are not finite"), 1, "scores are not finite"),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_was_written_before_a_stop_is_kept(
    name: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of the units is stopped: two parts stay, whole, and no manifest says that the run is complete."""
    error, expected, message = STOPS[name]
    arguments = ("--unit-tokens", 1, "--quiet")
    assert score(toy.model, toy.data, tmp_path / "whole", *arguments) == 0

    def pairs(*arguments: Any, **named: Any) -> Iterator[Any]:
        for done, pair in enumerate(original(*arguments, **named)):
            if done == 2:
                raise error
            yield pair

    original = Engine.pairs
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "pairs", pairs)
        capsys.readouterr()
        assert score(toy.model, toy.data, tmp_path / "run", *arguments) == expected
    assert message in capsys.readouterr().err
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "responses").iterdir()}
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run" / "responses").iterdir()}
    assert kept == {name: whole[name] for name in sorted(whole)[:2]}
    assert manifest(tmp_path / "run")["finished"] is None

    assert score(toy.model, toy.data, tmp_path / "run", *arguments) == 0  # goes on
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "responses").iterdir()} == whole
    assert manifest(tmp_path / "run")["counts"] == manifest(tmp_path / "whole")["counts"]
