"""psykern scores human behaviour under language models: exact log-probabilities of every response of an experiment.

>>> import psykern
>>> run = psykern.score("path/to/model", "path/to/data", out="run")
>>> print(run.summary.mean_nll)
"""

from psykern.core.types import (
    CheckpointError,
    ComparisonError,
    DataError,
    InterruptedRun,
    NonFiniteError,
    OutOfMemoryError,
    PsykernError,
    RowError,
    RunFolderError,
    Source,
)
from psykern.kernels import BackendError
from psykern.runs.cluster import Workers, score_on_cluster
from psykern.runs.folder import Manifest, read_run
from psykern.runs.run import Estimate, Run, Settings, Shard, StudyPlan, estimate, score, score_conditions
from psykern.study.compare import Comparison
from psykern.study.metrics import StudySummary, Summary, format_summary
from psykern.study.page import compare_runs, format_comparison
from psykern.version import __version__

__all__ = [
    "BackendError",
    "CheckpointError",
    "Comparison",
    "ComparisonError",
    "DataError",
    "Estimate",
    "InterruptedRun",
    "Manifest",
    "NonFiniteError",
    "OutOfMemoryError",
    "PsykernError",
    "RowError",
    "Run",
    "RunFolderError",
    "Settings",
    "Shard",
    "Source",
    "StudyPlan",
    "StudySummary",
    "Summary",
    "Workers",
    "__version__",
    "compare_runs",
    "estimate",
    "format_comparison",
    "format_summary",
    "read_run",
    "score",
    "score_conditions",
    "score_on_cluster",
]
