"""The pipeline: rows in, one record per response out.

    rows ─ read ─► Transcript ─ encode ─► EncodedTranscript ─ plan ─► Wave… ─ run ─► TargetScores ─ write ─► parquet

Transcripts go through in groups: those of one study among neighbours up to a number of tokens, planned together so that
they share prefixes, and written as one part. The next group is read, encoded and planned, and the last one written,
while one is computed; memory is bounded by the group, not by the data.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch

from psykern import engine, kernels, records
from psykern.checkpoint import hash_model, resolve_model
from psykern.core import (
    Boundary,
    CheckpointError,
    DataError,
    EncodedTranscript,
    OptionSource,
    OverLength,
    Protocol,
    RowError,
    TargetScores,
    Transcript,
)
from psykern.encode import Encoder, Tokenizer
from psykern.metrics import Summary, SummaryAccumulator
from psykern.model import Model, ModelConfig
from psykern.pipeline import ahead, behind
from psykern.plan import MIN_SHARE, Plan, plan
from psykern.progress import Progress
from psykern.records import Counts, Manifest, RunFolder
from psykern.transcripts import DataFile, find_data, hash_file, read
from psykern.version import __version__

GROUP_TOKENS = 2**21  # planned and written together
_READ_CHARS = 2**21  # tokenized together: enough to keep all cores busy

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run does with its data and how. Raises ``ValueError`` for a value that is not one of its kind."""

    protocol: Protocol = "exact"
    boundary: Boundary = "joint"
    options: OptionSource = "given"
    max_options: int = 26  # more observed options than this are none
    over_length: OverLength = "error"
    limit: int | None = None  # transcripts per study
    studies: tuple[str, ...] | None = None
    backend: kernels.Backend = "auto"
    dtype: Dtype = "auto"  # float32 on a CPU, bfloat16 on a GPU
    device: Device = "auto"
    wave_tokens: int | None = None  # rows of a wave; None: as suits the device
    batch_tokens: int | None = None  # rows of a batch; likewise
    min_share: int = MIN_SHARE  # tokens from which on a common prefix is shared
    strict: bool = False  # the first row that cannot be used stops the run

    def __post_init__(self) -> None:
        choices = {
            "protocol": Protocol,
            "boundary": Boundary,
            "options": OptionSource,
            "over_length": OverLength,
            "backend": kernels.Backend,
            "dtype": Dtype,
            "device": Device,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        for name in ("max_options", "limit", "wave_tokens", "batch_tokens", "min_share"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
            if value is not None and value >= 2**31:
                raise ValueError(f"{name}: expected at most {2**31 - 1}, got {value}")
        if self.protocol == "study" and self.boundary != "joint":
            raise ValueError("boundary: the study's protocol tokenizes a text as one string; use boundary='joint'")


@dataclass(frozen=True, slots=True)
class Run:
    """What :func:`score` leaves: the folder of records, and what they come to."""

    folder: Path
    manifest: Manifest
    summary: Summary


def score(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: Settings | None = None,
    *,
    quiet: bool = True,
) -> Run:
    """Score every response of ``data`` under ``model`` and write the records to the new folder ``out``.

    model: a folder or a hub id. data: files, folders or hub dataset ids. Rows that cannot be used go to
    ``out/rejects.jsonl`` and are counted in the manifest. Raises ``PsykernError`` for whatever stops the run, and
    ``kernels.BackendError`` for a backend that is not there; parts that were written stay valid.
    """
    settings = settings or Settings()
    device, dtype = _device_and_dtype(settings)
    backend = kernels.resolve(settings.backend, device)
    clock = _Clock()
    run = RunFolder.create(Path(out))
    with clock("load"):
        folder = resolve_model(model)
        decoder = Model(folder, device=device, dtype=dtype)
        tokenizer = _load_tokenizer(folder, decoder.config)

    def reject(error: RowError) -> None:
        run.reject(error)
        if settings.strict:
            raise error

    with clock("scan"):
        files = find_data([data] if isinstance(data, (str, Path)) else data)
        totals = _scan(files, settings, reject)
    encoder = _encoder(tokenizer, decoder.config, settings)
    budgets = _budgets(settings, decoder.config, device, dtype)
    summary = SummaryAccumulator()
    counts: Counter[str] = Counter()
    device_clock = engine.DeviceClock()
    underway: deque[tuple[_Group, Plan]] = deque()

    def planned_groups() -> Iterator[tuple[_Group, Plan]]:
        for group in _groups(files, encoder, totals, settings, reject, clock, counts):
            with clock("plan"):
                planned = _plan(group.transcripts, settings, budgets)
            yield group, planned

    def write(scored: tuple[_Group, TargetScores]) -> None:
        group, scores = scored
        with clock("write"):
            table = records.to_table(group.transcripts, scores)
            run.write_part(table)
            summary.add(table)
        counts["scored_responses"] += len(table) - table.column("logprob").null_count

    with Progress(totals.characters, quiet=quiet) as progress, ahead(planned_groups()) as groups, behind(write) as put:

        def plans() -> Iterator[tuple[Plan, Callable[[float], None]]]:
            for group, planned in groups:
                underway.append((group, planned))
                yield planned, progress.start(group.characters, planned.num_responses, planned.num_tokens)

        with closing(engine.stream(plans(), decoder, backend=settings.backend, clock=device_clock)) as stream:
            for scores in _timed(stream, clock, "run"):
                group, planned = underway.popleft()
                put((group, scores))
                _count(counts, planned)
    with clock("hash"):
        hashes = hash_model(folder), tuple(_data_record(file) for file in files)
    manifest = _manifest(
        str(model), hashes, tokenizer, settings, budgets, device_clock, device, dtype, backend, clock, counts, run
    )
    run.write_summary(summary.summary().to_json())
    run.write_manifest(manifest)
    return Run(run.path, manifest, summary.summary())


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
    folder = resolve_model(model, weights=False)
    config = ModelConfig.read(folder)
    encoder = _encoder(_load_tokenizer(folder, config), config, settings)
    budgets = _budgets(settings, config, device, dtype)
    rejects: list[RowError] = []

    def reject(error: RowError) -> None:
        rejects.append(error)
        if settings.strict:
            raise error

    files = find_data([data] if isinstance(data, (str, Path)) else data)
    totals = _scan(files, settings, reject)
    plans: dict[str, StudyPlan] = {}
    with Progress(totals.characters, quiet=quiet) as progress:
        for group in _groups(files, encoder, totals, settings, reject, _Clock(), Counter()):
            planned = _plan(group.transcripts, settings, budgets)
            study = group.transcripts[0].study
            plans[study] = _add(plans.get(study), _study_plan(study, planned, config, dtype))
            progress.start(group.characters, planned.num_responses, planned.num_tokens)(1.0)
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


@dataclass(slots=True)
class _Totals:
    """What a first pass over the data counts, so that progress and time left are known, and collects."""

    characters: int = 0
    studies: set[str] = field(default_factory=set)
    observed: dict[tuple[str, str], dict[str, None]] = field(default_factory=lambda: defaultdict(dict))

    def options(self, settings: Settings) -> Mapping[tuple[str, str], tuple[str, ...]]:
        """The distinct responses of each experiment, where they are few enough to be its options."""
        return {key: tuple(seen) for key, seen in self.observed.items() if len(seen) <= settings.max_options}


def _scan(files: Sequence[DataFile], settings: Settings, reject: Callable[[RowError], None]) -> _Totals:
    """Counts what is there. Raises ``DataError`` where a study that was asked for has no transcript."""
    broken: list[RowError] = []  # they are rejected when their turn comes, unless the first is to stop the run
    totals = _Totals()
    rows = read(
        files,
        studies=settings.studies,
        limit=settings.limit,
        reject=reject if settings.strict else broken.append,
    )
    for transcript in rows:
        totals.characters += len(transcript.text)
        totals.studies.add(transcript.study)
        if settings.options == "observed-experiment":
            seen = totals.observed[transcript.study, transcript.experiment]
            for start, end in transcript.responses_char.tolist():
                response = transcript.text[start:end]
                if response.strip() and len(seen) <= settings.max_options:
                    seen.setdefault(response)
    absent = sorted(set(settings.studies or ()) - totals.studies)
    if absent:
        also = f"; {len(broken):,} rows cannot be used, the first: {broken[0]}" if broken else ""
        raise DataError(f"studies: no transcript of {', '.join(absent)} in the data{also}")
    return totals


@dataclass(slots=True)
class _Group:
    """Transcripts of one study."""

    transcripts: list[EncodedTranscript] = field(default_factory=list)
    characters: int = 0  # of the texts they come from, those that were left out included


def _groups(
    files: Sequence[DataFile],
    encoder: Encoder,
    totals: _Totals,
    settings: Settings,
    reject: Callable[[RowError], None],
    clock: _Clock,
    counts: Counter[str],
) -> Iterator[_Group]:
    """Encoded transcripts by study, whenever about ``GROUP_TOKENS`` have come together; no group is empty."""
    observed = totals.options(settings)
    rows = read(files, studies=settings.studies, limit=settings.limit, reject=reject)
    groups: dict[str, _Group] = defaultdict(_Group)
    num_tokens = 0
    for texts in _timed(_chunks(rows), clock, "read"):
        with clock("encode"):
            encoded = encoder.encode(texts, reject, observed)
        counts["over_length_transcripts"] += encoder.num_skipped
        counts["dropped_responses"] += encoder.num_dropped
        for text in texts:
            groups[text.study].characters += len(text.text)
        for transcript in encoded:
            groups[transcript.study].transcripts.append(transcript)
            num_tokens += len(transcript.token_ids)
        if num_tokens >= GROUP_TOKENS:
            yield from (group for group in groups.values() if group.transcripts)
            groups, num_tokens = defaultdict(_Group), 0
    yield from (group for group in groups.values() if group.transcripts)


def _chunks(rows: Iterator[Transcript]) -> Iterator[list[Transcript]]:
    chunk: list[Transcript] = []
    characters = 0
    for transcript in rows:
        chunk.append(transcript)
        characters += len(transcript.text)
        if characters >= _READ_CHARS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _budgets(settings: Settings, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> engine.Budgets:
    """What the settings say, and what suits the device where they say nothing."""
    default = engine.budgets(config, device, dtype)
    return engine.Budgets(settings.wave_tokens or default.wave_tokens, settings.batch_tokens or default.batch_tokens)


def _plan(transcripts: Sequence[EncodedTranscript], settings: Settings, budgets: engine.Budgets) -> Plan:
    return plan(
        transcripts,
        wave_tokens=budgets.wave_tokens,
        batch_tokens=budgets.batch_tokens,
        min_share=settings.min_share,
    )


def _encoder(tokenizer: Tokenizer, config: ModelConfig, settings: Settings) -> Encoder:
    return Encoder(
        tokenizer,
        protocol=settings.protocol,
        boundary=settings.boundary,
        options=settings.options,
        max_options=settings.max_options,
        over_length=settings.over_length,
        max_positions=config.max_positions,
    )


def _load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.size:,} tokens and the embedding {config.vocab_size:,} rows; "
            "they are not of one model"
        )
    return tokenizer


def _device_and_dtype(settings: Settings) -> tuple[torch.device, torch.dtype]:
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise kernels.BackendError("device 'cuda' was asked for, and torch finds no CUDA device here")
    device = torch.device("cuda" if settings.device == "cuda" or (settings.device == "auto" and has_gpu) else "cpu")
    default = "bfloat16" if device.type == "cuda" else "float32"
    return device, _DTYPES[default if settings.dtype == "auto" else settings.dtype]


def _count(counts: Counter[str], planned: Plan) -> None:
    counts["transcripts"] += planned.num_transcripts
    counts["responses"] += planned.num_responses
    counts["tokens"] += planned.num_tokens
    counts["computed_tokens"] += planned.num_computed


class _Clock:
    """Seconds by phase, and since the start."""

    def __init__(self) -> None:
        self.started = datetime.now(timezone.utc)
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start


def _timed(items: Iterator[T], clock: _Clock, phase: str) -> Iterator[T]:
    """``items``, with the time that each takes to come counted as ``phase``."""
    while True:
        with clock(phase):
            item = next(items, None)
        if item is None:
            return
        yield item


def _data_record(file: DataFile) -> records.DataFile:
    return records.DataFile(str(file.path), hash_file(file.path), file.path.stat().st_size)


def _manifest(
    model_id: str,
    hashes: tuple[str, tuple[records.DataFile, ...]],
    tokenizer: Tokenizer,
    settings: Settings,
    budgets: engine.Budgets,
    device_clock: engine.DeviceClock,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    clock: _Clock,
    counts: Counter[str],
    run: RunFolder,
) -> Manifest:
    names = [f.name for f in fields(Counts)]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Manifest(
        model_id=model_id,
        model_hash=hashes[0],
        tokenizer_hash=tokenizer.hash,
        data=hashes[1],
        protocol=settings.protocol,
        boundary=settings.boundary,
        options=settings.options,
        max_options=settings.max_options,
        over_length=settings.over_length,
        limit=settings.limit,
        studies=settings.studies,
        versions=records.library_versions(__version__),
        device=device_name,
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        wave_tokens=budgets.wave_tokens,
        batch_tokens=budgets.batch_tokens,
        min_share=settings.min_share,
        counts=Counts(**{name: counts[name] for name in names} | {"rejects": run.num_rejects}),
        seconds=clock.seconds | {"total": clock.total},
        tokens_per_second=counts["tokens"] / clock.total,
        responses_per_second=counts["responses"] / clock.total,
        peak_memory_bytes=records.peak_memory_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        gpu_idle_share=device_clock.idle_share,
        started=clock.started.isoformat(timespec="seconds"),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
