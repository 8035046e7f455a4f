"""What passed of gpu.sh, and what was reached of the numbers that issue 4 asks for on an H100. Reads a folder that
gpu.sh fills, while it does; a number that no file holds is "not measured", and so is what a CPU or tiny shapes gave.
Of a part that did not end well, what it wrote counts, and is marked "partial".

    python benchmarks/gpu_summary.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """A number to reach: of the values that the rows of a file give, the worst one counts."""

    text: str
    file: str
    values: Callable[[list[Row]], Iterator[float]]
    limit: float
    at_most: bool = False

    def measured(self, folder: Path) -> float | None:
        found = read(folder, self.file)
        if (folder / "quick").exists() or "cuda" not in found["machine"]:
            return None
        values = list(self.values(found["rows"]))
        return (max if self.at_most else min)(values) if values else None

    def is_reached(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def read(folder: Path, name: str) -> dict[str, Any]:
    """Machine and rows of a file; of one that is not there, or not whole, none."""
    try:
        return json.loads((folder / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {"machine": {}, "rows": []}


def column(name: str, **where: object) -> Callable[[list[Row]], Iterator[float]]:
    """Values of a column in the rows that have the given values in others."""

    def values(rows: list[Row]) -> Iterator[float]:
        for row in rows:
            if all(row.get(key) == value for key, value in where.items()) and row.get(name) not in ("", None):
                yield float(row[name])

    return values


def share_of_gemm(rows: list[Row]) -> Iterator[float]:
    return column("share_of_gemm", provider="psykern")([row for row in rows if row["rows"] >= 2048])


def against_others(rows: list[Row]) -> Iterator[float]:
    others = ("torch", "torch_compiled", "liger", "cut_cross_entropy")
    return (float(row["psykern_times"]) for row in rows if row["provider"] in others)


def attention(case: str, *providers: str) -> Callable[[list[Row]], Iterator[float]]:
    """Times of psykern of the providers, in cases of 4k tokens and more where the case is causal."""

    def values(rows: list[Row]) -> Iterator[float]:
        for row in rows:
            long_enough = case != "causal" or row["tokens"] >= 4096
            if row["case"].startswith(case) and row["provider"] in providers and long_enough:
                yield float(row["psykern_times"])

    return values


def times_the_study(rows: list[Row]) -> Iterator[float]:
    seconds = {row["provider"]: float(row["seconds"]) for row in rows if row["study"] == "all"}
    if {"study", "psykern"} <= seconds.keys():
        yield seconds["study"] / seconds["psykern"]


def sustained(provider: str, shape: str) -> Callable[[list[Row]], Iterator[float]]:
    return column("tflops", provider=provider, shape=shape)


def against(other: str) -> Callable[[list[Row]], Iterator[float]]:
    """How many times as fast psykern's attention is as another's, from 4k tokens on."""

    def values(rows: list[Row]) -> Iterator[float]:
        taken = {(row["provider"], row["shape"]): float(row["seconds"]) for row in rows if row["kind"] == "attention"}
        for (provider, shape), seconds in taken.items():
            if provider == other and int(shape.split()[-2]) >= 4096:
                yield seconds / taken["psykern", shape]

    return values


RATES, OPTION, ATTENTION = "gpu_rates", "option_logprobs_gpu", "prefix_attention_gpu"
LARGE, SMALL = "score_qwen3-8b", "score_qwen3-0.6b"
HEAD_8B, HEADS_8B = "{} x 151936 x 4096", "32 (8) of 128, {} tokens"
EXPERTS = "16384 rows, 8 of 128"
TARGETS = (
    Target("head, sustained: TFLOP/s, 2k rows", RATES, sustained("psykern:triton", HEAD_8B.format(2048)), 700),
    Target("head, sustained: TFLOP/s, 16k rows", RATES, sustained("psykern:triton", HEAD_8B.format(16_384)), 730),
    Target("attention, sustained: TFLOP/s, 2k tokens", RATES, sustained("psykern", HEADS_8B.format(2048)), 540),
    Target("attention, sustained: TFLOP/s, 4k tokens", RATES, sustained("psykern", HEADS_8B.format(4096)), 630),
    Target("attention, sustained: TFLOP/s, 8k tokens", RATES, sustained("psykern", HEADS_8B.format(8192)), 650),
    Target("attention, sustained: times torch's default, from 4k", RATES, against("sdpa"), 1.0),
    Target("attention, sustained: times cuDNN's, from 4k", RATES, against("cudnn"), 0.7),
    Target("experts of Qwen3-30B-A3B, sustained: TFLOP/s", RATES, sustained("psykern", EXPERTS), 523),
    Target("option_logprobs: share of the plain GEMM's rate, R >= 2048", OPTION, share_of_gemm, 0.9),
    Target("option_logprobs: times the others", OPTION, against_others, 1.0),
    Target("option_logprobs: extra memory, MB", OPTION, column("peak_mb", provider="psykern"), 100, at_most=True),
    Target("prefix_attention: times flash attention, 4k to 16k", ATTENTION, attention("causal", "sdpa"), 1.0),
    Target("prefix_attention: likewise, half shared", ATTENTION, attention("shared", "sdpa_batch", "sdpa_apart"), 1.7),
    Target("prefix_attention: branches, separate sequences", ATTENTION, attention("branches", "sdpa_sequences"), 4.0),
    Target(
        "8B: share of the sustained rate", LARGE, column("share_of_sustained", provider="psykern", study="all"), 0.65
    ),
    Target("8B: times the study's procedure", LARGE, times_the_study, 3.0),
    Target("0.6B: times the study's procedure", SMALL, times_the_study, 10.0),
    Target(
        "8B: idle share of the device",
        LARGE,
        column("idle_share", provider="psykern", study="all"),
        0.03,
        at_most=True,
    ),
    Target("8B: RMS against fp32, nats", LARGE, column("rms_against_fp32"), 0.035, at_most=True),
)


def summary(folder: Path) -> dict[str, Any]:
    """Parts with status, seconds and what they measured; targets with what was reached; the machine, as the first file
    has it."""
    lines = (folder / "status.tsv").read_text().splitlines()
    parts: list[Row] = [dict(zip(("part", "status", "seconds"), line.split("\t"), strict=True)) for line in lines]
    files = {part["part"]: read(folder, part["part"]) for part in parts}
    for part in parts:
        rows = files[part["part"]]["rows"]
        part |= {"rows": len(rows), "providers": list(dict.fromkeys(row.get("provider", "") for row in rows))}
        ended = {"0": "passed", "124": "ran out of time", "137": "ran out of time"}
        part["state"] = ended.get(part["status"], f"failed ({part['status']})")
    partial = {part["part"] for part in parts if part["status"] != "0"}
    targets = []
    for target in TARGETS:
        value = target.measured(folder)
        reached = "not measured" if value is None else "yes" if target.is_reached(value) else "no"
        limit = f"{'<=' if target.at_most else '>='} {target.limit:g}"
        is_partial = value is not None and target.file in partial
        targets.append(
            {"target": target.text, "limit": limit, "measured": value, "reached": reached, "partial": is_partial}
        )
    machines = [file["machine"] for file in files.values() if file["machine"]]
    return {"machine": machines[0] if machines else None, "parts": parts, "targets": targets}


def main(arguments: Sequence[str] | None = None) -> None:
    folder = Path((arguments if arguments is not None else sys.argv[1:])[0])
    found = summary(folder)
    temporary = folder / "summary.part"
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, folder / "summary.json")
    print(found["machine"] or "no file says on which machine")
    for part in found["parts"]:
        partial = ", partial" if part["rows"] and part["status"] != "0" else ""
        measured = f"  {part['rows']} rows{partial}: {', '.join(part['providers'])}" if part["rows"] else ""
        print(f"{part['part']:24} {part['state']:16} {part['seconds']:>4} s{measured}")
    for target in found["targets"]:
        partial = ", partial" if target["partial"] else ""
        value = "" if target["measured"] is None else f"{target['measured']:.3g}"
        print(f"{target['target']:60} {target['limit']:>8}  {value:>8}  {target['reached']}{partial}")


if __name__ == "__main__":
    main()
