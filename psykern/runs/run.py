"""The pipeline: rows in, one record per response out.

    rows ─ read ─► Transcript ─ encode ─► EncodedTranscript ─ plan ─► Wave… ─ run ─► TargetScores ─ write ─► parquet

Transcripts go through in units: neighbours of one study, planned together so that they share prefixes, and written as
one part. Reading, tokenizing and planning of the next units, and the writing of the last, go on in threads beside the
computing of one; memory is bounded by the unit, not by the data. A part that is there is never computed again, so a run
that was stopped goes on, and several processes can share one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from psykern import kernels
from psykern.core.clock import Clock, timed
from psykern.core.errors import CheckpointError, InterruptedRun, RowError
from psykern.core.folder import Folder
from psykern.core.settings import (
    Condition,
    Settings,
    Shard,
    having,
)
from psykern.core.stages import ahead, behind
from psykern.core.types import EncodedTranscript, EncodedUnit, TargetScores, UnitInfo
from psykern.data.chat import ChatTemplate
from psykern.data.context import fit
from psykern.data.dataset import Dataset
from psykern.data.encode import Encoder
from psykern.data.feed import Feed
from psykern.data.token_cache import TokenCache
from psykern.data.tokenizer import Tokenizer
from psykern.engine import engine
from psykern.engine.plan import Plan, plan
from psykern.models.checkpoint import hash_model, resolve_model
from psykern.models.model import Model, ModelConfig
from psykern.runs import folder as records
from psykern.runs.folder import Counts, Manifest, RunFolder, UnitReport
from psykern.runs.progress import Progress
from psykern.runs.summary import Summary, SummaryAccumulator
from psykern.scoring.table import to_table
from psykern.version import __version__

# Tokens of a unit. What a stop loses and a machine takes at a time is one unit; what shares prefixes is of one unit.
_UNIT_TOKENS = {"cpu": 2**17, "cuda": 2**21}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Run:
    """What :func:`score` leaves: the folder of records, and what those that are there come to."""

    folder: Path | str  # a string where it is a URL
    manifest: Manifest  # not finished while units are missing, which other shards are to score
    summary: Summary
    units_done: int
    units_total: int


def score(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: Settings | None = None,
    *,
    shard: Shard | None = None,
    resume: bool = True,
    cache: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
) -> Run:
    """Score every response of ``data`` under ``model`` and write the records to the folder ``out``.

    model: a folder or a hub id. data: files, folders or hub dataset ids. out: a folder or an fsspec URL, new or empty,
    or one where this run was begun: then what is missing is scored (``resume``). ``shard`` takes a part of the units,
    for several processes that share ``out``; the last one to end finishes the run. ``cache``: a folder where tokens
    are kept. ``stop`` is asked between units.

    Rows that cannot be used are listed in ``out/rejects.jsonl`` and counted in the manifest. Raises ``InterruptedRun``
    when ``stop`` held, ``PsykernError`` for whatever stops the run, and ``kernels.BackendError`` for a backend that is
    not there; parts that were written stay valid.
    """
    settings, clock = settings or Settings(), Clock()
    _check_backend(settings)
    Folder.at(out).create()
    loaded = load(model, settings, (settings.condition,), clock)
    dataset, hashed = find_and_hash(data, clock)
    how = _How(shard or Shard(), resume, cache, stop, quiet)
    return _score(loaded, dataset, hashed, out, settings, how, clock)


def score_conditions(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    conditions: Sequence[Condition],
    settings: Settings | None = None,
    *,
    shard: Shard | None = None,
    resume: bool = True,
    cache: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
) -> tuple[Run, ...]:
    """:func:`score` under each of ``conditions``, in the folders ``out/CONDITION``; the weights are loaded once.

    Raises ValueError for a condition that repeats, and what :func:`score` raises.
    """
    if not conditions or len(set(conditions)) < len(conditions):
        raise ValueError(f"condition: expected different ones, got {','.join(conditions) or 'none'}")
    each = [replace(settings or Settings(), condition=condition) for condition in conditions]
    clock = Clock()
    _check_backend(each[0])
    folders = [f"{out}/{condition}" for condition in conditions]
    for folder in folders:
        Folder.at(folder).create()
    loaded = load(model, each[0], conditions, clock)
    dataset, hashed = find_and_hash(data, clock)
    how = _How(shard or Shard(), resume, cache, stop, quiet)
    runs = []
    for folder, own in zip(folders, each, strict=True):
        runs.append(_score(loaded, dataset, hashed, folder, own, how, clock))
        clock = Clock()  # loading counts to the first
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class _How:
    """What does not change the records."""

    shard: Shard
    resume: bool
    cache: str | Path | None
    stop: Callable[[], bool]
    quiet: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its tokenizer, ready to score."""

    name: str
    hash: str
    decoder: Model
    tokenizer: Tokenizer
    chat: ChatTemplate | None  # None: no condition needs it


