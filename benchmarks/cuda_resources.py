"""Registers, shared memory, stack and spills of each CUDA kernel by architecture: ptxas's report of the last build.

    make build && python benchmarks/cuda_resources.py      # writes benchmarks/results/cuda_resources.csv

The report is kept beside the objects by csrc/cuda/keep_ptxas_report.py. A test (``tests/kernels/test_cuda_build.py``)
fails on a spill.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles" / "_cuda.dir" / "csrc" / "cuda"
RESULT = ROOT / "benchmarks" / "results" / "cuda_resources.csv"

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_NAME = re.compile(r"(\w+(?:<[^()]*>)?)\(")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel on one architecture; bytes are of a thread, but for shared memory, which is of a block."""

    source: str
    kernel: str  # with its template arguments
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def read_report(text: str, source: str) -> list[Resources]:
    """What ``ptxas -v`` says of each kernel. Raises ``ValueError`` for an entry without its figures."""
    found = []
    for block in re.split(r"(?=ptxas info\s+: Compiling entry function)", text):
        entry = _ENTRY.search(block)
        if entry is None:
            continue
        stack, used, shared = _STACK.search(block), _USED.search(block), _SHARED.search(block)
        if stack is None or used is None:
            raise ValueError(f"{source}: expected stack and registers of {entry[1]}, got {block!r}")
        bytes_of = [int(n) for n in stack.groups()]
        found.append(Resources(source, entry[1], entry[2], int(used[1]), int(shared[1]) if shared else 0, *bytes_of))
    return found


def readable(mangled: str) -> str:
    """``name<arguments>`` of a kernel, by c++filt."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = _NAME.search(text.replace("(anonymous namespace)::", "").replace("(int)", ""))
    if name is None:
        raise ValueError(f"{mangled}: expected a function, got {text!r}")
    return name[1]


def report_of(source: Path) -> Path:
    return OBJECTS / f"{source.name}.o.ptxas"


def kernels_of(source: Path) -> list[Resources]:
    """Of the last build of ``source``. Raises ``FileNotFoundError`` where there was none, ``ValueError`` where the
    source is newer."""
    report = report_of(source)
    if report.stat().st_mtime < source.stat().st_mtime:
        raise ValueError(f"{report}: expected to be newer than {source.name}; `make build`")
    return read_report(report.read_text(), source.name)


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\bV([\d.]+)", text)
    return version[1] if version else text.strip()


def rows_by_name() -> list[dict[str, str]]:
    """The rows of the result, as a CSV gives them."""
    version = nvcc_version()
    rows = [asdict(r) | {"kernel": readable(r.kernel), "nvcc": version} for s in sources() for r in kernels_of(s)]
    return [
        {k: str(v) for k, v in r.items()} for r in sorted(rows, key=lambda r: (r["source"], r["kernel"], r["arch"]))
    ]


def main() -> None:
    rows = rows_by_name()
    with RESULT.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Resources)), "nvcc"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{RESULT.relative_to(ROOT)}: {len(rows)} rows")


if __name__ == "__main__":
    main()
