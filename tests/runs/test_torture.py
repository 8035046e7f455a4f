"""A run that is killed again and again, and goes on: a short form of ``benchmarks/torture.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_killed_run_goes_on_to_the_same_records(tmp_path: Path) -> None:
    """In a process of its own: it forks, which a process with threads at work must not."""
    script = (
        "import json, pathlib, sys\n"
        "from support.killing import torture\n"
        "o = torture(5, 1, pathlib.Path(sys.argv[1]))\n"
        "print(json.dumps([o.equal, o.rounds, sum(o.kills.values())]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    equal, rounds, kills = json.loads(done.stdout.splitlines()[-1])
    assert kills >= 3
    assert equal == rounds == 5
