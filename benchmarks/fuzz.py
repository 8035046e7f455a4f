"""Random rows, files, manifests and parts for as long as is asked: the properties of `tests/test_fuzz.py` with new
examples, round after round, until the time is over.

A property that fails is reported with its smallest example, and the row says so. Hypothesis draws the examples.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import print_row, write_csv

ROOT = Path(__file__).resolve().parents[1]
HANG = 600  # seconds after which a round counts as hanging; one takes about half a minute


def fuzz(minutes: float) -> dict[str, object]:
    """Rounds of the test file, each with a seed of its own, in processes of their own: a crash of native code ends a
    round and is counted."""
    started = time.perf_counter()
    rounds = passed = failed = crashed = 0
    while time.perf_counter() - started < minutes * 60:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={rounds}"]
        try:
            done = subprocess.run(
                [*command, "tests/test_fuzz.py"],
                cwd=ROOT,
                env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
                capture_output=True,
                text=True,
                timeout=HANG,
            )
        except subprocess.TimeoutExpired as error:
            print(error.output, flush=True)
            crashed += 1
        else:
            if done.returncode:
                print(done.stdout, done.stderr, flush=True)
            passed += _count(done.stdout, "passed")
            failed += _count(done.stdout, "failed")
            crashed += done.returncode not in (0, 1)
        rounds += 1
    return {
        "rounds": rounds,
        "properties_passed": passed,
        "properties_failed": failed,
        "crashes_or_hangs": crashed,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _count(output: str, outcome: str) -> int:
    found = re.search(rf"(\d+) {outcome}", output)
    return int(found[1]) if found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--name", default="fuzz", help="of the CSV in benchmarks/results")
    options = parser.parse_args(arguments)
    row = fuzz(options.minutes)
    print_row(row)
    write_csv(f"{options.name}.csv", [row])
    return 0 if row["properties_failed"] == row["crashes_or_hangs"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
