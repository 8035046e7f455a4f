"""Comparing two runs of the size of Psych-201: seconds and peak memory of ``psykern compare``, end to end.

Two runs of ``--responses`` responses (26 million) are simulated as parquet in the records' format: studies of unequal
size, half of them with two to six options, the second run's transcripts in another order than the first's, parts of
about the size that ``psykern score`` writes. The command runs in a process of its own, whose peak resident size is
reported. It is verified first: the reported NLLs and difference must be those of the simulated numbers.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import print_row, write_csv

from psykern.scoring.table import SCHEMA

STUDIES = 160
PARTICIPANTS = 208_021
PART_ROWS = 65_536
SHIFT = 0.1  # nats, between the two models
MODELS = {"base": "Qwen3-8B-Base", "post": "Qwen3-8B"}


@dataclass(frozen=True, slots=True)
class Study:
    """One study's participants and how many responses each has."""

    name: str
    counts: np.ndarray  # [P] int64
    options: int  # 0: none
    seed: int


def studies(responses: int) -> list[Study]:
    """Studies whose sizes spread over two orders of magnitude, as in the data."""
    rng = np.random.default_rng(0)
    weight = rng.lognormal(0, 1, STUDIES)
    people = np.maximum(2, np.round(weight / weight.sum() * PARTICIPANTS)).astype(int)
    trials = rng.lognormal(4.3, 0.9, STUDIES)
    scale = responses / (people * trials).sum()
    return [
        Study(f"study{i:03d}", rng.poisson(max(trials[i] * scale, 1), people[i]) + 1, (i % 2) * (2 + i % 5), i)
        for i in range(STUDIES)
    ]


def simulate(study: Study, model: str) -> tuple[pa.Table, float]:
    """The study's records under ``model``, and the sum of its NLLs."""
    rng, own = np.random.default_rng(study.seed), np.random.default_rng([study.seed, model == "post"])
    people, rows = len(study.counts), int(study.counts.sum())
    person = np.repeat(np.arange(people), study.counts)
    nll = np.exp(0.5 * rng.standard_normal(rows) + 0.3 * rng.standard_normal(people)[person])
    nll += 0.1 * np.abs(own.standard_normal(rows)) + SHIFT * (model == "post")
    names = {
        "study": pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [study.name]).cast(pa.string()),
        "experiment": pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["exp"]).cast(pa.string()),
        "participant": pa.array(np.arange(people).astype(str)).take(pa.array(person)),
        "response_index": pa.array(
            (np.arange(rows) - np.repeat(np.cumsum(study.counts) - study.counts, study.counts)).astype(np.int32)
        ),
    }
    k = max(study.options, 2)
    chosen = rng.integers(0, k, rows).astype(np.int32)
    letters = pa.array(list("ABCDEFGH"[:k]))
    columns = {
        **names,
        "response": letters.take(pa.array(chosen)),
        "num_tokens": pa.array(np.ones(rows, np.int32)),
        "logprob": pa.array(-nll),
        "is_argmax": pa.array(own.random(rows) < 0.4),
        "entropy": pa.array(own.random(rows).astype(np.float32)),
        **options(study, rows, chosen, letters, own),
        "flag": pa.nulls(rows, pa.string()),
    }
    return pa.table(columns, schema=SCHEMA), float(nll.sum())


def options(
    study: Study, rows: int, chosen: np.ndarray, letters: pa.Array, rng: np.random.Generator
) -> dict[str, pa.Array]:
    if not study.options:
        return {name: pa.nulls(rows, SCHEMA.field(name).type) for name in SCHEMA.names if name.startswith("option")}
    odds = rng.standard_normal((rows, study.options))
    odds[np.arange(rows), chosen] += 0.8
    log_softmax = odds - np.log(np.exp(odds).sum(axis=1, keepdims=True))
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * study.options)
    names = letters.take(pa.array(np.tile(np.arange(study.options), rows)))
    return {
        "options": pa.ListArray.from_arrays(offsets, names),
        "option_logprobs": pa.ListArray.from_arrays(offsets, pa.array(log_softmax.ravel() - 1)),
        "option_log_softmax": pa.ListArray.from_arrays(offsets, pa.array(log_softmax.ravel())),
        "option_index": pa.array(chosen),
    }


def parts(table: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(table), PART_ROWS):
        yield table.slice(start, PART_ROWS)


def write(folder: Path, model: str, of: list[Study]) -> tuple[int, float]:
    """The run's folder; returns its responses and study aggregate of the NLL."""
    (folder / "responses").mkdir(parents=True)
    number = rows = 0
    means = []
    for study in of if model == "base" else reversed(of):
        table, total = simulate(study, model)
        rows, means = rows + len(table), [*means, total / len(table)]
        if model == "post":  # whole transcripts in another order
            starts = np.cumsum(study.counts) - study.counts
            order = np.random.default_rng(study.seed).permutation(len(starts))
            counts = study.counts[order]
            take = np.repeat(starts[order] - (np.cumsum(counts) - counts), counts) + np.arange(len(table))
            table = table.take(pa.array(take)).combine_chunks()
        for part in parts(table):
            pq.write_table(part, folder / "responses" / f"part-{number:05d}.parquet", compression="zstd")
            number += 1
    settings = {"protocol": "exact", "boundary": "joint", "options": "given", "max_options": 26, "over_length": "error"}
    manifest = settings | {
        "model_id": f"Qwen/{MODELS[model]}", "model_hash": "0", "data": [{"hash": "0"}], "limit": None, "studies": None,
        "device": "cpu", "dtype": "float32", "versions": {}, "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rows, float(np.mean(means))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=26_000_000)
    parser.add_argument("--folder", type=Path, help="where to simulate; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="folder of the CSV; default: benchmarks/results")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-compare-", dir=args.folder))
    try:
        of = studies(args.responses)
        written = {model: write(work / model, model, of) for model in MODELS}
        bytes_on_disk = sum(path.stat().st_size for path in work.rglob("*.parquet"))
        code = "import sys; from psykern.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "compare", str(work / "base"), str(work / "post")]
        start = time.perf_counter()
        subprocess.run([*command, "--out", str(work / "report")], check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        verify(work / "report", written)
    finally:
        shutil.rmtree(work)
    row = {
        "runs": 2,
        "responses_per_run": written["base"][0],
        "participants": sum(len(study.counts) for study in of),
        "studies": len(of),
        "parquet_gb": round(bytes_on_disk / 1e9, 2),
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(seconds, 1),
        "peak_gb": round(peak / 1e9, 2),
    }
    print_row(row)
    write_csv("compare.csv", [row], **({"folder": args.out} if args.out else {}))


def verify(report: Path, written: dict[str, tuple[int, float]]) -> None:
    """Refuse to report a wrong result."""
    with (report / "tables" / "pairs.csv").open() as file:
        (pair,) = csv.DictReader(file)
    for name, (rows, nll) in zip(("base_nll", "post_nll"), written.values(), strict=True):
        if int(pair["responses"]) != rows or abs(float(pair[name]) - nll) > 1e-6:
            raise SystemExit(f"{name}: expected {nll} over {rows} responses, got {pair[name]} over {pair['responses']}")


if __name__ == "__main__":
    main()
