"""Ctrl-C while psykern is loaded, and loads, hashes and scans: one line, status 130, no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.toy import Toy, make_toy_data

ROOT = Path(__file__).resolve().parents[2]
# As the script that pip makes. What comes before its last line is Python's own start, and a few milliseconds more.
SCRIPT = "import sys; from psykern.__main__ import main; print('up', flush=True); sys.exit(main())"


@pytest.fixture(scope="module")
def long_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Too much to be done before a signal comes."""
    return make_toy_data(tmp_path_factory.mktemp("long"), count=150)


def interrupted(after: float, *arguments: object, number: int = signal.SIGINT) -> tuple[int, str, float]:
    """Exit status and standard error of a process that gets a signal ``after`` so many seconds, and the seconds that it
    lived on."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        time.sleep(after)
        sent = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        return process.returncode, err, time.monotonic() - sent


@pytest.mark.parametrize("after", [0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0])
def test_an_interrupt_leaves_no_traceback(after: float, long_toy: Toy, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--unit-tokens", 1, "--quiet")
    status, err, _ = interrupted(after, "score", long_toy.model, long_toy.data, "--out", tmp_path / "run", *options)
    assert status == 130, err
    assert "Traceback" not in err and "KeyboardInterrupt" not in err
    lines = [line for line in err.splitlines() if line]
    assert lines and all(line.startswith("psykern: ") for line in lines)
    assert len(lines) == (1 if "finishing the wave" not in err else 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_nothing_is_waited_for_before_something_is_computed(number: int, toy: Toy, tmp_path: Path) -> None:
    """While a scan would take for ever."""
    script = (
        "import sys, time, psykern.data.feed\n"
        "from psykern.__main__ import main\n"
        "psykern.data.feed.Feed._scan = lambda _: print('scanning', flush=True) or time.sleep(600)\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", script, "score", toy.model, toy.data, "--out", tmp_path / "run", "--quiet"]
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "scanning\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    name = signal.Signals(number).name
    assert (process.returncode, err.strip()) == (
        128 + number,
        f"psykern: {name}: stopped; records written so far are kept",
    )


@pytest.mark.parametrize("after", [0.02, 0.1])
@pytest.mark.parametrize("command", ["plan", "compare", "demo"])
def test_other_commands_leave_no_traceback_either(command: str, after: float, toy: Toy, tmp_path: Path) -> None:
    arguments: dict[str, list[object]] = {
        "plan": [toy.model, toy.data],
        "compare": [tmp_path, tmp_path, "--out", tmp_path / "report"],
        "demo": ["--quiet"],
    }
    status, err, _ = interrupted(after, command, *arguments[command])
    assert status == 130, err
    assert err.strip() == "psykern: interrupted"
