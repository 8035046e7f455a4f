"""What a wave takes, counted by hand, and how large waves are where there is that much memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from support.configs import write
from support.groups import encoded

from psykern.core.settings import Settings
from psykern.core.types import NOTHING_MORE, Wanted
from psykern.engine import budgets
from psykern.engine.plan import plan
from psykern.models.families import read_spec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from shapes import model_spec


def test_memory_of_a_wave_counts_everything_that_grows_with_it(tmp_path: Path) -> None:
    """By hand for one transcript of 999 rows in waves of 100, in fp32: the last but one takes 800 and leaves 900."""
    make_model(tmp_path, **CONFIGS["llama"])  # hidden 64, inner 96, 3 layers, 4 query heads and 2 key heads of 16
    spec = read_spec(tmp_path)
    planned = plan([encoded(range(1000), [(500, 501), (999, 1000)])], wave_tokens=100, batch_tokens=50, min_share=1)
    hidden, store = 100 * 64, 2 * (100 + 800) * 32
    carried = 2 * (800 + 900) * 32 * 3
    batch = 50 * (5 * 64 + 3 * 64 + 3 * 96)
    assert planned.max_carried_rows == 900
    expected = 4 * (hidden + store + carried + batch)  # no response is in that wave
    assert budgets.cost(planned, spec, torch.float32).wave_bytes == expected + 3 * 32 * 2**20


def test_the_longest_transcript_of_the_studies_is_a_wave_of_its_own() -> None:
    """41,002 tokens, which carried from wave to wave would take 11 GB and more."""
    group = [encoded(range(41_002), [(41_001, 41_002)])]
    spec = model_spec("Qwen3-8B")
    chosen = budgets.budgets(spec, torch.device("cpu"), torch.float32)
    planned = plan(group, wave_tokens=32_768, batch_tokens=2048, carried_price=chosen.carried_price)
    assert (planned.num_waves, planned.max_wave_rows) == (1, 41_001)
    assert budgets.cost(planned, spec, torch.float32).wave_bytes < 2e9
    hard = plan(group, wave_tokens=32_768, batch_tokens=2048)
    assert budgets.cost(hard, spec, torch.float32).wave_bytes > 11e9


def test_the_price_of_a_carried_row() -> None:
    """Qwen3-8B: 36 layers of 2,048 keys and values, twice, and once in the store, against 4,096 and 2,048 of a row."""
    chosen = budgets.budgets(model_spec("Qwen3-8B"), torch.device("cpu"), torch.float32)
    assert chosen.carried_price == (2 * 36 * 2048 + 2048) / (4096 + 2048)
    assert chosen.under(Settings(wave_tokens=7)) == replace(chosen, wave_tokens=7)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "batch"), [(8, 2, 2048), (64, 8, 4096), (128, 8, 8192), (128, 1, 8192)]
)
def test_batches_of_a_mixture_of_experts_give_each_expert_rows(
    num_experts: int, top_k: int, batch: int, tmp_path: Path
) -> None:
    config = {"num_experts": num_experts, "num_experts_per_tok": top_k}
    spec = read_spec(write(tmp_path, model_type="qwen3_moe", mlp_only_layers=[1], **config))
    assert budgets.budgets(spec, torch.device("cpu"), torch.float32).batch_tokens == batch


def test_memory_of_what_is_read_out_is_counted_where_it_is_wanted() -> None:
    spec = model_spec("Qwen3-8B")

    def wave_bytes(wanted: Wanted) -> int:
        planned = plan([encoded(range(20), [(10, 11)])], wave_tokens=64, batch_tokens=8, wanted=wanted)
        return budgets.cost(planned, spec, torch.float32).wave_bytes

    table, tile = 32 * 2**20, 4 * 8192 * 4096
    assert wave_bytes(Wanted(full=True)) - wave_bytes(NOTHING_MORE) == table + tile
    assert wave_bytes(Wanted(rank=True)) - wave_bytes(NOTHING_MORE) == 3 * table + tile


@pytest.mark.parametrize(
    ("shape", "free_gib", "wave_tokens"),
    [
        ("Qwen3-8B", 60, 131_072),  # resident on an H100
        ("Llama-3.1-70B", 72, 131_072),  # streamed: what is free beside two layers
        ("OLMo-3-7B", 60, 131_072),  # 32 key heads; 16,384 where a transcript carried in all layers had its place
        ("Qwen3-8B", 1, 16_384),  # at least: a wave that does not fit is refused before it starts
    ],
)
def test_waves_are_as_large_as_a_device_has_memory_for(
    shape: str, free_gib: int, wave_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda device: free_gib * 2**30)
    got = budgets.budgets(model_spec(shape), torch.device("cuda"), torch.bfloat16)
    assert (got.wave_tokens, got.batch_tokens) == (wave_tokens, 16_384)