def load(model: str | Path, settings: Settings, conditions: Sequence[Condition], clock: Clock) -> Loaded:
    device, dtype = _device_and_dtype(settings)
    with clock("load"):
        folder = resolve_model(model)
        chat = ChatTemplate.load(folder) if "chat" in conditions else None  # what can be missing comes first
        decoder = Model(folder, device=device, dtype=dtype)
        tokenizer = _load_tokenizer(folder, decoder.config)
    with clock("hash"):
        return Loaded(str(model), hash_model(folder), decoder, tokenizer, chat)


def load_tokenizers(model: str | Path, settings: Settings, clock: Clock) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer, and the chat template where the condition needs it, without the weights."""
    with clock("load"):
        folder = resolve_model(model, weights=False)
        chat = ChatTemplate.load(folder) if settings.condition == "chat" else None
        return _load_tokenizer(folder, ModelConfig.read(folder)), chat


def find_and_hash(
    data: str | Path | Sequence[str | Path], clock: Clock
) -> tuple[Dataset, tuple[records.DataFile, ...]]:
    """The data's files, and what the manifest says of each."""
    with clock("hash"):
        dataset = Dataset.find(data)
    return dataset, tuple(records.DataFile(str(f.path), f.hash, f.bytes) for f in dataset.files)


def _score(
    loaded: Loaded,
    dataset: Dataset,
    hashed: tuple[records.DataFile, ...],
    out: str | Path,
    settings: Settings,
    how: _How,
    clock: Clock,
) -> Run:
    """One run of a loaded model."""
    manifest = manifest_of(loaded, hashed, settings, clock)
    feed = data_feed(dataset, loaded.tokenizer, loaded.chat, settings, manifest, clock, how.cache)
    with clock("scan"):
        units = feed.units()
    run = RunFolder.open(out, manifest, resume=how.resume)
    manifest = going_on(manifest, run, settings)
    wanted = [unit for unit in units if how.shard.takes(unit) and not run.has(unit)]
    device_clock = engine.DeviceClock()
    with Progress(sum(unit.characters for unit in wanted), quiet=how.quiet) as progress:
        encoded = feed.encoded(wanted)
        done = score_units(loaded, encoded, run, manifest, settings, clock, progress, how.stop, device_clock)
    check_stopped(out, run, units, wanted, how.stop)
    return finish(run, units, manifest, done, clock, device_clock.idle_share)


