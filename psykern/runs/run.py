"""Scoring a data set: rows in, one record per response out.

    rows ─ read ─► Transcript ─ encode ─► EncodedTranscript ─ plan ─► Wave… ─ run ─► TargetScores ─ write ─► parquet

Reading and tokenizing (``data.feed``) go on in threads beside what ``runs.job`` does with the units that they give. A
part that is there is never computed again, so a run that was stopped goes on, and several processes can share one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from psykern.runs.job import Options, Run, RunJob, recipe_of
from psykern.runs.manifest import Recipe, tokens_depend_on
from psykern.runs.progress import Progress
from psykern.scoring.language import Language
from psykern.scoring.loading import check_model, load
from psykern.scoring.scorer import Scorer
from psykern.scoring.units import with_unit_tokens


def score(
    model: str | Path | Scorer,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: Settings | None = None,
    *,
    revision: str | None = None,
    shard: Shard | None = None,
    resume: bool = True,
    cache: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
) -> Run:
    """Score every response of ``data`` under ``model`` and write the records to the folder ``out``.

    model: a folder or a hub id; ``revision``: a branch, tag or commit of it, as ``owner/name@REVISION`` says too; or a
    model that :func:`psykern.load` gave. data: files, folders or hub dataset ids. out: a folder or an fsspec URL, new
    or empty, or one where this run was begun: then what is missing is scored (``resume``). ``shard`` takes a part of
    the units, for several processes that share ``out``; the last one to end finishes the run. ``cache``: a folder where
    tokens are kept. ``stop`` is asked between waves; what was begun of a unit is computed again when the run goes on.

    Rows that cannot be used are listed in ``out/rejects.jsonl`` and counted in the manifest. Raises ``InterruptedRun``
    when ``stop`` held, ``PsykernError`` for whatever stops the run, ``BackendError`` for a backend that is not there,
    and ``ValueError`` where the settings contradict a loaded model; parts that were written stay valid.
    """
    options = Options(shard or Shard(), resume, cache, stop, quiet)
    (run,) = _score_each(_of_revision(model, revision), data, [(out, settings or Settings())], options)
    return run


def score_conditions(
    model: str | Path | Scorer,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    conditions: Sequence[Condition],
    settings: Settings | None = None,
    *,
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
    if not conditions or len(set(conditions)) < len(conditions):
        raise ValueError(f"condition: expected different ones, got {','.join(conditions) or 'none'}")
    options = Options(shard or Shard(), resume, cache, stop, quiet)
    each = [(f"{out}/{name}", replace(settings or Settings(), condition=name)) for name in conditions]
    return _score_each(_of_revision(model, revision), data, each, options)


def _score_each(
    model: str | Path | Scorer,
    data: str | Path | Sequence[str | Path],
    runs: Sequence[tuple[str | Path, Settings]],
    options: Options,
) -> tuple[Run, ...]:
    """Several runs, each with its folder, under settings that differ in the condition alone."""
    clock, settings = Clock(), runs[0][1]
    check_model(model)  # fails before anything is made, as the next ones
    if isinstance(model, Scorer):
        model.model.compute.check(settings)
    else:
        Compute.resolve(settings.device, settings.dtype, settings.backend)
    for out, _ in runs:
        Folder.at(out).create()
    scorer = _loaded(model, settings, clock, chat=any(of.condition == "chat" for _, of in runs))
    with clock("hash"):
        scorer.hash  # noqa: B018
        dataset = Dataset.find(data)
    done = []
    for out, own in runs:
        done.append(score_with(scorer, dataset, out, own, options, clock))
        clock = Clock()  # loading counts to the first
    return tuple(done)


def _of_revision(model: str | Path | Scorer, revision: str | None) -> str | Path | Scorer:
    if not isinstance(model, Scorer):
        return at_revision(model, revision)
    if revision is not None:
        raise ValueError(f"revision: expected none, as the model is loaded, got {revision!r}; load that one")
    return model


def _loaded(model: str | Path | Scorer, settings: Settings, clock: Clock, *, chat: bool) -> Scorer:
    """``chat``: a chat template will be needed."""
    if not isinstance(model, Scorer):
        device, dtype, backend = settings.device, settings.dtype, settings.backend
        with clock("load"):
            return load(model, device=device, dtype=dtype, backend=backend, chat=chat)
    if chat:
        model.language.chat  # noqa: B018
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
