"""Runs set against each other: what each model reaches, and what post-training or another condition changes.

    FinishedRun … ─ pairing ─► Pair … ─ load two at a time ─► one_run: RunResult, two_runs: PairResult
                                                              ─ effects: Effect ─► Comparison

Effects of a pair are paired: over the responses that both runs scored. Their intervals are those of
:mod:`psykern.study.bootstrap`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from psykern.core.errors import ComparisonError
from psykern.study.effects import effects_of
from psykern.study.finished import Responses, load, open_runs, restrict
from psykern.study.models import StudyModel, read_models
from psykern.study.one_run import summarize
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
from psykern.study.results import Comparison, PairResult, ParticipantTable, RunResult
from psykern.study.two_runs import compare_pair

DRAWS = 2000


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
    if not all(map(str, runs)):  # a variable of the shell that is not set; Path("") is the folder at hand
        raise ComparisonError("runs: expected folders, got an empty string")
    named = name_runs([run for folder in runs for run in open_runs(Path(folder))], described)
    if not named:
        raise ComparisonError("runs: expected at least one, got none")
    check_alike(named)
    loaded = _Loaded(on_run, progress)
    results = [loaded.compare(pair, draws) for pair in _pairs_of(named, pairs, unpaired)]
    post_training = tuple(result for result in results if not result.pair.same_model)
    return Comparison(
        runs=tuple(loaded.result(run) for run in named),
        pairs=post_training,
        conditions=tuple(result for result in results if result.pair.same_model),
        effects=tuple(effects_of(post_training, of_study)),
        domains=of_study,
        draws=draws,
    )


def _pairs_of(runs: Sequence[NamedRun], file: str | Path | None, unpaired: bool) -> list[Pair]:
    """In order of their bases, so that a base is loaded once for all its pairs."""
    found = read_pairs(Path(file), runs) if file is not None else find_pairs(runs)
    if not unpaired:
        check_partners(runs, found)
    return sorted(found, key=lambda pair: runs.index(pair.base))


def read_domains(path: Path) -> dict[str, str]:
    """Domain of each study from a CSV file with the columns study and domain. Raises ComparisonError."""
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

    def compare(self, pair: Pair, draws: int) -> PairResult:
        base, post = self.responses(pair.base), self.responses(pair.post)
        temperatures = self.result(pair.base).temperature, self.result(pair.post).temperature
        if pair.same_model and pair.post.run.condition == "persona":  # only participants of whom something is known
            base = restrict(base, post.participants)
        check_rows(pair, base, post)
        self._progress(f"comparing {pair.post.label} with {pair.base.label}")
        return compare_pair(pair, base, post, temperatures, draws)
