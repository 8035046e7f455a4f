"""One run of one model over one data set: encoded units in, parts of the run's folder out.

    EncodedUnit ─ plan ─► PlannedUnit ─ Engine.pairs ─► TargetScores ─ table ─► part of RUN

Transcripts go through in units: some of one study, planned together so that they share prefixes, and written as one
part. Planning of the next units and writing of the last go on in threads beside the computing of one; memory is
bounded by the unit and the window that it is cut of, not by the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from psykern.core.clock import Clock, timed
from psykern.core.errors import InterruptedRun
from psykern.core.settings import Settings, Shard
from psykern.core.stages import ahead, behind
from psykern.core.types import EncodedUnit, TargetScores, UnitInfo
from psykern.data.dataset import Dataset
from psykern.engine.foreign import rows_computed
from psykern.models.decoder import DecoderSpec
from psykern.runs.folder import RunFolder, UnitReport, date_in
from psykern.runs.manifest import (
    Counts,
    InputAdapter,
    InputFile,
    Manifest,
    Outcome,
    Recipe,
    library_versions,
    peak_memory_bytes,
)
from psykern.runs.order import PartOrder
from psykern.runs.progress import Progress
from psykern.runs.summary import Summary, SummaryAccumulator
from psykern.scoring.scorer import Scorer
from psykern.scoring.table import to_table
from psykern.scoring.units import PlannedUnit, planned
from psykern.version import __version__


@dataclass(frozen=True, slots=True)
class Run:
    """What a run leaves: the folder of records, and what those that are there come to."""

    folder: Path | str  # a string where it is a URL
    manifest: Manifest  # not finished while units are missing, which other shards are to score
    summary: Summary
    units_done: int
    units_total: int


@dataclass(frozen=True, slots=True)
class Options:
    """How a process takes part in a run: what does not change the records."""

    shard: Shard = field(default_factory=Shard)
    resume: bool = True
    cache: str | Path | None = None  # folder of tokens; None: they are not kept
    stop: Callable[[], bool] = lambda: False  # asked between waves
    quiet: bool = True


def recipe_of(scorer: Scorer, dataset: Dataset, out: str | Path, settings: Settings, clock: Clock) -> Recipe:
    """How a run that begins now in ``out`` is made, on the date of the one that is there, if one is. ``settings`` must
    name their ``unit_tokens``."""
    compute, language, budgets = scorer.model.compute, scorer.language, scorer.budgets.under(settings)
    chat = language.chat if settings.condition == "chat" else None
    assert settings.unit_tokens is not None
    return Recipe(
        model_id=scorer.name,
        model_hash=scorer.hash,
        adapter=InputAdapter(str(scorer.adapter), scorer.adapter_hash) if scorer.adapter_hash is not None else None,
        weights="; ".join(scorer.model.changes) or None,
        tokenizer_hash=language.tokenizer.hash,
        beyond_embedding=language.beyond,
        data=tuple(InputFile(str(file.path), file.hash, file.bytes) for file in dataset.files),
        protocol=settings.protocol,
        condition=settings.condition,
        discrete=settings.discrete,
        chat_template_hash=chat.hash if chat else None,
        date=(settings.date or date_in(out) or clock.day) if chat and chat.asks_for_date else None,
        boundary=settings.boundary,
        marks=settings.marks,
        options=settings.options,
        max_options=settings.max_options,
        over_length=settings.over_length,
        limit=settings.limit,
        studies=settings.studies,
        same_participants=settings.same_participants,
        versions=library_versions(__version__),
        device=torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else "cpu",
        dtype=str(compute.dtype).removeprefix("torch."),
        implementation=scorer.model.spec.implementation,
        backend=compute.backend,
        arithmetic=compute.arithmetic,
        company_free=compute.is_company_free,
        wave_tokens=budgets.wave_tokens,
        batch_tokens=budgets.batch_tokens,
        min_share=settings.min_share,
        unit_tokens=settings.unit_tokens,
        started=clock.started.isoformat(timespec="seconds"),
    )


@dataclass(frozen=True, slots=True, eq=False)
class RunJob:
    """A run that has begun. Each of its processes has one."""

    settings: Settings
    recipe: Recipe
    folder: RunFolder

    @classmethod
    def open(cls, out: str | Path, recipe: Recipe, settings: Settings, *, resume: bool = True) -> RunJob:
        """Begins the run in ``out``, or goes on with the one there: with its start, with its date where the settings
        name none, and so with its budgets, unless no score depends on them. Raises RunFolderError."""
        folder = RunFolder.open(out, recipe, resume=resume, any_date=settings.date is None)
        budgets = vars(recipe) if recipe.company_free else folder.began
        going_on = replace(
            recipe,
            date=folder.began["date"] if recipe.date else None,
            arithmetic=_both(folder.began.get("arithmetic"), recipe.arithmetic),
            started=folder.began["started"],
            wave_tokens=settings.wave_tokens or budgets["wave_tokens"],
            batch_tokens=settings.batch_tokens or budgets["batch_tokens"],
        )
        return cls(settings, going_on, folder)

    def score(
        self,
        scorer: Scorer,
        units: Iterator[EncodedUnit],
        progress: Progress,
        clock: Clock,
        stop: Callable[[], bool] = lambda: False,
    ) -> Counts:
        """The pipeline from rows to records: scores ``units`` and writes their parts; gives what went through."""
        recipe = self.recipe
        budgets = replace(scorer.budgets, wave_tokens=recipe.wave_tokens, batch_tokens=recipe.batch_tokens)
        max_positions = scorer.model.spec.max_positions
        start = progress.start
        done: list[Counts] = []
        with (
            ahead(units) as encoded,
            ahead(planned(encoded, self.settings, max_positions, budgets, begin=start, clock=clock)) as ready,
            behind(partial(self._write, clock, scorer.model.spec, done)) as put,
            closing(scorer.engine.pairs(ready, stop=stop)) as pairs,
        ):
            for pair in timed(pairs, clock, "run"):
                put(pair)
        return sum(done, Counts())

    def _write(
        self, clock: Clock, spec: DecoderSpec, done: list[Counts], pair: tuple[PlannedUnit, TargetScores]
    ) -> None:
        item, scores = pair
        with clock("write"):
            table = to_table(item.transcripts, scores)
            summary = SummaryAccumulator()
            summary.add(table)
            scored = table.num_rows - table.column("logprob").null_count
            counts = _counts(item, scored, rows_computed(item.plan, spec))
            report = UnitReport(counts, item.unit.rejects, summary.sums)
            self.folder.write_part(item.unit.info, table, report, _order(item))
        done.append(counts)

    def check_stopped(self, units: Sequence[UnitInfo], wanted: Sequence[UnitInfo], stop: Callable[[], bool]) -> None:
        """Raises InterruptedRun where ``stop`` left some of the units ``wanted`` undone."""
        if stop() and not all(self.folder.has(unit) for unit in wanted):
            done = sum(self.folder.has(unit) for unit in units)
            raise InterruptedRun(
                f"{self.folder.folder.path}: stopped as asked; {done:,} of {len(units):,} units are done, "
                "and the same command goes on"
            )

    def finish(self, units: Sequence[UnitInfo], done: Counts, clock: Clock, idle_share: float | None) -> Run:
        """Adds up what is there, and finishes the run where nothing is missing. ``done`` went through this process."""
        self.folder.look_again()
        reports = list(self.folder.reports(units))
        accumulator = SummaryAccumulator()
        for report in reports:
            accumulator.add_sums(report.sums)
        summary, is_whole = accumulator.summary(), len(reports) == len(units)
        outcome = Outcome(
            counts=sum((report.counts for report in reports), Counts()),
            seconds=clock.seconds | {"total": clock.total},
            tokens_per_second=done.tokens / clock.total,
            responses_per_second=done.responses / clock.total,
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_bytes=_peak_device_bytes(),
            gpu_idle_share=idle_share,
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds") if is_whole else None,
        )
        manifest = Manifest.of(self.recipe, outcome)
        if is_whole:
            self.folder.finish(manifest, summary.to_json(), (error for report in reports for error in report.rejects))
        local = self.folder.folder.local
        return Run(self.folder.folder.path if local is None else local, manifest, summary, len(reports), len(units))


def _both(at_start: str | None, now: str | None) -> str | None:
    """The arithmetic of a run that goes on, on another machine perhaps."""
    if at_start is None or now is None or now in at_start.split("; "):
        return at_start or now
    return f"{at_start}; {now}"


def _order(item: PlannedUnit) -> PartOrder | None:
    if item.unit.info.group is None:
        return None
    places = [transcript.place for transcript in item.transcripts]
    return PartOrder(item.unit.info.group, places, [len(transcript.responses) for transcript in item.transcripts])


def _counts(item: PlannedUnit, scored_responses: int, computed_tokens: int) -> Counts:
    return Counts(
        transcripts=item.plan.num_transcripts,
        responses=item.plan.num_responses,
        scored_responses=scored_responses,
        tokens=item.plan.num_tokens,
        computed_tokens=computed_tokens,
        rejects=len(item.unit.rejects),
        over_length_transcripts=len(item.unit.transcripts) - len(item.transcripts),
        dropped_responses=sum(transcript.num_dropped for transcript in item.transcripts),
        without_metadata_transcripts=item.unit.without_metadata,
        without_id_transcripts=item.unit.without_id,
        shared_participants=item.unit.shared_participants,
        repeated_transcripts=item.unit.repeated,
    )


def _peak_device_bytes() -> int | None:
    """Of the device that was used, as the others' peaks are 0; None: none was."""
    if not torch.cuda.is_initialized():
        return None
    return max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
