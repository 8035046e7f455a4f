"""benchmarks/roofline.py: its formulas against numbers by hand, the engine's own count and published sizes."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import roofline
import shapes
import torch
from support.groups import random_group

from psykern.engine.budgets import cost
from psykern.engine.plan import plan

ROOT = Path(__file__).resolve().parents[2]

# Billions of weights as the model cards give them, rounded there by up to 1.3 %.
PUBLISHED = {
    "Qwen2.5-0.5B": 0.49,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-7B": 7.61,
    "Qwen2.5-14B": 14.7,
    "Qwen2.5-32B": 32.5,
    "Qwen2.5-72B": 72.7,
    "Qwen3-0.6B": 0.6,
    "Qwen3-1.7B": 1.7,
    "Qwen3-4B": 4.0,
    "Qwen3-8B": 8.2,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "Llama-3.2-1B": 1.23,
    "Llama-3.2-3B": 3.21,
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.6,
    "OLMo-3-7B": 7.3,
    "OLMo-3-32B": 32.2,
}
H100 = roofline.Roof(roofline.DEVICES[0])


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_shape_has_the_published_number_of_weights(name: str) -> None:
    assert shapes.num_weights(shapes.model_spec(name)) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.015)


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen2.5-7B", "OLMo-3-7B"])
def test_flops_are_those_that_the_engine_counts_for_a_plan(name: str) -> None:
    """Of transcripts that share prefixes, with options of several tokens; windows that act."""
    spec = shapes.model_spec(name)
    if name == "OLMo-3-7B":
        windows = [40 if layer.mixer.window else None for layer in spec.layers]
        mixers = [replace(layer.mixer, window=window) for layer, window in zip(spec.layers, windows, strict=True)]
        layers = (replace(layer, mixer=mixer) for layer, mixer in zip(spec.layers, mixers, strict=True))
        spec = replace(spec, layers=tuple(layers))
    planned = plan(
        random_group(np.random.default_rng(5), 10, 320, 3), wave_tokens=100_000, batch_tokens=512, min_share=4
    )
    expected = cost(planned, spec, torch.bfloat16)
    rows, responses = planned.num_computed, planned.num_response_rows
    works = roofline.head_work(spec, responses)
    *body, last = spec.layers
    for layer in body:
        works += roofline.layer_work(layer, rows, rows, planned.visible_keys(layer.mixer.window), 1)
    keys = planned.visible_keys_of_responses(last.mixer.window)
    works += roofline.layer_work(last, rows, responses, keys, 1)
    flops = {
        "attention": sum(w.flops for w in works if w.op == "attention"),
        "head": sum(w.flops for w in works if w.op == "option_logprobs"),
        "all": sum(w.flops for w in works),
    }
    assert flops["attention"] == expected.flops_attention
    assert flops["head"] == expected.flops_head
    assert flops["all"] == expected.flops_attention + expected.flops_head + expected.flops_body


def test_bytes_and_times_of_a_layer_by_hand() -> None:
    """Qwen3-0.6B: D 1024, F 3072, 16 heads of 128 on 8; 1,000 rows of one transcript."""
    spec = shapes.model_spec("Qwen3-0.6B")
    works = {w.op: w for w in roofline.layer_work(spec.layers[0], 1000, 1000, 500_500, 1)}
    assert works["qkv_proj"].flops == 2 * 1000 * 1024 * 4096
    assert works["qkv_proj"].bytes == 2 * (1000 * 1024 + 1024 * 4096 + 1000 * 4096)
    assert works["down_proj"].bytes == 2 * (1000 * 3072 + 3072 * 1024 + 1000 * 1024)
    assert works["attention"].bytes == 2 * (2 * 1000 * 2048 + 2 * 1024 * 1001)
    assert works["add_rms_norm"].bytes == 2 * 4 * 1000 * 1024
    assert works["silu_mul"].bytes == 2 * 3 * 1000 * 3072
    seconds = 2 * 3 * 1000 * 3072 / (3.35e12 * 0.85)
    assert H100.seconds(works["silu_mul"]) == pytest.approx(seconds, rel=1e-12)
    assert H100.bound(works["silu_mul"]) == "memory"
    assert H100.seconds(works["attention"]) == pytest.approx(4 * 2048 * 500_500 / (989e12 * 0.5), rel=1e-12)
    assert H100.bound(works["attention"]) == "compute"


def test_the_experts_of_a_layer_by_hand() -> None:
    """2 rows, each to 1 of 2 experts, D 3, F 5: an expert is read where one of the rows goes to it, which is 3 times in
    4."""
    router, gated, linear, added = roofline.Mixture(hidden=3, inner=5, num_experts=2, top_k=1).work(2)
    assert [w.flops for w in (router, gated, linear)] == [2 * 2 * 3 * 2, 2 * 2 * 3 * 5 * 2, 2 * 2 * 3 * 5]
    assert gated.bytes == 2 * (2 * 3 + 1.5 * 2 * 15 + 2 * 5)
    assert linear.bytes == 2 * (2 * 5 + 1.5 * 15 + 2 * 3)
    assert added.bytes == 2 * (2 + 2 * 2) * 3
    assert H100.seconds(roofline.Work("", 523e12, 0, "experts")) == pytest.approx(1, rel=0.01)


def test_keys_and_values_that_no_cache_holds_are_read_for_each_tile_of_queries() -> None:
    spec = shapes.model_spec("Qwen3-0.6B")
    path = 2 * 40_000 * 1024 * 2  # bytes of the keys and values of 40,000 tokens
    keys = 40_000 * 40_001 // 2
    works = [
        next(w for w in roofline.layer_work(spec.layers[0], 40_000, 40_000, keys, 1, l2) if w.op == "attention")
        for l2 in (2.01 * path, 1.9 * path)
    ]
    queries = 2 * 40_000 * 2048 * 2
    assert works[0].bytes == pytest.approx(queries + path, rel=1e-4)
    assert works[1].bytes == pytest.approx(queries + path * 40_000 / 2 / 128, rel=1e-4)


def test_visible_keys_of_a_mixture_by_hand() -> None:
    """A transcript of 3 tokens (1 + 2 + 3 keys) and two of 1."""
    data = roofline.Dataset(tokens=5, computed_share=1, response_share=1, lengths=((1, 3), (2, 1)))
    assert data.visible_keys(None) == (6 + 2) / 5
    assert data.visible_keys(2) == (1 + 2 + 2 + 2) / 5
    assert data.visible_keys(100) == data.visible_keys(None)


def test_the_lengths_are_those_of_the_statistics(shared: Path) -> None:
    table = []
    for line in (shared / "psych" / "STATISTICS.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            table.append((int(cells[1].split()[0]), int(cells[4].split("/")[0])))
    assert tuple(table) == roofline.STUDIES


def test_a_model_larger_than_the_memory_waits_for_its_weights_only_in_small_waves() -> None:
    spec = shapes.model_spec("Qwen2.5-72B")
    large, small = (roofline.predict(spec, H100, roofline.PSYCH_201, 16_384, rows) for rows in (131_072, 4096))
    assert large.is_streamed and small.is_streamed
    seconds = 0.92e9 / 4096 * 2 * 72.706e9 / (64e9 * 0.8)
    assert small.hours_weights == pytest.approx(seconds / 3600, rel=1e-3)
    assert small.hours(0.0) == small.hours_weights > small.hours_compute
    assert large.hours(0.0) == large.hours_compute > large.hours_weights
    fits = roofline.predict(shapes.model_spec("Qwen3-8B"), H100, roofline.PSYCH_201, 16_384, 131_072)
    assert not fits.is_streamed and fits.hours_weights == 0.0


def test_the_hours_of_the_dataset_by_hand() -> None:
    """Qwen3-8B: 6.9 billion weights in the layers; the products alone, and everything with attention, on an H100."""
    spec = shapes.model_spec("Qwen3-8B")
    found = roofline.predict(spec, H100, roofline.PSYCH_201, 16_384, 131_072)
    rows, responses = 0.92e9, 0.034e9
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12_288
    products = 2 * (rows * 35 * layer + rows * 2 * 4096 * 1024 + responses * (layer - 2 * 4096 * 1024))
    products += 2 * responses * 4096 * 151_936
    attention = 4 * 4096 * (35 * rows + responses) * roofline.PSYCH_201.visible_keys(None)
    least = products / (989e12 * 0.75) + attention / (989e12 * 0.5)
    moved = 2 * rows * 35 * (2 * 4096 + 2 * 4096 + 4 * 1024 + 4 * 4096 + 3 * 12_288) / (3.35e12 * 0.85)
    assert found.hours_compute == pytest.approx((least + moved) / 3600, rel=0.01)


def test_the_committed_table_is_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    roofline.main(["--name", "roofline"])
    committed = ROOT / "benchmarks" / "results" / "roofline.csv"
    assert (tmp_path / "roofline.csv").read_text() == committed.read_text()
    with committed.open() as file:
        totals = [row for row in csv.DictReader(file) if row["scope"] == "dataset"]
    assert {(row["device"], row["model"]) for row in totals} == {
        (device.name, model) for device in roofline.DEVICES for model in shapes.SHAPES
    }
