"""The command line as the tests of tests/cli call it, and what they read of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.toy import Row

from psykern.cli import main


def psykern_command(*arguments: object) -> int:
    """The exit status, also where argparse leaves."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code


def score(model: object, data: object | Sequence[object], out: object, *options: object) -> int:
    data = data if isinstance(data, list) else [data]
    return psykern_command("score", model, *data, "--out", out, "--device", "cpu", *options)


def assert_error(capsys: pytest.CaptureFixture[str], status: int, *parts: object) -> None:
    """One line on standard error that holds the parts, status 1, nothing on standard output."""
    assert status == 1
    out, err = capsys.readouterr()
    assert out == ""
    message = err[err.index("psykern: error: ") :]  # a progress bar may stand before it
    assert message.count("\n") == 1, message
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in message


def rejects(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "rejects.jsonl").read_text().splitlines()]


def manifest(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return loaded