def check_stopped(
    out: str | Path, run: RunFolder, units: Sequence[UnitInfo], wanted: Sequence[UnitInfo], stop: Callable[[], bool]
) -> None:
    """Raises InterruptedRun where ``stop`` left some of the units ``wanted`` undone."""
    if stop() and not all(run.has(unit) for unit in wanted):
        done = sum(run.has(unit) for unit in units)
        raise InterruptedRun(
            f"{out}: stopped as asked; {done:,} of {len(units):,} units are done, and the same command goes on"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A unit that is planned."""

    unit: EncodedUnit
    transcripts: list[EncodedTranscript]  # those of the unit that fit the model's context, cut to it
    plan: Plan


def _jobs(
    units: Iterator[EncodedUnit], settings: Settings, config: ModelConfig, budgets: engine.Budgets, clock: Clock
) -> Iterator[_Job]:
    for unit in units:
        with clock("plan"):
            fitting = (fit(t, settings.over_length, config.max_positions) for t in unit.transcripts)
            transcripts = [transcript for transcript in fitting if transcript is not None]
            planned = plan(
                transcripts,
                wave_tokens=budgets.wave_tokens,
                batch_tokens=budgets.batch_tokens,
                min_share=settings.min_share,
            )
        yield _Job(unit, transcripts, planned)


def score_units(
    loaded: Loaded,
    units: Iterator[EncodedUnit],
    run: RunFolder,
    manifest: Manifest,
    settings: Settings,
    clock: Clock,
    progress: Progress,
    stop: Callable[[], bool],
    device_clock: engine.DeviceClock,
) -> Counts:
    """Scores ``units`` and writes their parts; gives what went through."""
    done = Counts()
    underway: deque[_Job] = deque()
    budgets = engine.Budgets(manifest.wave_tokens, manifest.batch_tokens)

    def write(scored: tuple[_Job, TargetScores]) -> None:
        nonlocal done
        job, scores = scored
        with clock("write"):
            table = to_table(job.transcripts, scores)
            summary = SummaryAccumulator()
            summary.add(table)
            counts = _counts(job, table.num_rows - table.column("logprob").null_count)
            run.write_part(job.unit.info, table, UnitReport(counts, job.unit.rejects, summary.sums))
        done += counts

    with ahead(units) as encoded:
        jobs = _jobs(encoded, settings, loaded.decoder.config, budgets, clock)
        with ahead(jobs) as planned, behind(write) as put:

            def plans() -> Iterator[tuple[Plan, Callable[[float], None]]]:
                for job in planned:
                    underway.append(job)
                    started = progress.start(job.unit.info.characters, job.plan.num_responses, job.plan.num_tokens)
                    yield job.plan, started

            stream = engine.stream(plans(), loaded.decoder, backend=settings.backend, clock=device_clock, stop=stop)
            with closing(stream):
                for scores in timed(stream, clock, "run"):
                    put((underway.popleft(), scores))
    return done


def _counts(job: _Job, scored_responses: int) -> Counts:
    return Counts(
        transcripts=job.plan.num_transcripts,
        responses=job.plan.num_responses,
        scored_responses=scored_responses,
        tokens=job.plan.num_tokens,
        computed_tokens=job.plan.num_computed,
        rejects=len(job.unit.rejects),
        over_length_transcripts=len(job.unit.transcripts) - len(job.transcripts),
        dropped_responses=sum(transcript.num_dropped for transcript in job.transcripts),
        without_metadata_transcripts=job.unit.without_metadata,
    )


def finish(
    run: RunFolder,
    units: Sequence[UnitInfo],
    manifest: Manifest,
    done: Counts,
    clock: Clock,
    idle_share: float | None,
) -> Run:
    """Adds up what is there, and finishes the run where nothing is missing. ``done`` went through this process."""
    run.look_again()
    reports = list(run.reports(units))
    accumulator = SummaryAccumulator()
    counts = Counts()
    for report in reports:
        accumulator.add_sums(report.sums)
        counts += report.counts
    summary = accumulator.summary()
    manifest = _completed(manifest, counts, done, clock, idle_share)
    if len(reports) == len(units):
        manifest = replace(manifest, finished=datetime.now(timezone.utc).isoformat(timespec="seconds"))
        run.finish(manifest, summary.to_json(), (error for report in reports for error in report.rejects))
    folder = run.folder.local
    return Run(run.folder.path if folder is None else folder, manifest, summary, len(reports), len(units))


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


@dataclass(frozen=True, slots=True)
class Estimate:
    """What :func:`estimate` gives."""

    studies: tuple[StudyPlan, ...]
    rejects: tuple[RowError, ...]


def estimate(
    model: str | Path, data: str | Path | Sequence[str | Path], settings: Settings | None = None, *, quiet: bool = True
) -> Estimate:
    """What :func:`score` would cost, per study, from the model's config and tokenizer alone: no weights are needed."""
    settings = settings or Settings()
    device, dtype = _device_and_dtype(settings)
    config = ModelConfig.read(resolve_model(model, weights=False))
    tokenizer, chat = load_tokenizers(model, settings, Clock())
    budgets = _budgets(settings, config, device, dtype)
    rejects: list[RowError] = []
    dataset = Dataset.find(data, hashed=False)
    feed = _feed(dataset, tokenizer, chat, settings, _unit_tokens(settings, device), Clock(), None)
    units = feed.units()
    plans: dict[str, StudyPlan] = {}
    with Progress(sum(unit.characters for unit in units), quiet=quiet) as progress:
        for job in _jobs(feed.encoded(units), settings, config, budgets, Clock()):
            rejects.extend(job.unit.rejects)
            if job.transcripts:
                study = job.unit.info.study
                plans[study] = _add(plans.get(study), _study_plan(study, job.plan, config, dtype))
            progress.start(job.unit.info.characters, job.plan.num_responses, job.plan.num_tokens)(1.0)
    return Estimate(tuple(plans[study] for study in sorted(plans)), tuple(rejects))


def _study_plan(study: str, planned: Plan, config: ModelConfig, dtype: torch.dtype) -> StudyPlan:
    cost = engine.cost(planned, config, dtype)
    return StudyPlan(
        study=study,
        transcripts=planned.num_transcripts,
        responses=planned.num_responses,
        tokens=planned.num_tokens,
        computed_tokens=planned.num_computed,
        scored_rows=planned.num_response_rows,
        branches=planned.num_branches,
        flops_body=cost.flops_body,
        flops_attention=cost.flops_attention,
        flops_head=cost.flops_head,
        wave_bytes=cost.wave_bytes,
    )


def _add(one: StudyPlan | None, two: StudyPlan) -> StudyPlan:
    """Two groups of one study together: counts add up, memory is the larger one's."""
    if one is None:
        return two
    values = {f.name: getattr(one, f.name) + getattr(two, f.name) for f in fields(StudyPlan) if f.name != "study"}
    return StudyPlan(study=two.study, **values | {"wave_bytes": max(one.wave_bytes, two.wave_bytes)})


def data_feed(
    dataset: Dataset,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    settings: Settings,
    manifest: Manifest,
    clock: Clock,
    cache: str | Path | None,
) -> Feed:
    """``cache``: the folder of token caches; None: tokens are not kept."""
    kept = None if cache is None else _token_cache(cache, dataset, manifest)
    return _feed(dataset, tokenizer, chat, settings, manifest.unit_tokens, clock, kept)


def _feed(
    dataset: Dataset,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    settings: Settings,
    unit_tokens: int,
    clock: Clock,
    cache: TokenCache | None,
) -> Feed:
    encoder = Encoder(
        tokenizer, replace(settings, unit_tokens=unit_tokens), chat if settings.condition == "chat" else None
    )
    return Feed(dataset, encoder, cache=cache, clock=clock)


# Of a manifest, what the tokens depend on beside the data; how much of a transcript fits a context is seen to later.
_TOKENS_DEPEND_ON = ("tokenizer_hash", "chat_template_hash", *having("tokens"))


def _token_cache(folder: str | Path, dataset: Dataset, manifest: Manifest) -> TokenCache:
    depends_on = {name: getattr(manifest, name) for name in _TOKENS_DEPEND_ON}
    return TokenCache.open(folder, dataset, depends_on)


def _unit_tokens(settings: Settings, device: torch.device) -> int:
    return settings.unit_tokens or _UNIT_TOKENS[device.type]


def _budgets(settings: Settings, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> engine.Budgets:
    """What the settings say, and what suits the device where they say nothing."""
    default = engine.budgets(config, device, dtype)
    return engine.Budgets(settings.wave_tokens or default.wave_tokens, settings.batch_tokens or default.batch_tokens)


def _load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.size:,} tokens and the embedding {config.vocab_size:,} rows; "
            "they are not of one model"
        )
    return tokenizer


