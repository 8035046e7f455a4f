"""What scoring would cost, per study, from the model's config and tokenizer alone: no weights are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from psykern.core import csr
from psykern.core.clock import Clock
from psykern.core.errors import RowError
from psykern.core.settings import Settings
from psykern.core.types import EncodedTranscript
from psykern.data.dataset import Dataset
from psykern.data.feed import Feed
from psykern.engine.budgets import Cost, budgets, cost
from psykern.engine.foreign import rows_computed
from psykern.engine.plan import Plan
from psykern.kernels.compute import Compute
from psykern.models.checkpoint import stored_dtype
from psykern.runs.progress import Progress
from psykern.runs.streaming import WeightsPlan
from psykern.scoring.language import load_language
from psykern.scoring.units import planned, with_unit_tokens

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, of bits that look random
_SAMPLE_BITS = 6  # one prefix in 64 is looked at


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What scoring one study costs."""

    study: str
    transcripts: int
    responses: int
    tokens: int  # up to each transcript's last scored token
    computed_tokens: int  # after sharing
    bound_tokens: int  # the same were the study one unit; estimated where it is several, see _Recurring
    scored_rows: int  # rows that go through the last layer's MLP and the head
    branches: int  # answer options of several tokens
    flops_body: int
    flops_attention: int
    flops_head: int
    wave_bytes: int  # memory of the largest wave, beyond the weights

    @classmethod
    def of(cls, study: str, plan: Plan, cost: Cost, computed: int, recurring: int) -> StudyPlan:
        """Of one plan of the study's transcripts, and its cost. ``computed``: rows that go through the model, of which
        so many are ``recurring``: earlier plans have them, too."""
        return cls(
            study=study,
            transcripts=plan.num_transcripts,
            responses=plan.num_responses,
            tokens=plan.num_tokens,
            computed_tokens=computed,
            bound_tokens=computed - recurring,
            scored_rows=plan.num_response_rows,
            branches=plan.num_branches,
            flops_body=cost.flops_body * computed // max(plan.num_computed, 1),
            flops_attention=cost.flops_attention,
            flops_head=cost.flops_head,
            wave_bytes=cost.wave_bytes,
        )

    def __add__(self, other: StudyPlan) -> StudyPlan:
        """Two groups of one study together: counts add up, memory is the larger one's."""
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "study"}
        return StudyPlan(study=self.study, **values | {"wave_bytes": max(self.wave_bytes, other.wave_bytes)})


class _Recurring:
    """Rows that several units of a study compute, as their transcripts begin alike.

    A unit's rows are the distinct prefixes of its transcripts. They are compared by a sample: those whose hash says so,
    which are the same ones in all units. It takes 1/8 byte of memory a row.
    """

    def __init__(self, min_share: int) -> None:
        self._min_share = min_share
        self._seen: dict[str, np.ndarray] = {}  # by study, [prefixes] uint64 hashes, ascending

    def add(self, study: str, transcripts: Sequence[EncodedTranscript]) -> int:
        """About how many rows of a unit are of earlier units of the study, too, and would be shared with them."""
        own = np.unique(csr.concatenate([self._sample(t) for t in transcripts], np.uint64))
        seen = self._seen.get(study, own[:0])
        self._seen[study] = np.union1d(seen, own)
        return int(np.isin(own, seen, assume_unique=True).sum()) << _SAMPLE_BITS

    def _sample(self, t: EncodedTranscript) -> np.ndarray:
        """[prefixes] uint64 hashes, of prefixes that are long enough to be shared."""
        last = max(int(t.spans_tok[:, 1].max(initial=1)) - 1, int(t.branch_parent_tok.max(initial=0)))
        powers = np.cumprod(np.full(last, _MULTIPLIER))  # all is modulo 2^64
        hashes = np.cumsum((t.token_ids[:last].astype(np.uint64) + np.uint64(1)) * powers)[self._min_share - 1 :]
        mixed = (hashes ^ (hashes >> np.uint64(32))) * _MULTIPLIER
        chosen: np.ndarray = hashes[mixed >> np.uint64(64 - _SAMPLE_BITS) == 0]
        return chosen


@dataclass(frozen=True, slots=True)
class Estimate:
    """What :func:`estimate` gives."""

    studies: tuple[StudyPlan, ...]
    rejects: tuple[RowError, ...]
    weights: WeightsPlan
    implementation: str = "native"  # whose modules compute the layers and how; else "transformers: …"


def estimate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    settings: Settings | None = None,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    quiet: bool = True,
) -> Estimate:
    """What :func:`psykern.score` would cost, per study.

    Raises ``PsykernError`` where model or data cannot be used, ``BackendError`` for a device that is not there.
    """
    settings, clock = settings or Settings(), Clock()
    compute = Compute.resolve(settings.device, settings.dtype)
    settings = replace(with_unit_tokens(settings, compute), date=settings.date or clock.day)
    how = settings.implementation
    spec, language = load_language(model, adapter=adapter, revision=revision, implementation=how, clock=clock)
    chosen = budgets(spec, compute.device, compute.dtype).under(settings)
    feed = Feed(Dataset.find(data, hashed=False), language.encoder(settings), clock=clock)
    units = feed.units()
    rejects: list[RowError] = []
    plans: dict[str, StudyPlan] = {}
    recurring = _Recurring(settings.min_share)
    with Progress(sum(unit.characters for unit in units), quiet=quiet) as progress:
        encoded = feed.encoded(units)
        for item in planned(encoded, settings, spec.max_positions, chosen, begin=progress.start, clock=clock):
            rejects.extend(item.unit.rejects)
            study = item.unit.info.study
            if item.transcripts:
                rows = rows_computed(item.plan, spec)
                again = recurring.add(study, item.transcripts) if rows == item.plan.num_computed else 0
                one = StudyPlan.of(study, item.plan, cost(item.plan, spec, compute.dtype), rows, again)
                plans[study] = plans[study] + one if study in plans else one
            item.progress(1.0)
    weights = WeightsPlan.of(spec, compute.dtype, stored_dtype(language.folder))
    return Estimate(tuple(plans[study] for study in sorted(plans)), tuple(rejects), weights, spec.implementation)
