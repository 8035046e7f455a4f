"""What scoring would cost, as text: a table of the studies, and below it what the weights take of memory."""

from __future__ import annotations

from collections.abc import Sequence

from psykern.runs.estimate import Estimate, StudyPlan
from psykern.runs.streaming import GpuWeights, WeightsPlan

_COUNTS = ("transcripts", "responses", "tokens", "computed_tokens", "bound_tokens", "scored_rows", "branches")
_FLOPS = ("flops_body", "flops_attention", "flops_head")


def format_estimate(estimate: Estimate) -> str:
    """A line per study and the sums, FLOPs in units of 10^12, memory in MiB; then the weights. "one trie": what there
    were to compute if each study were one unit."""
    header = ["study", "transcripts", "responses", "tokens", "to compute", "one trie", "scored rows", "branches"]
    header += ["body TFLOP", "attention", "head", "wave MiB"]
    rows = [header]
    for s in estimate.studies:
        rows.append(_row(s.study, [s]))
    rows.append(_row("all", estimate.studies))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    gpu = estimate.weights.gpu
    where = f"implementation {estimate.implementation}" if gpu is None else _streamed(gpu)
    return "\n".join([*table, _weights(estimate.weights), where])


def _row(name: str, studies: Sequence[StudyPlan]) -> list[str]:
    def total(column: str) -> int:
        return sum(getattr(s, column) for s in studies)

    memory = max((s.wave_bytes for s in studies), default=0)
    counts = [f"{total(column):,}" for column in _COUNTS]
    return [name, *counts, *(f"{total(column) / 1e12:,.2f}" for column in _FLOPS), f"{memory / 2**20:,.0f}"]


def _weights(weights: WeightsPlan) -> str:
    computed = f"{_gigabytes(weights.compute_bytes)} in {weights.compute_dtype}"
    if weights.stored_bytes is None:
        return f"weights: {computed}; how they are stored, config.json does not say"
    return f"weights: {_gigabytes(weights.stored_bytes)} as stored ({weights.stored_dtype}), {computed}"


def _streamed(gpu: GpuWeights) -> str:
    fits = "the weights stay in its memory" if gpu.is_resident else "the weights do not fit its memory"
    return (
        f"one {gpu.device}, bfloat16: {fits}; streamed: a wave of {gpu.rows:,} tokens or more hides the copy of a "
        f"layer ({_gigabytes(gpu.layer_bytes)} at {gpu.link_bytes / 1e9:.0f} GB/s) behind its arithmetic "
        f"({gpu.flops / 1e12:.0f} TFLOP/s)"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3g} GB"
