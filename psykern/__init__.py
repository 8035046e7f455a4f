"""psykern scores human behaviour under language models: exact log-probabilities of every response of an experiment.

>>> import psykern
>>> run = psykern.score("path/to/model", "path/to/data", out="run")
>>> print(run.summary.mean_nll)
"""

from psykern.cluster import Workers, score_on_cluster
from psykern.compare import Comparison
from psykern.core import (
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
from psykern.metrics import StudySummary, Summary, format_summary
from psykern.records import Manifest, read_run
from psykern.report import compare_runs, format_comparison
from psykern.score import Estimate, Run, Settings, Shard, StudyPlan, estimate, score, score_conditions
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
