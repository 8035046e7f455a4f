"""What a comparison comes to: the numbers of runs, of pairs and of effects, which tables, figures and page show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from psykern.study.metrics import Calibration
from psykern.study.pairing import NamedRun, Pair


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval; NaN where there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


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
    nll: Interval  # the study aggregate, with its interval over participants
    accuracy: Interval
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
    d: Interval  # Cohen's d
    difference: Interval  # NLL, nats
    option_difference: Interval  # option NLL, nats
    rescaled_difference: Interval  # option NLL with each model at its own temperature, nats
    accuracy_difference: Interval
    entropy_difference: Interval  # nats
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
    d: Interval
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
