"""Runs set against each other: what each model reaches, and what post-training or another condition changes.

    FinishedRun … ─ pair ─► Pair … ─ load two at a time ─► RunResult, PairResult ─► Comparison

Effects of a pair are paired: over the responses that both runs scored. Their intervals are those of a cluster
bootstrap: participants of a study are drawn with replacement, studies stay. A study's draws depend on its name alone,
so pairs over the same data share them, and intervals of means over pairs keep what the pairs have in common.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from psykern.core.errors import ComparisonError
from psykern.runs.summary import option_hits
from psykern.study import metrics
from psykern.study.finished import Responses, load, open_runs, restrict
from psykern.study.metrics import Calibration
from psykern.study.models import PUBLISHED, StudyModel, read_models
from psykern.study.pairing import (
    NamedRun,
    Pair,
    check_alike,
    check_partners,
    check_rows,
    find_pairs,
    name_runs,
    read_pairs,
)

DRAWS = 2000
NAN = math.nan


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval; NaN where there is none."""

    value: float = NAN
    low: float = NAN
    high: float = NAN


@dataclass(frozen=True, slots=True)
class RunStudy:
    """One study under one model; means are over its responses. NaN: no response has what it is the mean of."""

    study: str
    participants: int
    responses: int
    scored: int
    nll: float  # nats per response
    nll_sd: float  # over responses, n − 1
    bits: float  # per response
    accuracy: float
    entropy: float  # nats, over the vocabulary, at a response's first token
    option_responses: int  # responses that are one of their options; what follows is over them
    option_nll: float  # nats
    uniform_nll: float  # nats
    pseudo_r2: float
    option_accuracy: float
    option_entropy: float  # nats
    brier: float
    calibration_error: float
    overconfidence: float
    rescaled_nll: float  # option NLL at the model's own best temperature, nats


@dataclass(frozen=True, slots=True, eq=False)
class ParticipantTable:
    """One row per participant of a run."""

    participants: tuple[tuple[str, str, str], ...]  # [P] study, experiment, participant
    scored: np.ndarray  # [P] float64
    nll: np.ndarray  # [P] float64, mean over the participant's scored responses, nats
    accuracy: np.ndarray  # [P] float64
    option_nll: np.ndarray  # [P] float64, nats


@dataclass(frozen=True, slots=True, eq=False)
class RunResult:
    """What one run comes to."""

    named: NamedRun
    temperature: float  # minimises the study aggregate of the rescaled option NLL; NaN without options
    studies: tuple[RunStudy, ...]
    aggregate: RunStudy  # unweighted means over studies; counts are sums
    nll: Estimate  # the study aggregate, with its interval over participants
    accuracy: Estimate
    response_weighted_nll: float
    participant_nll: float  # mean over participants of their mean
    calibration: Calibration  # all responses with options together


@dataclass(frozen=True, slots=True)
class PairStudy:
    """One study under two runs, over the responses that both scored; differences are post − base."""

    study: str
    participants: int
    responses: int
    base_nll: float
    post_nll: float
    d: Estimate  # Cohen's d
    difference: Estimate  # NLL, nats
    option_difference: Estimate  # option NLL, nats
    rescaled_difference: Estimate  # option NLL with each model at its own temperature, nats
    accuracy_difference: Estimate
    entropy_difference: Estimate  # nats
    participants_base_wins: float  # share of participants whose mean NLL is lower under base


@dataclass(frozen=True, slots=True, eq=False)
class PairResult:
    """What one pair comes to; means are unweighted over studies."""

    pair: Pair
    studies: tuple[PairStudy, ...]
    aggregate: PairStudy
    studies_base_wins: float
    sign_test: float  # p, over the studies' NLL differences
    d_draws: np.ndarray  # [S, DRAWS] float64


@dataclass(frozen=True, slots=True)
class Effect:
    """Mean of d over the pairs of one kind in one group."""

    group_by: str  # "kind", "generation" or "domain"
    group: str
    kind: str
    pairs: int
    d: Estimate
    values: tuple[float, ...]  # each pair's
    published: float  # the study's number for that group; NaN: none


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """All that a report shows."""

    runs: tuple[RunResult, ...]
    pairs: tuple[PairResult, ...]  # base against post-trained
    conditions: tuple[PairResult, ...]  # plain against another condition of one model
    effects: tuple[Effect, ...]
    domains: Mapping[str, str]  # of studies; empty when no table was given
    draws: int