def _check_backend(settings: Settings) -> None:
    """Raises BackendError, before anything is made."""
    kernels.resolve(settings.backend, _device_and_dtype(settings)[0])


def _device_and_dtype(settings: Settings) -> tuple[torch.device, torch.dtype]:
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise kernels.BackendError("device 'cuda' was asked for, and torch finds no CUDA device here")
    device = torch.device("cuda" if settings.device == "cuda" or (settings.device == "auto" and has_gpu) else "cpu")
    default = "bfloat16" if device.type == "cuda" else "float32"
    return device, _DTYPES[default if settings.dtype == "auto" else settings.dtype]


def manifest_of(loaded: Loaded, data: tuple[records.DataFile, ...], settings: Settings, clock: Clock) -> Manifest:
    """As the run begins."""
    decoder = loaded.decoder
    device = decoder.device
    budgets = _budgets(settings, decoder.config, device, decoder.dtype)
    return Manifest(
        model_id=loaded.name,
        model_hash=loaded.hash,
        tokenizer_hash=loaded.tokenizer.hash,
        data=data,
        protocol=settings.protocol,
        condition=settings.condition,
        discrete=settings.discrete,
        chat_template_hash=loaded.chat.hash if loaded.chat and settings.condition == "chat" else None,
        boundary=settings.boundary,
        options=settings.options,
        max_options=settings.max_options,
        over_length=settings.over_length,
        limit=settings.limit,
        studies=settings.studies,
        versions=records.library_versions(__version__),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=str(decoder.dtype).removeprefix("torch."),
        backend=kernels.resolve(settings.backend, device),
        wave_tokens=budgets.wave_tokens,
        batch_tokens=budgets.batch_tokens,
        min_share=settings.min_share,
        unit_tokens=_unit_tokens(settings, device),
        started=clock.started.isoformat(timespec="seconds"),
    )


def going_on(manifest: Manifest, run: RunFolder, settings: Settings) -> Manifest:
    """With the beginning and the budgets of the run as it began, unless the settings say others."""
    return replace(
        manifest,
        started=run.manifest["started"],
        wave_tokens=settings.wave_tokens or run.manifest["wave_tokens"],
        batch_tokens=settings.batch_tokens or run.manifest["batch_tokens"],
    )


def _completed(manifest: Manifest, counts: Counts, done: Counts, clock: Clock, idle_share: float | None) -> Manifest:
    """With what the run came to; ``done`` is what this process did of it."""
    return replace(
        manifest,
        counts=counts,
        seconds=clock.seconds | {"total": clock.total},
        tokens_per_second=done.tokens / clock.total,
        responses_per_second=done.responses / clock.total,
        peak_memory_bytes=records.peak_memory_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None,
        gpu_idle_share=idle_share,
    )
