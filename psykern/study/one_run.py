"""What one run comes to: its means per study and over studies, with intervals, and each participant's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from psykern.core import csr
from psykern.runs.summary import option_hits
from psykern.study import metrics
from psykern.study.bootstrap import aggregate, draw, inflate
from psykern.study.finished import Responses, StudyResponses, by_study
from psykern.study.metrics import Calibration
from psykern.study.pairing import NamedRun
from psykern.study.results import Interval, ParticipantTable, RunResult, RunStudy

_DRAWS = 1000  # for the error bars of a single run


@dataclass(frozen=True, slots=True, eq=False)
class _OfStudy:
    """One study under the model; P participants."""

    row: RunStudy
    calibration: Calibration
    sums: np.ndarray  # [P, 3] float64, of each participant: responses scored, their NLL, their hits
    option_nll: np.ndarray  # [P] float64, each participant's mean, nats


def summarize(named: NamedRun, responses: Responses) -> tuple[RunResult, ParticipantTable]:
    """One run's result and its participants, from its responses."""
    temperature = _temperature(responses)
    of = [_of_study(study, temperature) for study in by_study(responses)]
    studies = tuple(study.row for study in of)
    scored, nll, hits = np.concatenate([np.empty((0, 3)), *(study.sums for study in of)]).T
    table = ParticipantTable(
        participants=responses.participants,
        scored=scored,
        nll=metrics.ratio(nll, scored),
        accuracy=metrics.ratio(hits, scored),
        option_nll=csr.concatenate([study.option_nll for study in of], np.float64),
    )
    totals = [study.sums.sum(axis=0) for study in of]
    nll_interval, accuracy_interval = _intervals(of)
    num_scored = sum(total[0] for total in totals)
    result = RunResult(
        named=named,
        temperature=temperature,
        studies=studies,
        aggregate=_mean_study(studies),
        nll=nll_interval,
        accuracy=accuracy_interval,
        response_weighted_nll=sum(total[1] for total in totals) / num_scored if num_scored else math.nan,
        participant_nll=metrics.mean(table.nll),
        calibration=sum((study.calibration for study in of), metrics.calibration(np.empty(0), np.empty(0))),
    )
    return result, table


def _temperature(responses: Responses) -> float:
    """Over all responses with options, weighted so that each study counts the same."""
    known = responses.option_index >= 0
    if not known.any():
        return math.nan
    rows = csr.offsets_of(known)
    per_study = np.diff(rows[responses.participant_offsets[responses.study_offsets]])
    weights = np.repeat(1 / (np.maximum(per_study, 1) * (per_study > 0).sum()), per_study)
    offsets = np.append(responses.option_offsets[:-1][known], responses.option_offsets[-1])
    return metrics.fit_temperature(responses.option_log_softmax, offsets, responses.option_index[known], weights)


def _intervals(studies: Sequence[_OfStudy]) -> list[Interval]:
    """Mean NLL and accuracy over studies."""
    drawn = [draw(study.sums, study.row.study, _DRAWS) for study in studies]  # [_DRAWS, 3] each
    found = []
    for column, name in ((1, "nll"), (2, "accuracy")):
        points = [getattr(study.row, name) for study in studies]
        draws = [
            inflate(point, metrics.ratio(sums[:, column], sums[:, 0]), len(study.sums))
            for point, sums, study in zip(points, drawn, studies, strict=True)
        ]
        found.append(aggregate(points, draws))
    return found


def _of_study(study: StudyResponses, temperature: float) -> _OfStudy:
    scored = ~np.isnan(study.nll)
    columns = (scored, np.where(scored, study.nll, 0.0), np.nan_to_num(study.hits))
    option_nll = np.full(len(study.nll), math.nan)  # in the places of all responses
    option_nll[study.known] = metrics.option_nll(*study.options)
    hits = option_hits(*study.options)
    bins = metrics.calibration(metrics.option_confidence(*study.options[:2]), hits)
    return _OfStudy(
        row=_study_row(study, temperature, bins, hits),
        calibration=bins,
        sums=np.stack([metrics.segment_sums(column, study.offsets) for column in columns], axis=1),
        option_nll=metrics.segment_means(option_nll, study.offsets),
    )


def _study_row(study: StudyResponses, temperature: float, bins: Calibration, hits: np.ndarray) -> RunStudy:
    """``hits`` [R] bool, of the responses with options."""
    nll = study.nll[~np.isnan(study.nll)]
    option_nll = metrics.mean(metrics.option_nll(*study.options))
    uniform = metrics.mean(np.log(np.diff(study.option_offsets)))
    rescaled = metrics.rescaled_option_nll(*study.options, temperature) if len(hits) else np.empty(0)
    return RunStudy(
        study=study.name,
        participants=len(study.offsets) - 1,
        responses=len(study.nll),
        scored=len(nll),
        nll=metrics.mean(nll),
        nll_sd=float(nll.std(ddof=1)) if len(nll) > 1 else math.nan,
        bits=metrics.bits(metrics.mean(nll)),
        accuracy=metrics.mean(study.hits),
        entropy=metrics.mean(study.entropy),
        option_responses=len(hits),
        option_nll=option_nll,
        uniform_nll=uniform,
        pseudo_r2=metrics.pseudo_r2(option_nll, uniform),
        option_accuracy=metrics.mean(hits),
        option_entropy=metrics.mean(metrics.option_entropy(*study.options[:2])),
        brier=metrics.mean(metrics.brier(*study.options)),
        calibration_error=bins.error,
        overconfidence=bins.overconfidence,
        rescaled_nll=metrics.mean(rescaled),
    )


def _mean_study(studies: Sequence[RunStudy]) -> RunStudy:
    """Unweighted means over the studies that have the value; sums of the counts."""
    values: dict[str, float | int] = {}
    for field in fields(RunStudy)[1:]:
        column = [getattr(study, field.name) for study in studies]
        values[field.name] = sum(column) if field.type in (int, "int") else metrics.mean(np.array(column, np.float64))
    return RunStudy(study="mean over studies", **values)  # type: ignore[arg-type]