def compare(
    runs: Sequence[str | Path],
    *,
    pairs: str | Path | None = None,
    models: str | Path | Mapping[str, StudyModel] | None = None,
    domains: str | Path | Mapping[str, str] | None = None,
    unpaired: bool = False,
    draws: int = DRAWS,
    on_run: Callable[[RunResult, ParticipantTable], None] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare the runs in the folders ``runs``, a folder with a run per condition counting as several.

    pairs: CSV file with the columns base, post[, kind]; without it the table of models decides. models: YAML file or
    mapping that describes models outside that table. domains: CSV file (study,domain) or mapping. unpaired: allow
    runs without a partner. ``on_run`` gets each run's participants, which are too many to keep for all runs;
    ``progress`` gets a line of text now and then.

    At most two runs are in memory at a time. Raises RunFolderError for a folder that is no finished run, and
    ComparisonError for runs that cannot be set against each other, with what differs.
    """
    described = read_models(Path(models)) if isinstance(models, str | Path) else dict(models or {})
    of_study = read_domains(Path(domains)) if isinstance(domains, str | Path) else dict(domains or {})
    named = name_runs([run for folder in runs for run in open_runs(Path(folder))], described)
    if not named:
        raise ComparisonError("runs: expected at least one, got none")
    check_alike(named)
    found = read_pairs(Path(pairs), named) if pairs is not None else find_pairs(named)
    if not unpaired:
        check_partners(named, found)
    found.sort(key=lambda pair: named.index(pair.base))  # so that a base is loaded once for all its pairs
    cache = _Loaded(on_run, progress)
    pair_results = [_compare_pair(pair, cache, draws, progress) for pair in found]
    results = tuple(cache.result(run) for run in named)
    return Comparison(
        runs=results,
        pairs=tuple(result for result in pair_results if not result.pair.same_model),
        conditions=tuple(result for result in pair_results if result.pair.same_model),
        effects=tuple(_effects([result for result in pair_results if not result.pair.same_model], of_study)),
        domains=of_study,
        draws=draws,
    )


def read_domains(path: Path) -> dict[str, str]:
    """Domain of each study from a CSV file with the columns study and domain. Raises ComparisonError."""
    import csv

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ComparisonError(f"{path}: cannot be read: {error}") from error
    if not rows or not {"study", "domain"} <= set(rows[0]):
        raise ComparisonError(f"{path}: expected the columns study and domain, and at least one row")
    return {row["study"].strip(): row["domain"].strip() for row in rows if row["study"] and row["domain"]}


class _Loaded:
    """The two runs used last, and every run's result."""

    def __init__(
        self, on_run: Callable[[RunResult, ParticipantTable], None] | None, progress: Callable[[str], None]
    ) -> None:
        self._on_run, self._progress = on_run, progress
        self._responses: dict[Path, Responses] = {}
        self._results: dict[Path, RunResult] = {}

    def responses(self, named: NamedRun) -> Responses:
        path = named.run.path
        if path not in self._responses:
            while len(self._responses) > 1:
                del self._responses[next(iter(self._responses))]
            self._progress(f"reading {path}")
            self._responses[path] = load(named.run)
        self._responses[path] = self._responses.pop(path)  # used last
        return self._responses[path]

    def result(self, named: NamedRun) -> RunResult:
        path = named.run.path
        if path not in self._results:
            self._results[path], participants = summarize(named, self.responses(named))
            if self._on_run is not None:
                self._on_run(self._results[path], participants)
        return self._results[path]


@dataclass(frozen=True, slots=True, eq=False)
class _Study:
    """One study's slice of a run's responses, and the metrics of its options."""

    name: str
    offsets: np.ndarray  # [P+1] int64, responses of each participant, from 0
    nll: np.ndarray  # [R] float64
    hits: np.ndarray  # [R] float32
    entropy: np.ndarray  # [R] float32
    known: np.ndarray  # [R] bool, has options; the next three are of those responses
    log_softmax: np.ndarray  # float32
    option_offsets: np.ndarray  # int64, from 0
    option_index: np.ndarray  # int32


def _studies(responses: Responses) -> Iterable[_Study]:
    for place, name in enumerate(responses.studies):
        first, last = responses.study_offsets[place : place + 2]
        offsets = responses.participant_offsets[first : last + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        bounds = responses.option_offsets[rows.start : rows.stop + 1]
        known = responses.option_index[rows] >= 0
        yield _Study(
            name=name,
            offsets=offsets - offsets[0],
            nll=-responses.logprob[rows],
            hits=responses.is_argmax[rows],
            entropy=responses.entropy[rows],
            known=known,
            log_softmax=responses.option_log_softmax[bounds[0] : bounds[-1]],
            option_offsets=np.append(bounds[:-1][known], bounds[-1]) - bounds[0],
            option_index=responses.option_index[rows][known],
        )


def summarize(named: NamedRun, responses: Responses) -> tuple[RunResult, ParticipantTable]:
    """One run's result and its participants, from its responses."""
    temperature = _temperature(responses)
    studies, calibrations, tables, nll_draws, hit_draws = [], [], [], [], []
    nll_sum = scored = 0.0
    for study in _studies(responses):
        row, bins, table, sums = _run_study(study, temperature)
        studies.append(row)
        calibrations.append(bins)
        tables.append(table)
        draws = _draw(sums, study.name, _RUN_DRAWS)
        nll_draws.append(metrics.widen(row.nll, _ratio(draws[:, 1], draws[:, 0]), len(sums)))
        hit_draws.append(metrics.widen(row.accuracy, _ratio(draws[:, 2], draws[:, 0]), len(sums)))
        nll_sum, scored = nll_sum + sums[:, 1].sum(), scored + sums[:, 0].sum()
    aggregate = _mean_study(studies)
    columns = [np.concatenate([np.empty(0), *(table[i] for table in tables)]) for i in range(4)]
    result = RunResult(
        named=named,
        temperature=temperature,
        studies=tuple(studies),
        aggregate=aggregate,
        nll=_aggregate([row.nll for row in studies], nll_draws),
        accuracy=_aggregate([row.accuracy for row in studies], hit_draws),
        response_weighted_nll=nll_sum / scored if scored else NAN,
        participant_nll=_mean(columns[1]),
        calibration=sum(calibrations, _no_calibration()),
    )
    return result, ParticipantTable(responses.participants, *columns)


_RUN_DRAWS = 1000  # for the error bars of a single run


def _temperature(responses: Responses) -> float:
    """Over all responses with options, weighted so that each study counts the same."""
    known = responses.option_index >= 0
    if not known.any():
        return NAN
    rows = np.concatenate([[0], np.cumsum(known)])
    per_study = np.diff(rows[responses.participant_offsets[responses.study_offsets]])
    weights = np.repeat(1 / (np.maximum(per_study, 1) * (per_study > 0).sum()), per_study)
    offsets = np.append(responses.option_offsets[:-1][known], responses.option_offsets[-1])
    return metrics.fit_temperature(responses.option_log_softmax, offsets, responses.option_index[known], weights)


def _no_calibration() -> Calibration:
    return metrics.calibration(np.empty(0), np.empty(0))


def _run_study(study: _Study, temperature: float) -> tuple[RunStudy, Calibration, list[np.ndarray], np.ndarray]:
    """A study's row, its calibration, its participants' columns, and their sums [P, 3]: scored, NLL, hits."""
    scored = ~np.isnan(study.nll)
    nll = study.nll[scored]
    lists = (study.log_softmax, study.option_offsets, study.option_index)
    option_nll = metrics.option_nll(*lists).astype(np.float64)
    hits = option_hits(*lists)
    bins = metrics.calibration(metrics.option_confidence(*lists[:2]), hits)
    uniform = _mean(np.log(np.diff(study.option_offsets)))
    rescaled = metrics.rescaled_option_nll(*lists, temperature) if len(option_nll) else np.empty(0)
    row = RunStudy(
        study=study.name,
        participants=len(study.offsets) - 1,
        responses=len(study.nll),
        scored=len(nll),
        nll=_mean(nll),
        nll_sd=float(nll.std(ddof=1)) if len(nll) > 1 else NAN,
        bits=metrics.bits(_mean(nll)),
        accuracy=_mean(study.hits),
        entropy=_mean(study.entropy),
        option_responses=len(option_nll),
        option_nll=_mean(option_nll),
        uniform_nll=uniform,
        pseudo_r2=metrics.pseudo_r2(_mean(option_nll), uniform),
        option_accuracy=_mean(hits),
        option_entropy=_mean(metrics.option_entropy(*lists[:2])),
        brier=_mean(metrics.brier(*lists)),
        calibration_error=bins.error,
        overconfidence=bins.overconfidence,
        rescaled_nll=_mean(rescaled),
    )
    spread = np.full(len(study.nll), NAN)  # option NLL in the places of all responses
    spread[study.known] = option_nll
    sums = np.stack(
        [
            metrics.segment_sums(scored, study.offsets),
            metrics.segment_sums(np.where(scored, study.nll, 0.0), study.offsets),
            metrics.segment_sums(np.nan_to_num(study.hits), study.offsets),
        ],
        axis=1,
    )
    table = [
        sums[:, 0],
        _ratio(sums[:, 1], sums[:, 0]),
        _ratio(sums[:, 2], sums[:, 0]),
        metrics.segment_means(spread, study.offsets),
    ]
    return row, bins, table, sums


def _mean_study(studies: Sequence[RunStudy]) -> RunStudy:
    """Unweighted means over the studies that have the value; sums of the counts."""
    values: dict[str, float | int] = {}
    for field in fields(RunStudy)[1:]:
        column = [getattr(study, field.name) for study in studies]
        values[field.name] = sum(column) if field.type in (int, "int") else _mean(np.array(column, np.float64))
    return RunStudy(study="mean over studies", **values)  # type: ignore[arg-type]


# Columns of a participant's sums in a pair; the last eight are over responses with options under both models.
_SUMS = ("n", "base", "base2", "post", "post2", "hits", "entropy", "m", "option", "rescaled")


def _compare_pair(pair: Pair, cache: _Loaded, draws: int, progress: Callable[[str], None]) -> PairResult:
    base, post = cache.responses(pair.base), cache.responses(pair.post)
    temperatures = cache.result(pair.base).temperature, cache.result(pair.post).temperature
    if pair.same_model and pair.post.run.condition == "persona":  # it has only participants of whom something is known
        base = restrict(base, post.participants)
    check_rows(pair, base, post)
    progress(f"comparing {pair.post.label} with {pair.base.label}")
    studies, all_draws = [], []
    for one, two in zip(_studies(base), _studies(post), strict=True):
        row, drawn = _pair_study(one, two, temperatures, draws)
        studies.append(row)
        all_draws.append(drawn)
    differences = np.array([row.difference.value for row in studies])
    means = {
        name: _aggregate([getattr(row, name).value for row in studies], [drawn[name] for drawn in all_draws])
        for name in _STATISTICS
    }
    aggregate = PairStudy(
        study="mean over studies",
        participants=sum(row.participants for row in studies),
        responses=sum(row.responses for row in studies),
        base_nll=_mean(np.array([row.base_nll for row in studies])),
        post_nll=_mean(np.array([row.post_nll for row in studies])),
        participants_base_wins=_weighted(
            [row.participants_base_wins for row in studies], [row.participants for row in studies]
        ),
        **means,
    )
    return PairResult(
        pair=pair,
        studies=tuple(studies),
        aggregate=aggregate,
        studies_base_wins=metrics.base_wins(differences),
        sign_test=metrics.sign_test(differences),
        d_draws=np.array([drawn["d"] for drawn in all_draws]).reshape(len(studies), draws),
    )


def _pair_study(
    base: _Study, post: _Study, temperatures: tuple[float, float], draws: int
) -> tuple[PairStudy, dict[str, np.ndarray]]:
    sums, centre = _pair_sums(base, post, temperatures)
    totals = sums.sum(axis=0)
    point = _statistics(totals)
    drawn = _statistics(_draw(sums, base.name, draws))
    estimates, widened = {}, {}
    for name in _STATISTICS:
        counted = sums[:, _SUMS.index("m" if name in _OF_OPTIONS else "n")] > 0
        widened[name] = metrics.widen(float(point[name]), drawn[name], int(counted.sum()))
        estimates[name] = Estimate(float(point[name]), *metrics.interval(widened[name]))
    counts = sums[:, 0]
    per_participant = _ratio(sums[:, 3] - sums[:, 1], counts)
    row = PairStudy(
        study=base.name,
        participants=int((counts > 0).sum()),
        responses=int(counts.sum()),
        base_nll=centre + float(_ratio(totals[1], totals[0])),
        post_nll=centre + float(_ratio(totals[3], totals[0])),
        participants_base_wins=metrics.base_wins(per_participant),
        **estimates,
    )
    return row, widened


def _pair_sums(base: _Study, post: _Study, temperatures: tuple[float, float]) -> tuple[np.ndarray, float]:
    """[P, K] sums over each participant's responses, columns as in _SUMS, and what was taken off every NLL first."""
    both = ~np.isnan(base.nll) & ~np.isnan(post.nll)
    centre = _mean(base.nll[both])
    one, two = (np.where(both, study.nll - centre, 0.0) for study in (base, post))
    known = base.known & post.known
    option, rescaled = np.zeros(len(both)), np.zeros(len(both))
    if known.any():
        for study, temperature, sign in ((base, temperatures[0], -1), (post, temperatures[1], 1)):
            lists = (study.log_softmax, study.option_offsets, study.option_index)
            shared = known[study.known]
            option[known] += sign * metrics.option_nll(*lists)[shared]
            rescaled[known] += sign * metrics.rescaled_option_nll(*lists, temperature)[shared]
    change = [np.where(both, getattr(post, name) - getattr(base, name), 0.0) for name in ("hits", "entropy")]
    columns = [both, one, one * one, two, two * two, *change, known, option, rescaled]
    return np.stack([metrics.segment_sums(column, base.offsets) for column in columns], axis=1), centre


_STATISTICS = (
    "d",
    "difference",
    "option_difference",
    "rescaled_difference",
    "accuracy_difference",
    "entropy_difference",
)
_OF_OPTIONS = ("option_difference", "rescaled_difference")


def _statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of sums [..., K]."""
    n, base, base2, post, post2, hits, entropy, m, option, rescaled = np.moveaxis(sums, -1, 0)
    return {
        "d": metrics.cohens_d_of_sums(n, base, base2, post, post2),
        "difference": _ratio(post - base, n),
        "option_difference": _ratio(option, m),
        "rescaled_difference": _ratio(rescaled, m),
        "accuracy_difference": _ratio(hits, n),
        "entropy_difference": _ratio(entropy, n),
    }


def _draw(sums: np.ndarray, study: str, draws: int) -> np.ndarray:
    """Bootstrap sums of one study's participants, the same draws whatever the run."""
    return metrics.bootstrap_sums(sums, draws, np.random.default_rng(zlib.crc32(study.encode())))


def _aggregate(points: Sequence[float], draws: Sequence[np.ndarray]) -> Estimate:
    """Mean over the studies that have a value, with its interval.

    A study of one participant has a value but no spread: it enters each draw with its value.
    """
    kept = [(point, drawn) for point, drawn in zip(points, draws, strict=True) if not math.isnan(point)]
    if not kept:
        return Estimate()
    filled = [np.where(np.isnan(drawn), point, drawn) for point, drawn in kept]
    value = float(np.mean([point for point, _ in kept]))
    if all(np.isnan(drawn).all() for _, drawn in kept):
        return Estimate(value)
    return Estimate(value, *metrics.interval(np.mean(filled, axis=0)))


def _effects(pairs: Sequence[PairResult], domains: Mapping[str, str]) -> Iterable[Effect]:
    """Mean d by kind; by generation and kind; by domain and kind."""
    for kind in sorted({result.pair.kind for result in pairs}):
        of_kind = [result for result in pairs if result.pair.kind == kind]
        yield _effect("kind", kind, kind, of_kind, None)
        for generation in dict.fromkeys(result.pair.post.model.generation for result in of_kind):
            of_both = [result for result in of_kind if result.pair.post.model.generation == generation]
            yield _effect("generation", generation, kind, of_both, None)
        for domain in sorted({domains.get(row.study, "") for result in of_kind for row in result.studies} - {""}):
            chosen = {study for study, of in domains.items() if of == domain}
            yield _effect("domain", domain, kind, of_kind, chosen)


def _effect(group_by: str, group: str, kind: str, pairs: Sequence[PairResult], studies: set[str] | None) -> Effect:
    values, draws = [], []
    for result in pairs:
        kept = [i for i, row in enumerate(result.studies) if studies is None or row.study in studies]
        points = np.array([result.studies[i].d.value for i in kept])
        drawn = np.where(np.isnan(result.d_draws[kept]), points[:, None], result.d_draws[kept])
        known = ~np.isnan(points)
        if known.any():
            values.append(float(points[known].mean()))
            draws.append(drawn[known].mean(axis=0))
    published = any(result.pair.post.model.published for result in pairs)
    reference = [p.d for p in PUBLISHED if (p.group_by, p.group.lower()) == (group_by, group.lower()) and published]
    spread = bool(draws) and float(np.ptp(np.mean(draws, axis=0))) > 0
    low, high = metrics.interval(np.mean(draws, axis=0)) if spread else (NAN, NAN)
    return Effect(
        group_by=group_by,
        group=group,
        kind=kind,
        pairs=len(values),
        d=Estimate(_mean(np.array(values)), low, high),
        values=tuple(values),
        published=reference[0] if reference else NAN,
    )


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, NaN where count is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(np.asarray(count) > 0, total / np.asarray(count), np.nan))


def _mean(values: np.ndarray) -> float:
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else NAN


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if not math.isnan(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else NAN
