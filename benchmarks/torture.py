"""Kills a run at random moments and goes on with it, many times; tests/support/killing.py says what must hold then."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import print_row, write_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.killing import STAGES, torture


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="torture", help="of the CSV in benchmarks/results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="psykern-torture-") as folder:
        outcome = torture(options.rounds, options.seed, Path(folder))
    row = {
        "rounds": outcome.rounds,
        "equal": outcome.equal,
        "kills": sum(outcome.kills.values()),
        **{f"kills_{stage}": outcome.kills[stage] for stage in STAGES},
        "seconds": round(outcome.seconds, 1),
    }
    print_row(row)
    write_csv(options.name, [row])
    return 0 if outcome.equal == outcome.rounds else 1


if __name__ == "__main__":
    raise SystemExit(main())
