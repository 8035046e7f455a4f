"""Scoring a data set: rows in, one record per response out.

    rows ─ read ─► Transcript ─ encode ─► EncodedTranscript ─ plan ─► Wave… ─ run ─► TargetScores ─ write ─► parquet

Reading and tokenizing (``data.feed``) go on in threads beside what ``runs.job`` does with the units that they give. A
part that is there is never computed again, so a run that was stopped goes on, and several processes can share one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from psykern.core.clock import Clock
from psykern.core.folder import Folder
from psykern.core.settings import Condition, Settings, Shard
from psykern.data.dataset import Dataset
from psykern.data.feed import Feed
from psykern.data.token_cache import TokenCache
from psykern.kernels.compute import Compute
from psykern.models.checkpoint import at_revision
from psykern.models.locate import Located, folder_names, locate
from psykern.models.weights import ModelFolder
from psykern.runs.job import Options, Run, RunJob, recipe_of
from psykern.runs.manifest import Recipe, tokens_depend_on
from psykern.runs.progress import Progress
from psykern.scoring.language import Language
from psykern.scoring.loading import check_model, open_scorer
from psykern.scoring.records import check_settings
from psykern.scoring.scorer import Scorer
from psykern.scoring.units import with_unit_tokens


def score(
    model: str | Path | Scorer,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: Settings | None = None,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    shard: Shard | None = None,
    resume: bool = True,
    cache: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
) -> Run:
    """Score every response of ``data`` under ``model`` and write the records to the folder ``out``.

    model: a folder or a hub id; ``revision``: a branch, tag or commit of it, as ``owner/name@REVISION`` says too; or a
    model that :func:`psykern.load` gave. ``adapter``: folder or hub id of a PEFT LoRA adapter on it; a model that is an
    adapter's folder has the base that it names. data: files, folders or hub dataset ids. out: a folder or an fsspec
    URL, new or empty, or one where this run was begun: then what is missing is scored (``resume``). ``shard`` takes a
    part of the units, for several processes that share ``out``; the last one to end finishes the run. ``cache``: a
    folder where tokens are kept. ``stop`` is asked between waves; what was begun of a unit is computed again when the
    run goes on.

    Rows that cannot be used are listed in ``out/rejects.jsonl`` and counted in the manifest. Raises ``InterruptedRun``
    when ``stop`` held, ``PsykernError`` for whatever stops the run, ``BackendError`` for a backend that is not there,
    and ``ValueError`` where the settings contradict a loaded model; parts that were written stay valid.
    """
    options = Options(shard or Shard(), resume, cache, stop, quiet)
    (run,) = _score_each(_of_revision(model, revision), data, {adapter: [(out, settings or Settings())]}, options)
    return run


def score_conditions(
    model: str | Path | Scorer,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    conditions: Sequence[Condition],
    settings: Settings | None = None,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    shard: Shard | None = None,
    resume: bool = True,
    cache: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
) -> tuple[Run, ...]:
    """:func:`score` under each of ``conditions``, in the folders ``out/CONDITION``; the weights are loaded once.

    Raises ValueError for a condition that repeats, and what :func:`score` raises.
    """
    options = Options(shard or Shard(), resume, cache, stop, quiet)
    each = _by_condition(out, conditions, settings or Settings())
    return _score_each(_of_revision(model, revision), data, {adapter: each}, options)


def score_adapters(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    adapters: Sequence[str | Path],
    settings: Settings | None = None,
    *,
    conditions: Sequence[Condition] | None = None,
    revision: str | None = None,
    shard: Shard | None = None,
    resume: bool = True,
    cache: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
) -> tuple[Run, ...]:
    """:func:`score` with each of ``adapters`` on one base, which is opened and hashed once.

    Records go to ``out/ADAPTER``, by the last part of the adapter's name; with ``conditions`` to
    ``out/ADAPTER/CONDITION``. Raises CheckpointError for adapters of one name, and what :func:`score` raises.
    """
    options, own, names = (
        Options(shard or Shard(), resume, cache, stop, quiet),
        settings or Settings(),
        folder_names(adapters),
    )
    outs = [f"{out}/{name}" for name in names]
    runs = [[(to, own)] if conditions is None else _by_condition(to, conditions, own) for to in outs]
    return _score_each(at_revision(model, revision), data, dict(zip(adapters, runs, strict=True)), options)


_Runs = Sequence[tuple[str | Path, Settings]]  # each with its folder; settings differ in the condition alone


def _by_condition(out: str | Path, conditions: Sequence[Condition], settings: Settings) -> _Runs:
    if not conditions or len(set(conditions)) < len(conditions):
        raise ValueError(f"condition: expected different ones, got {','.join(conditions) or 'none'}")
    return [(f"{out}/{name}", replace(settings, condition=name)) for name in conditions]


def _score_each(
    model: str | Path | Scorer,
    data: str | Path | Sequence[str | Path],
    runs: Mapping[str | Path | None, _Runs],
    options: Options,
) -> tuple[Run, ...]:
    """Several runs, by their adapters."""
    clock, settings = Clock(), next(iter(runs.values()))[0][1]
    check_model(model)  # fails before anything is made, as the next ones
    if isinstance(model, Scorer):
        if set(runs) != {None}:
            raise ValueError("adapter: expected none, as the model is loaded; load it with the adapter")
        check_settings(model, settings)
    else:
        Compute.resolve(settings.device, settings.dtype, settings.backend)
    for own in runs.values():
        for out, _ in own:
            Folder.at(out).create()
    with clock("load"):  # all are looked for now, as a missing one is to be known before the first is scored
        models = [model if isinstance(model, Scorer) else locate(model, adapter) for adapter in runs]
    base, dataset, done = None, None, []
    for which, own in zip(models, runs.values(), strict=True):
        scorer = _loaded(which, settings, base, clock, chat=any(of.condition == "chat" for _, of in own))
        with clock("hash"):
            scorer.hash  # noqa: B018
            dataset = dataset or Dataset.find(data)
        for out, of in own:
            done.append(score_with(scorer, dataset, out, of, options, clock))
            clock = Clock()  # loading counts to the first
        base = scorer.model.base  # mapped and hashed once
        if len(runs) > 1:
            scorer.close()
    return tuple(done)


def _loaded(
    model: Located | Scorer, settings: Settings, base: ModelFolder | None, clock: Clock, *, chat: bool
) -> Scorer:
    """``chat``: a chat template will be needed."""
    if isinstance(model, Located):
        with clock("load"):
            return open_scorer(model, settings, base=base, chat=chat)
    if chat:
        model.language.chat  # noqa: B018
    return model


def _of_revision(model: str | Path | Scorer, revision: str | None) -> str | Path | Scorer:
    if not isinstance(model, Scorer):
        return at_revision(model, revision)
    if revision is not None:
        raise ValueError(f"revision: expected none, as the model is loaded, got {revision!r}; load that one")
    return model


def score_with(
    scorer: Scorer, dataset: Dataset, out: str | Path, settings: Settings, options: Options, clock: Clock
) -> Run:
    """One run with a model that is loaded; raises what :func:`score` raises."""
    settings = with_unit_tokens(settings, scorer.model.compute)
    recipe = recipe_of(scorer, dataset, out, settings, clock)
    feed = feed_of(dataset, scorer.language, settings, recipe, options, clock)
    with clock("scan"):
        units = feed.units()
    job = RunJob.open(out, recipe, settings, resume=options.resume)
    job.folder.check_parts(units)
    if job.recipe.date != recipe.date:  # another process has begun the run meanwhile, before midnight
        feed = feed_of(dataset, scorer.language, settings, job.recipe, options, clock)
    wanted = [unit for unit in units if options.shard.takes(unit) and not job.folder.has(unit)]
    with Progress(sum(unit.characters for unit in wanted), quiet=options.quiet) as progress:
        done = job.score(scorer, feed.encoded(wanted), progress, clock, options.stop)
    job.check_stopped(units, wanted, options.stop)
    return job.finish(units, done, clock, scorer.engine.idle_share)


def feed_of(
    dataset: Dataset, language: Language, settings: Settings, recipe: Recipe, options: Options, clock: Clock
) -> Feed:
    """The data set's units on the recipe's date, with the token cache that the options name."""
    cache = None
    if options.cache is not None:
        cache = TokenCache.open(options.cache, dataset, tokens_depend_on(recipe))
    return Feed(dataset, language.encoder(replace(settings, date=recipe.date)), cache=cache, clock=clock)
