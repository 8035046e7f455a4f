"""What scoring would cost: counted like a run, without weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scoring import (
    score,
)
from support.toy import (
    Toy,
    write_rows,
)
from torch.utils.flop_counter import FlopCounterMode

import psykern
from psykern import Settings
from psykern.kernels import dispatch


@pytest.mark.parametrize(
    "settings", [{}, {"protocol": "study"}, {"options": "observed"}], ids=["default", "study", "observed"]
)
def test_the_estimate_counts_what_a_run_computes(toy: Toy, tmp_path: Path, settings: dict[str, Any]) -> None:
    counts = score(toy.model, toy.data, tmp_path, **settings).manifest.counts
    estimate = psykern.estimate(toy.model, toy.data, Settings(device="cpu", **settings))
    assert [study.study for study in estimate.studies] == ["bandit", "ratings", "words"]
    for name in ("transcripts", "responses", "tokens", "computed_tokens"):
        assert sum(getattr(study, name) for study in estimate.studies) == getattr(counts, name), name


def test_the_estimate_counts_what_studies_share(toy: Toy, tmp_path: Path) -> None:
    """Studies whose transcripts begin alike, as parts of one experiment do."""
    front = "Thank you for taking part in this experiment. Please read what follows with care. " * 3
    data = write_rows(tmp_path / "rows.jsonl", [row | {"text": front + row["text"]} for row in toy.rows])
    counts = score(toy.model, data, tmp_path / "run").manifest.counts
    estimate = psykern.estimate(toy.model, data, Settings(device="cpu"))
    assert sum(study.computed_tokens for study in estimate.studies) == counts.computed_tokens


def test_the_estimate_of_several_units(toy: Toy, tmp_path: Path) -> None:
    """Counts add up; memory is that of the largest unit."""
    settings = Settings(device="cpu", min_share=10**6)
    one = psykern.estimate(toy.model, toy.data, settings)
    several = psykern.estimate(toy.model, toy.data, replace(settings, unit_tokens=1))
    largest: dict[str, int] = {}
    for row in toy.rows:
        (alone,) = psykern.estimate(toy.model, write_rows(tmp_path / "rows.jsonl", [row]), settings).studies
        largest[alone.study] = max(alone.wave_bytes, largest.get(alone.study, 0))
    for whole, parts in zip(one.studies, several.studies, strict=True):
        assert parts.wave_bytes == largest[parts.study] < whole.wave_bytes
        assert replace(parts, wave_bytes=whole.wave_bytes) == whole


def test_the_estimate_of_operations(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, from config.json: one transcript, no options. And the matrix products that torch counts in a run."""
    data = write_rows(tmp_path / "rows.jsonl", toy.rows[:1])
    estimate = psykern.estimate(toy.model, data, Settings(device="cpu", options="none"))
    _, places = toy.oracle.spans(toy.rows[0]["text"], "exact", "joint")
    targets = [place for of in places for place in of]
    rows, scored = max(targets), len(targets)
    config = json.loads((toy.model / "config.json").read_text())
    layers, hidden, inner = (config[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    queries, keys = (config["head_dim"] * config[k] for k in ("num_attention_heads", "num_key_value_heads"))
    all_rows = 2 * rows * 2 * hidden * keys  # keys and values
    query_rows = 2 * (2 * hidden * queries + 3 * hidden * inner)  # per row: queries, output, three of the MLP
    (study,) = estimate.studies
    assert study.flops_body == layers * all_rows + ((layers - 1) * rows + scored) * query_rows
    seen = (layers - 1) * rows * (rows + 1) // 2 + sum(targets)  # the row before place p sees p keys
    assert study.flops_attention == 4 * queries * seen
    assert study.flops_head == 2 * scored * hidden * config["vocab_size"]
    assert study.scored_rows == scored
    assert (study.transcripts, study.responses, study.branches) == (1, len(places), 0)
    monkeypatch.setattr(dispatch, "is_traced", lambda x: False)  # else the counter sees psykern's operators alone
    with FlopCounterMode(display=False) as counter:
        score(toy.model, data, tmp_path / "run", options="none", backend="reference")
    products = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert products == study.flops_body + study.flops_head


def test_the_estimate_needs_no_weights(toy: Toy, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(toy.model / name, tmp_path / name)
    assert psykern.estimate(tmp_path, toy.data) == psykern.estimate(toy.model, toy.data)


def test_a_smaller_wave_needs_less_memory(toy: Toy) -> None:
    few, many = (psykern.estimate(toy.model, toy.data, Settings(device="cpu", wave_tokens=n)) for n in (64, 4096))
    for small, large in zip(few.studies, many.studies, strict=True):
        assert small.wave_bytes < large.wave_bytes
        assert small.computed_tokens == large.computed_tokens
        assert large.wave_bytes >= 4 * 64 * 2 * large.computed_tokens  # hidden states and a layer's keys, in float32


def test_the_estimate_does_not_read_files_from_end_to_end(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psykern.data.dataset.hash_file", lambda _: pytest.fail("a file was hashed"))
    assert psykern.estimate(toy.model, toy.data, Settings(device="cpu")).studies


def test_the_bound_is_what_one_unit_would_compute(toy: Toy, tmp_path: Path) -> None:
    """Of units that are cut within long fronts, which are computed again; a sample of rows is compared."""
    front = "Thank you for taking part in this experiment. Please read what follows with care. " * 24
    rows = [{"text": f"{front}{'abc'[i % 3] * 900} You press <<{i % 2}>>."} for i in range(24)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    ((several,), (one,)) = (
        psykern.estimate(toy.model, data, Settings(device="cpu", unit_tokens=size)).studies for size in (1500, 10**6)
    )
    assert one.bound_tokens == one.computed_tokens
    assert several.computed_tokens > 1.5 * one.computed_tokens
    again = several.computed_tokens - one.computed_tokens
    assert abs(several.bound_tokens - one.computed_tokens) < 0.35 * again
