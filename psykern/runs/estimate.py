"""What scoring would cost, per study, from the model's config and tokenizer alone: no weights are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from psykern.core.clock import Clock
from psykern.core.errors import RowError
from psykern.core.settings import Settings
from psykern.data.dataset import Dataset
from psykern.data.feed import Feed
from psykern.engine.budgets import Cost, budgets, cost
from psykern.engine.plan import Plan
from psykern.kernels.compute import Compute
from psykern.runs.progress import Progress
from psykern.scoring.language import load_language
from psykern.scoring.units import planned, with_unit_tokens


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What scoring one study costs."""

    study: str
    transcripts: int
    responses: int
    tokens: int  # up to each transcript's last scored token
    computed_tokens: int  # after sharing
    scored_rows: int  # rows that go through the last layer's MLP and the head
    branches: int  # answer options of several tokens
    flops_body: int
    flops_attention: int
    flops_head: int
    wave_bytes: int  # memory of the largest wave, beyond the weights

    @classmethod
    def of(cls, study: str, plan: Plan, cost: Cost) -> StudyPlan:
        """Of one plan of the study's transcripts, and its cost."""
        return cls(
            study=study,
            transcripts=plan.num_transcripts,
            responses=plan.num_responses,
            tokens=plan.num_tokens,
            computed_tokens=plan.num_computed,
            scored_rows=plan.num_response_rows,
            branches=plan.num_branches,
            flops_body=cost.flops_body,
            flops_attention=cost.flops_attention,
            flops_head=cost.flops_head,
            wave_bytes=cost.wave_bytes,
        )

    def __add__(self, other: StudyPlan) -> StudyPlan:
        """Two groups of one study together: counts add up, memory is the larger one's."""
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "study"}
        return StudyPlan(study=self.study, **values | {"wave_bytes": max(self.wave_bytes, other.wave_bytes)})


@dataclass(frozen=True, slots=True)
class Estimate:
    """What :func:`estimate` gives."""

    studies: tuple[StudyPlan, ...]
    rejects: tuple[RowError, ...]


def estimate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    settings: Settings | None = None,
    *,
    revision: str | None = None,
    quiet: bool = True,
) -> Estimate:
    """What :func:`psykern.score` would cost, per study.

    Raises ``PsykernError`` where model or data cannot be used, ``BackendError`` for a device that is not there.
    """
    settings, clock = settings or Settings(), Clock()
    compute = Compute.resolve(settings.device, settings.dtype)
    settings = replace(with_unit_tokens(settings, compute), date=settings.date or clock.day)
    spec, language = load_language(model, revision=revision, clock=clock)
    chosen = budgets(spec, compute.device, compute.dtype).under(settings)
    feed = Feed(Dataset.find(data, hashed=False), language.encoder(settings), clock=clock)
    units = feed.units()
    rejects: list[RowError] = []
    plans: dict[str, StudyPlan] = {}
    with Progress(sum(unit.characters for unit in units), quiet=quiet) as progress:
        encoded = feed.encoded(units)
        for item in planned(encoded, settings, spec.max_positions, chosen, begin=progress.start, clock=clock):
            rejects.extend(item.unit.rejects)
            study = item.unit.info.study
            if item.transcripts:
                one = StudyPlan.of(study, item.plan, cost(item.plan, spec, compute.dtype))
                plans[study] = plans[study] + one if study in plans else one
            item.progress(1.0)
    return Estimate(tuple(plans[study] for study in sorted(plans)), tuple(rejects))
