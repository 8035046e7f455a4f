"""Feeds rows, files and manifests of any content to psykern for minutes; tests/support/fuzzing.py says what must hold.

    python benchmarks/fuzz.py --minutes 10            # hypothesis alone
    python benchmarks/fuzz.py --minutes 10 --atheris  # guided by coverage (pip install atheris)

The first input for which a rule fails is printed and ends it. An input that takes longer than ten seconds fails too.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness import print_row, write_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hypothesis import HealthCheck, seed, settings
from support import fuzzing
from support.toy import make_toy, toy_rows, write_rows

SECONDS_AT_MOST = 10  # of one input
EXAMPLES = 200  # of one rule, before the next one's turn
_FREE = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def counted(count: Counter[str]) -> fuzzing.NewFolder:
    """Counts the inputs by rule. One that hangs ends the process, which is an alarm's default action."""

    @contextmanager
    def new_folder(rule: str) -> Iterator[Path]:
        count[rule] += 1
        signal.alarm(SECONDS_AT_MOST)
        with fuzzing.new_folder(rule) as folder:
            yield folder
        signal.alarm(0)

    return new_folder


def run(minutes: float, first_seed: int, model: Path, data: Path) -> Counter[str]:
    count: Counter[str] = Counter()
    end = time.monotonic() + 60 * minutes
    number = first_seed
    while time.monotonic() < end:
        for rule in fuzzing.rules(model, data, counted(count)).values():
            seed(number)(_FREE(rule))()
            number += 1
            if time.monotonic() >= end:
                break
    return count


def run_atheris(minutes: float, model: Path, data: Path) -> None:
    """Ends the process: with status 0 after the time, else at the first failure."""
    import atheris

    count: Counter[str] = Counter()
    tests = [_FREE(rule).hypothesis.fuzz_one_input for rule in fuzzing.rules(model, data, counted(count)).values()]

    def one_input(content: bytes) -> None:
        if content:
            tests[content[0] % len(tests)](content[1:])

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={int(60 * minutes)}", "-timeout=20"], one_input)
    atheris.Fuzz()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--name", help="CSV file in results/; default: no file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="psykern-fuzz-") as temporary:
        folder = Path(temporary)
        make_toy(folder / "model")
        data = write_rows(folder / "data" / "rows.jsonl", toy_rows(count=1))
        if options.atheris:
            run_atheris(options.minutes, folder / "model", data)
        count = run(options.minutes, options.seed, folder / "model", data)
    row = {"minutes": options.minutes, "seed": options.seed, "inputs": sum(count.values()), **count, "failures": 0}
    print_row(row)
    if options.name:
        print(f"written: {write_csv(options.name, [row])}")


if __name__ == "__main__":
    main()
