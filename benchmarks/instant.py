"""A run whose model answers at once: everything that ``psykern.score`` does but the arithmetic."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from providers import SHARED
from transformers import AutoConfig, AutoModelForCausalLM

from psykern import Run, Settings, demo
from psykern.core.clock import Clock
from psykern.core.types import TargetScores
from psykern.data.dataset import Dataset
from psykern.data.tokenizer import Tokenizer
from psykern.engine.plan import Plan
from psykern.runs.job import Options
from psykern.runs.run import score_with
from psykern.scoring.loading import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.instant import InstantEngine


def make_tiny(folder: Path) -> Path:
    """A checkpoint of next to no arithmetic, with Qwen3's tokenizer, or the demo's where that is not at hand."""
    tokenizer = SHARED / "tokenizers" / "qwen3"
    source = tokenizer if tokenizer.is_dir() else demo.MODEL
    folder.mkdir()
    shutil.copy(source / "tokenizer.json", folder / "tokenizer.json")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=Tokenizer.load(source).size,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2**17,
        **sizes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def score_instantly(
    model: Path, data: Path, out: Path, settings: Settings, cache: Path | None, scores: Callable[[Plan], TargetScores]
) -> Run:
    """A run whose scores of a plan are what ``scores`` says of it. Its manifest counts loading as ``psykern.score``'s
    does."""
    clock = Clock()
    with clock("load"):
        scorer = load(model, device="cpu")
    with clock("hash"):
        dataset = Dataset.find(data)
    instant = replace(scorer, engine=InstantEngine(scores))
    return score_with(instant, dataset, out, settings, Options(cache=cache), clock)
