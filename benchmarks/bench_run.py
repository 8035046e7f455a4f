"""``psykern score`` as a user types it, on real transcripts, with a random checkpoint of one of the study's shapes: how
long the whole command takes, and whether its records are right.

    python benchmarks/bench_run.py --device cuda --shape Qwen3-0.6B --data .gpu-data --name run_gpu

The command runs twice, and the second must give the bytes of the first. Of two studies the log-probabilities are
compared with those of a run in fp32 on the same device, and those of the shipped demo in fp32 with the CPU's: the RMS
per response and per token. The time is that of the command: start of Python, loading and writing included.
"""

from __future__ import annotations

import argparse
import gzip
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from harness import add_arguments, dtype_of, print_row, write_csv
from providers import MIXES, SHARED, make_shape
from shapes import SHAPES

import psykern
from psykern import demo


def run(model: Path, data: Sequence[Path], out: Path, device: str, dtype: str, limit: int | None = None) -> float:
    """Seconds of the command; raises SystemExit with what it printed where it fails."""
    command = [sys.executable, "-m", "psykern", "score", model, *data, "--out", out, "--device", device]
    command += ["--dtype", dtype, "--quiet", *(["--limit", str(limit)] if limit else [])]
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(map(str, command))}\nexit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return time.perf_counter() - start


def first_lines(folder: Path, out: Path) -> Iterator[Path]:
    """Files of as many transcripts of each study as bench_score's mix for GPUs has."""
    out.mkdir()
    for name, count in MIXES["gpu"].items():
        with gzip.open(folder / f"{name}.jsonl.gz", "rt") as lines:
            (out / f"{name}.jsonl").write_text("".join(islice(lines, count)))
        yield out / f"{name}.jsonl"


def logprobs(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of each response that has a score, in the data's order, and its number of tokens."""
    table = psykern.read_run(run, columns=["logprob", "num_tokens"])
    values, tokens = (np.array(table[name].to_pylist(), dtype=np.float64) for name in ("logprob", "num_tokens"))
    kept = ~np.isnan(values)
    return values[kept], tokens[kept]


def parts(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(run.glob("**/*.parquet"))}


def row_of(what: str, shape: str, dtype: str, seconds: float, run: Path, other: Path | None) -> dict[str, object]:
    """``other``: the run in fp32 that the log-probabilities are compared with; None: they are not."""
    values, tokens = logprobs(run)
    row: dict[str, object] = {
        "what": what,
        "shape": shape,
        "dtype": dtype,
        "responses": len(values),
        "seconds": round(seconds, 2),
        "responses_per_second": round(len(values) / seconds, 1),
        **dict.fromkeys(("rms_of_responses", "rms_of_tokens", "bias", "max_difference", "same_bytes"), ""),
    }
    if other is not None:
        difference = values - logprobs(other)[0]
        row["rms_of_responses"] = float(f"{np.sqrt(np.mean(difference**2)):.3g}")
        row["rms_of_tokens"] = float(f"{np.sqrt(np.mean(difference**2 / tokens)):.3g}")
        row |= {"bias": float(f"{difference.mean():.3g}"), "max_difference": float(f"{np.abs(difference).max():.3g}")}
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen3-0.6B")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder with psych and tokenizers")
    parser.add_argument("--limit", type=int, help="transcripts in all; default: those of bench_score's mix for GPUs")
    parser.add_argument("--name", help="CSV file in results/; default: no file")
    options = parser.parse_args(arguments)
    device, dtype = str(options.device), str(dtype_of(options)).removeprefix("torch.")
    rows: list[dict[str, object]] = []

    def add(row: dict[str, object]) -> None:
        rows.append(row)
        print_row(row)
        if options.name:
            write_csv(options.name, rows, options.folder, options.device)

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = work / "model"
        model.mkdir()
        make_shape(model, options, dtype_of(options))
        run(demo.MODEL, [demo.SAMPLE], work / "demo-cpu", "cpu", "float32")
        seconds = run(demo.MODEL, [demo.SAMPLE], work / "demo", device, "float32")
        add(row_of("demo beside the CPU", "demo", "float32", seconds, work / "demo", work / "demo-cpu"))
        is_sample = options.quick or not (options.data / "psych").is_dir()
        data = [demo.SAMPLE] if is_sample else list(first_lines(options.data / "psych", work / "data"))
        times = [run(model, data, work / name, device, dtype, options.limit) for name in ("one", "two")]
        same = parts(work / "one") == parts(work / "two")
        for what, name, taken in zip(("the first run", "the second run"), ("one", "two"), times, strict=True):
            add(row_of(what, options.shape, dtype, taken, work / name, None) | {"same_bytes": same})
        few = data[:2]  # fp32 takes ten times as long
        run(model, few, work / "fp32", device, "float32", options.limit)
        seconds = run(model, few, work / "few", device, dtype, options.limit)
        add(row_of("two studies beside fp32", options.shape, dtype, seconds, work / "few", work / "fp32"))
    if not same:
        raise SystemExit("the second run did not give the bytes of the first")


if __name__ == "__main__":
    main()
