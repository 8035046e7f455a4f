"""The report of a comparison: REPORT/report.html, one self-contained page; tables/*.csv; figures/*.svg and *.png."""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from psykern.core.errors import ComparisonError, PsykernError, RunFolderError
from psykern.study.compare import DRAWS, compare
from psykern.study.models import StudyModel
from psykern.study.page import Image, page
from psykern.study.results import Comparison, ParticipantTable, RunResult
from psykern.study.tables import tables, write_csv, write_participants


def compare_runs(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    pairs: str | Path | None = None,
    models: str | Path | Mapping[str, StudyModel] | None = None,
    domains: str | Path | Mapping[str, str] | None = None,
    unpaired: bool = False,
    draws: int = DRAWS,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare runs as :func:`psykern.study.compare.compare` does and write the report to the new folder ``out``.

    Raises ComparisonError also where matplotlib or PyYAML is missing, RunFolderError for a folder that cannot be
    written; report.html is written last.
    """
    _check_libraries(models)
    folder = _create(Path(out))

    labels: dict[str, str] = {}  # by the name of their file

    def on_run(result: RunResult, participants: ParticipantTable) -> None:
        name = _slug(result.named.label)
        while labels.setdefault(name, result.named.label) != result.named.label:  # "m (chat)", a model called m-chat
            name += "-"
        write_participants(folder / "tables" / f"participants-{name}.csv", participants)

    try:
        (folder / "tables").mkdir()
        comparison = compare(
            runs, pairs=pairs, models=models, domains=domains, unpaired=unpaired, draws=draws, on_run=on_run,
            progress=progress,
        )  # fmt: skip
        progress("writing tables and figures")
        for name, rows in tables(comparison).items():
            if rows:
                write_csv(folder / "tables" / f"{name}.csv", rows)
        images = _write_figures(comparison, folder / "figures")
        (folder / "report.html").write_text(page(comparison, images), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written: {error.strerror or error}") from error
    except PsykernError:  # the same command, put right, finds the folder empty
        shutil.rmtree(folder / "tables", ignore_errors=True)
        raise
    return comparison


def _check_libraries(models: object) -> None:
    try:
        import matplotlib  # noqa: F401

        if isinstance(models, str | Path):
            import yaml  # noqa: F401
    except ModuleNotFoundError as error:
        raise ComparisonError(
            f"a report needs {error.name}, which is not installed; pip install 'psykern[report]' brings it"
        ) from error


def _create(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = min((entry.name for entry in folder.iterdir()), default=None)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written: {error.strerror or error}") from error
    if found is not None:
        raise RunFolderError(f"{folder}: expected a new or empty folder to write the report to, it holds {found}")
    return folder


def _slug(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label).strip("-")


def _write_figures(comparison: Comparison, folder: Path) -> list[Image]:
    import matplotlib

    from psykern.study import figures

    folder.mkdir()
    images = []
    for drawing in figures.draw(comparison):
        with matplotlib.rc_context(figures.STYLE):
            svg = io.BytesIO()
            drawing.figure.savefig(svg, format="svg", metadata={"Date": None})
            drawing.figure.savefig(folder / f"{drawing.name}.png", dpi=180, metadata={"Software": None})
        (folder / f"{drawing.name}.svg").write_bytes(svg.getvalue())
        images.append(Image(drawing.name, drawing.title, drawing.caption, svg.getvalue()))
    return images
