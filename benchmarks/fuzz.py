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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import print_row, write_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support import fuzzing
from support.toy import make_toy, toy_rows, write_rows

SECONDS_AT_MOST = 10  # of one input
EXAMPLES = 200  # of one rule, before the next one's turn
_FREE = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
_SUFFIXES = st.sampled_from(["jsonl", "jsonl.gz", "zip", "parquet"])


@contextmanager
def new_folder() -> Iterator[Path]:
    """For one input, which must not hang."""
    signal.alarm(SECONDS_AT_MOST)  # its default action ends the process
    with tempfile.TemporaryDirectory(prefix="psykern-fuzz-") as parent:
        folder = Path(parent) / "a" / "b"
        folder.mkdir(parents=True)
        yield folder
    signal.alarm(0)


def rules(model: Path, data: Path, count: Counter[str]) -> dict[str, Callable[..., None]]:
    """Each rule as a function of drawn values; ``count`` counts inputs."""

    def rows(lines: list[bytes], packing: str, chosen: Any) -> None:
        count["rows"] += 1
        with new_folder() as folder:
            fuzzing.check_rows(model, lines, packing, chosen, folder)

    def files(lines: list[bytes], suffix: str, damage: list[tuple[float, int]], cut: float) -> None:
        count["files"] += 1
        content = fuzzing.parquet_of(lines) if suffix == "parquet" else fuzzing.pack(lines, suffix)
        with new_folder() as folder:
            fuzzing.check_damaged(model, content, suffix, damage, cut, folder)

    def raw(content: bytes, suffix: str) -> None:
        count["raw"] += 1
        with new_folder() as folder:
            fuzzing.check_damaged(model, content, suffix, [], 1.0, folder)

    def manifests(text: str) -> None:
        count["manifests"] += 1
        with new_folder() as folder:
            fuzzing.check_manifest(model, data, text, folder)

    def changed(changes: dict[str, Any], removed: list[str]) -> None:
        count["changed_manifests"] += 1
        with new_folder() as folder:
            fuzzing.check_changed_manifest(model, data, changes, removed, folder)

    def parts(content: bytes, place: float, length: float) -> None:
        count["parts"] += 1
        with new_folder() as folder:
            fuzzing.check_part(model, data, content, place, length, folder)

    lines = fuzzing.LINES
    share = st.floats(0, 1, exclude_max=True)
    return {
        "rows": given(lines=lines, packing=fuzzing.PACKINGS, chosen=fuzzing.SETTINGS)(rows),
        "files": given(lines=lines, suffix=_SUFFIXES, damage=fuzzing.DAMAGE, cut=fuzzing.CUT)(files),
        "raw": given(content=st.binary(max_size=300), suffix=_SUFFIXES)(raw),
        "manifests": given(text=fuzzing.JSON_TEXT)(manifests),
        "changed": given(changes=fuzzing.CHANGES, removed=fuzzing.REMOVED)(changed),
        "parts": given(content=st.binary(max_size=50), place=share, length=share)(parts),
    }


def run(minutes: float, first_seed: int, model: Path, data: Path) -> Counter[str]:
    count: Counter[str] = Counter()
    end = time.monotonic() + 60 * minutes
    number = first_seed
    while time.monotonic() < end:
        for rule in rules(model, data, count).values():
            seed(number)(_FREE(rule))()
            number += 1
            if time.monotonic() >= end:
                break
    return count


def run_atheris(minutes: float, model: Path, data: Path) -> None:
    """Ends the process: with status 0 after the time, else at the first failure."""
    import atheris

    count: Counter[str] = Counter()
    tests = [_FREE(rule).hypothesis.fuzz_one_input for rule in rules(model, data, count).values()]

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
