"""psykern scores human behaviour under language models: exact log-probabilities of every response of an experiment.

>>> import psykern
>>> run = psykern.score("path/to/model", "path/to/data", out="run")
>>> print(run.summary.mean_nll)
"""

from __future__ import annotations

from importlib import import_module

from psykern.version import __version__

TYPE_CHECKING = (
    False  # as type checkers know it; typing takes longer to load than all else that the command needs first
)
if TYPE_CHECKING:
    from typing import Any

    from psykern.core.errors import (
        BackendError,
        CheckpointError,
        ComparisonError,
        DataError,
        InterruptedRun,
        NonFiniteError,
        NoSharingWarning,
        OutOfMemoryError,
        PsykernError,
        RejectedRowsWarning,
        RowError,
        RunFolderError,
        SlowDtypeWarning,
        Source,
    )
    from psykern.core.settings import Settings, Shard
    from psykern.runs.cluster import Workers, score_on_cluster
    from psykern.runs.estimate import Estimate, StudyPlan, estimate
    from psykern.runs.folder import read_run
    from psykern.runs.job import Run
    from psykern.runs.manifest import Manifest
    from psykern.runs.plan_text import format_estimate
    from psykern.runs.run import score, score_adapters, score_conditions
    from psykern.runs.streaming import GpuWeights, WeightsPlan
    from psykern.runs.summary import StudySummary, Summary, format_summary
    from psykern.scoring.loading import load
    from psykern.scoring.results import Choice, Logprob, Reject, Surprisal, TokenLogprobs, TokenScores, TopTokens
    from psykern.scoring.scorer import Scorer
    from psykern.scoring.session import Mark, Session, astep, step
    from psykern.study.report import compare_runs
    from psykern.study.results import Comparison
    from psykern.study.tables import format_comparison

# Where the public names are. A name is loaded when it is first asked for: torch alone takes a second.
_HOMES = {
    "core.errors": "BackendError CheckpointError ComparisonError DataError InterruptedRun NoSharingWarning "
    "NonFiniteError OutOfMemoryError PsykernError RejectedRowsWarning RowError RunFolderError SlowDtypeWarning Source",
    "core.settings": "Settings Shard",
    "runs.cluster": "Workers score_on_cluster",
    "runs.estimate": "Estimate StudyPlan estimate",
    "runs.folder": "read_run",
    "runs.job": "Run",
    "runs.manifest": "Manifest",
    "runs.plan_text": "format_estimate",
    "runs.run": "score score_adapters score_conditions",
    "runs.streaming": "GpuWeights WeightsPlan",
    "runs.summary": "StudySummary Summary format_summary",
    "scoring.results": "Choice Logprob Reject Surprisal TokenLogprobs TokenScores TopTokens",
    "scoring.loading": "load",
    "scoring.scorer": "Scorer",
    "scoring.session": "Mark Session astep step",
    "study.results": "Comparison",
    "study.report": "compare_runs",
    "study.tables": "format_comparison",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
_ROOMS = ("demo", "kernels")  # whose names are used with the room's own before them

__all__ = [
    "BackendError",
    "CheckpointError",
    "Choice",
    "Comparison",
    "ComparisonError",
    "DataError",
    "Estimate",
    "GpuWeights",
    "InterruptedRun",
    "Logprob",
    "Manifest",
    "Mark",
    "NoSharingWarning",
    "NonFiniteError",
    "OutOfMemoryError",
    "PsykernError",
    "Reject",
    "RejectedRowsWarning",
    "RowError",
    "Run",
    "RunFolderError",
    "Scorer",
    "Session",
    "Settings",
    "Shard",
    "SlowDtypeWarning",
    "Source",
    "StudyPlan",
    "StudySummary",
    "Summary",
    "Surprisal",
    "TokenLogprobs",
    "TokenScores",
    "TopTokens",
    "WeightsPlan",
    "Workers",
    "__version__",
    "astep",
    "compare_runs",
    "estimate",
    "format_comparison",
    "format_estimate",
    "format_summary",
    "load",
    "read_run",
    "score",
    "score_adapters",
    "score_conditions",
    "score_on_cluster",
    "step",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"psykern.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'psykern' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"psykern.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME, *_ROOMS]
