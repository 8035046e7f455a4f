"""What a wave takes, counted by hand, and how large waves are where there is that much memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from support.groups import encoded

from psykern.engine import budgets
from psykern.engine.plan import plan
from psykern.models.families import read_spec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from shapes import model_spec


def test_memory_of_a_wave_counts_everything_that_grows_with_it(tmp_path: Path) -> None:
    """By hand for one transcript of 999 rows in waves of 100: 900 carried rows, in fp32."""
    make_model(tmp_path, **CONFIGS["llama"])  # hidden 64, inner 96, 3 layers, 4 query heads and 2 key heads of 16
    spec = read_spec(tmp_path)
    planned = plan([encoded(range(1000), [(500, 501), (999, 1000)])], wave_tokens=100, batch_tokens=50, min_share=1)
    hidden, store = 100 * 64, 2 * (100 + 900) * 32
    carried = 2 * (2 * 900 * 32 * 3)  # of the last wave, and what is kept for the next
    head = 2 * 1 * 64
    batch = 50 * (5 * 64 + 3 * 64 + 3 * 96)
    assert planned.max_carried_rows == 900
    expected = 4 * (hidden + store + carried + head + batch)
    assert budgets.cost(planned, spec, torch.float32).wave_bytes == expected + 3 * 32 * 2**20


@pytest.mark.parametrize(
    ("shape", "free_gib", "wave_tokens"),
    [
        ("Qwen3-8B", 60, 131_072),  # resident on an H100
        ("Llama-3.1-70B", 72, 131_072),  # streamed: what is free beside two layers
        ("OLMo-3-7B", 60, 16_384),  # 32 key heads: a carried transcript takes 24 GB, twice
        ("Qwen3-8B", 1, 16_384),  # at least: a wave that does not fit is refused before it starts
    ],
)
def test_waves_are_as_large_as_a_device_has_memory_for(
    shape: str, free_gib: int, wave_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda device: free_gib * 2**30)
    got = budgets.budgets(model_spec(shape), torch.device("cuda"), torch.bfloat16)
    assert (got.wave_tokens, got.batch_tokens) == (wave_tokens, 16_384)
