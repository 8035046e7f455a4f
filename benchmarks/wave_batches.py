"""The batches that the engine makes of real transcripts: what attention is given in a run, for ``tune.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from providers import MIXES, SHARED, load_studies, together
from shapes import model_spec

from psykern import demo
from psykern.data.tokenizer import Tokenizer
from psykern.engine.budgets import Budgets, budgets
from psykern.engine.plan import Wave, plan
from psykern.engine.wave import segments_of
from psykern.kernels import Segments

PACKED = Path(__file__).resolve().parents[1] / ".gpu-data"  # by pack_gpu_data.sh


@dataclass(frozen=True, slots=True, eq=False)
class WaveBatch:
    """The queries of one call of attention, and how long the store is that their segments name rows of."""

    segments: Segments
    store_rows: int

    @property
    def num_queries(self) -> int:
        return len(self.segments.positions)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, without a window."""
        return int((self.segments.positions.long() + 1).sum())


def largest_batches(
    shape: str, count: int | None, device: torch.device, dtype: torch.dtype, suitable: Budgets | None = None
) -> list[WaveBatch]:
    """``count`` (None: all) with the most pairs of a query and a key, of ``bench_score``'s mix for a GPU, or of the
    package's own sample where no transcripts are at hand. Planned for ``shape``, by what suits the device unless
    ``suitable`` is given."""
    data = next((folder for folder in (SHARED, PACKED) if (folder / "psych").is_dir()), None)
    tokenizer = Tokenizer.load(data / "tokenizers" / "qwen3" if data else demo.MODEL)
    studies = load_studies(MIXES["gpu" if data else "demo"], tokenizer, data / "psych" if data else demo.SAMPLE)
    chosen = suitable or budgets(model_spec(shape), device, dtype)
    planned = plan(
        together("all", studies).encoded,
        wave_tokens=chosen.wave_tokens,
        batch_tokens=chosen.batch_tokens,
        carried_price=chosen.carried_price,
    )
    found = [batch for wave in planned.waves() for batch in batches_of(wave)]
    return sorted(found, key=lambda batch: -batch.pairs)[:count]


def batches_of(wave: Wave) -> list[WaveBatch]:
    rows = wave.num_carried + len(wave.token_ids)
    return [WaveBatch(segments_of(wave, b), rows) for b in range(len(wave.batch_offsets) - 1)]
