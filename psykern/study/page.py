"""The report of a comparison: REPORT/report.html, one self-contained page; tables/*.csv; figures/*.svg and *.png.

The page holds its figures and style in itself, asks for nothing from outside, runs no script, and is laid out for a
phone's width, a desk and print. Equal comparisons give equal bytes.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from psykern.core.errors import ComparisonError, RunFolderError
from psykern.study.compare import (
    DRAWS,
    Comparison,
    Estimate,
    PairResult,
    PairStudy,
    ParticipantTable,
    RunResult,
    compare,
)
from psykern.study.models import StudyModel
from psykern.version import __version__

_OPEN_FORESTS = 3  # more pairs than this have their study-by-study figures folded
_NAN = math.nan


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

    def on_run(result: RunResult, participants: ParticipantTable) -> None:
        _write_participants(folder / "tables" / f"participants-{_slug(result.named.label)}.csv", participants)

    try:
        (folder / "tables").mkdir()
        comparison = compare(
            runs, pairs=pairs, models=models, domains=domains, unpaired=unpaired, draws=draws, on_run=on_run,
            progress=progress,
        )  # fmt: skip
        progress("writing tables and figures")
        for name, rows in tables(comparison).items():
            if rows:
                _write_csv(folder / "tables" / f"{name}.csv", rows)
        images = _write_figures(comparison, folder / "figures")
        (folder / "report.html").write_text(page(comparison, images), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written: {error.strerror or error}") from error
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


# Tables


def tables(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """The rows of each CSV file; an estimate takes three columns, NaN is an empty cell."""
    every = [*comparison.pairs, *comparison.conditions]
    return {
        "models": [_model_row(result) for result in comparison.runs],
        "studies": [
            {"model": result.named.label, **_flat(row)} for result in comparison.runs for row in result.studies
        ],
        "pairs": [_pair_row(result) for result in every],
        "pair_studies": [
            {**_pair_names(result), "domain": comparison.domains.get(row.study, ""), **_flat(row)}
            for result in every
            for row in result.studies
        ],
        "effects": [
            {key: value for key, value in _flat(effect).items() if key != "values"} for effect in comparison.effects
        ],
        "calibration": [row for result in comparison.runs for row in _calibration_rows(result)],
    }


def _flat(row: Any) -> dict[str, Any]:
    """A dataclass as columns."""
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Estimate):
            columns |= {field.name: value.value, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
        else:
            columns[field.name] = value
    return columns


def _model_row(result: RunResult) -> dict[str, Any]:
    model, run = result.named.model, result.named.run
    means = {name: value for name, value in _flat(result.aggregate).items() if name not in ("study", "nll", "accuracy")}
    return {
        "model": result.named.label,
        "model_id": run.model_id,
        "condition": run.condition,
        "family": model.family,
        "generation": model.generation,
        "size_billions": _NAN if model.size is None else model.size,
        "kind": model.kind,
        "studies": len(result.studies),
        "nll": result.nll.value,
        "nll_low": result.nll.low,
        "nll_high": result.nll.high,
        "accuracy": result.accuracy.value,
        "accuracy_low": result.accuracy.low,
        "accuracy_high": result.accuracy.high,
        "response_weighted_nll": result.response_weighted_nll,
        "participant_nll": result.participant_nll,
        "temperature": result.temperature,
        "pooled_calibration_error": result.calibration.error,
        "pooled_overconfidence": result.calibration.overconfidence,
        **means,
        "run": str(run.path),
    }


def _pair_names(result: PairResult) -> dict[str, Any]:
    pair = result.pair
    return {"base": pair.base.label, "post": pair.post.label, "kind": pair.kind}


def _pair_row(result: PairResult) -> dict[str, Any]:
    means = {name: value for name, value in _flat(result.aggregate).items() if name != "study"}
    return {
        **_pair_names(result),
        "generation": result.pair.post.model.generation,
        "studies": len(result.studies),
        "studies_base_wins": result.studies_base_wins,
        "sign_test_p": result.sign_test,
        **means,
    }


def _calibration_rows(result: RunResult) -> Iterable[dict[str, Any]]:
    bins = result.calibration
    for place, (count, confidence, hits) in enumerate(zip(bins.counts, bins.confidence, bins.hits, strict=True)):
        if count:
            low, high = place / len(bins.counts), (place + 1) / len(bins.counts)
            yield {
                "model": result.named.label,
                "bin_low": low,
                "bin_high": high,
                "responses": int(count),
                "mean_confidence": confidence / count,
                "share_of_hits": hits / count,
            }


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    return value


def _write_participants(path: Path, table: ParticipantTable) -> None:
    studies, experiments, participants = zip(*table.participants, strict=True) if table.participants else ((), (), ())
    numbers = {
        "nll": table.nll,
        "accuracy": table.accuracy,
        "option_nll": table.option_nll,
    }
    columns = {
        "study": pa.array(studies, pa.string()),
        "experiment": pa.array(experiments, pa.string()),
        "participant": pa.array(participants, pa.string()),
        "scored": pa.array(table.scored).cast(pa.int64()),
        **{name: pa.array(values, from_pandas=True) for name, values in numbers.items()},  # NaN becomes an empty cell
    }
    pa_csv.write_csv(pa.table(columns), path)


# Figures


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """A drawn figure, ready for the page."""

    name: str
    title: str
    caption: str
    svg: bytes


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


# The page

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 50rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; padding-top: 0.6rem; border-top: 1px solid #ccc; }
p, li { max-width: 44rem; }
.lead { color: #444; }
figure { margin: 1.6rem 0; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: 0.9rem; color: #333; margin-top: 0.3rem; }
figcaption b { color: #000; }
.scroll { overflow-x: auto; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e2e2e2; }
th { border-bottom: 1.5px solid #333; vertical-align: bottom; white-space: normal; min-width: 4rem; }
td { vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: #fff; }
tr.mean td { font-weight: 600; border-top: 1.5px solid #333; }
td.text, th.text { text-align: left; }
.interval { color: #555; font-size: 0.92em; }
td .interval { display: block; }
summary { cursor: pointer; padding: 0.3rem 0; color: #0050a0; }
dt { font-weight: 600; margin-top: 0.7rem; } dd { margin: 0 0 0 1rem; }
code { font-size: 0.92em; overflow-wrap: anywhere; }
@media (min-width: 60rem) { .scroll { width: max-content; max-width: calc(50vw + 23rem); min-width: 100%; } }
@media print {
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  h2 { break-after: avoid; } .scroll { overflow: visible; width: auto; max-width: 100%; } tr { break-inside: avoid; }
  table { font-size: 6.6pt; } th, td { padding: 1pt 2pt; white-space: normal; } th { min-width: 0; }
  td .interval { white-space: nowrap; } td.path { overflow-wrap: anywhere; }
  figure img { max-height: 20cm; width: auto; max-width: 100%; margin: 0 auto; }
}
"""


def page(comparison: Comparison, images: Sequence[Image]) -> str:
    """The page as HTML."""
    sections = [
        _head(comparison),
        _findings(comparison),
        _pairs_section("Pairs", "Difference: post-trained − base.", "base", comparison.pairs),
        _pairs_section("Conditions", "Difference: condition − plain.", "plain", comparison.conditions),
        _figures_section(images),
        _models_section(comparison),
        _study_sections(comparison),
        _METHODS.replace("{draws}", f"{comparison.draws:,}"),
        _provenance(comparison),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(_title(comparison))}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _title(comparison: Comparison) -> str:
    if len(comparison.pairs) == 1:
        pair = comparison.pairs[0].pair
        return f"{pair.post.label} against {pair.base.label}"
    return f"Human responses under {len({result.named.model.name for result in comparison.runs})} language models"


def _head(comparison: Comparison) -> str:
    first = comparison.runs[0]
    settings = dict(first.named.run.settings)
    counts = first.aggregate
    conditions = sorted({result.named.run.condition for result in comparison.runs})
    return (
        f"<h1>{escape(_title(comparison))}</h1>\n"
        f'<p class="lead">{counts.responses:,} human responses of {counts.participants:,} participants in '
        f"{_count(len(first.studies), 'study', 'studies')}, scored under {_count(len(comparison.runs), 'run', 'runs')} "
        f"(protocol {escape(settings['protocol'].strip(chr(34)))}; condition {escape(', '.join(conditions))}). "
        "NLL is the negative log-likelihood of a response in nats; lower is better.</p>"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _findings(comparison: Comparison) -> str:
    """One sentence per kind of post-training, pair by pair where there are few."""
    items = []
    for effect in (e for e in comparison.effects if e.group_by == "kind"):
        of_kind = [result for result in comparison.pairs if result.pair.kind == effect.kind]
        line = (
            f"<b>{escape(effect.kind)}</b>: mean Cohen’s d {_estimate(effect.d, 2)} over "
            f"{_count(effect.pairs, 'pair', 'pairs')}"
        )
        if not math.isnan(effect.published):
            line += f" (published: {effect.published:.2f})"
        items.append(f"{line}. {' '.join(_finding(result) for result in of_kind[:3])}")
    if not items:
        return ""
    listed = "\n".join(f"<li>{item}</li>" for item in items)
    return f"<h2>Findings</h2>\n<p>d above 0: post-training made the fit to people worse.</p>\n<ul>\n{listed}\n</ul>"


def _finding(result: PairResult) -> str:
    row, studies = result.aggregate, len(result.studies)
    wins = round(result.studies_base_wins * studies) if not math.isnan(result.studies_base_wins) else 0
    text = (
        f"{escape(result.pair.post.label)} changes the NLL by {_estimate(row.difference, 3, sign=True)} nats; "
        f"{escape(result.pair.base.label)} fits better in {wins} of {_count(studies, 'study', 'studies')} "
        f"(sign test p = {_p(result.sign_test)}) and for {_share(row.participants_base_wins)} of participants."
    )
    if not math.isnan(row.option_difference.value):
        text += (
            f" On responses with options the change is {_estimate(row.option_difference, 3, sign=True)} nats, and "
            f"{_estimate(row.rescaled_difference, 3, sign=True)} once each model has its best temperature."
        )
    return text


def _pairs_section(title: str, note: str, first: str, results: Sequence[PairResult]) -> str:
    """``first`` is what the first of each pair is called."""
    if not results:
        return ""
    header = [
        "pair", "kind", "d", "NLL difference (nats)", "option NLL difference", "at best temperatures",
        "entropy difference", "accuracy difference", f"studies where {first} is better", "participants", "sign test p",
    ]  # fmt: skip
    rows = []
    for result in results:
        mean = result.aggregate
        rows.append(
            [
                f"{escape(result.pair.post.label)} − {escape(result.pair.base.label)}",
                escape(result.pair.kind),
                _estimate(mean.d, 3),
                *(
                    _estimate(value, 3, sign=True)
                    for value in (
                        mean.difference, mean.option_difference, mean.rescaled_difference, mean.entropy_difference,
                        mean.accuracy_difference,
                    )
                ),
                _share(result.studies_base_wins),
                _share(mean.participants_base_wins),
                _p(result.sign_test),
            ]
        )  # fmt: skip
    return (
        f"<h2>{title}</h2>\n<p>{note} Means over studies with 95 % intervals over participants; the shares are of all "
        f"studies and of all participants.</p>\n{_table(header, rows)}"
    )


def _figures_section(images: Sequence[Image]) -> str:
    forests = [image for image in images if image.name.startswith("forest")]
    folded = forests if len(forests) > _OPEN_FORESTS else []
    shown = "\n".join(_figure(image) for image in images if image not in folded)
    if folded:
        inner = "\n".join(_figure(image) for image in folded)
        shown += f"\n<details><summary>Study by study, {len(folded)} pairs</summary>\n{inner}\n</details>"
    return f"<h2>Figures</h2>\n{shown}" if images else ""


def _figure(image: Image) -> str:
    data = base64.b64encode(image.svg).decode()
    title = image.title if image.title.endswith("?") else f"{image.title}."
    return (
        f'<figure id="{escape(image.name)}"><img alt="{escape(image.title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption><b>{escape(title)}</b> {escape(image.caption)}</figcaption></figure>"
    )


def _models_section(comparison: Comparison) -> str:
    header = [
        "model", "kind", "billions", "NLL", "bits", "response-weighted NLL", "participants’ NLL", "accuracy", "entropy",
        "option NLL", "uniform", "pseudo-R²", "option accuracy", "Brier", "calibration error", "overconfidence",
        "temperature", "rescaled option NLL",
    ]  # fmt: skip
    rows = []
    for result in comparison.runs:
        mean, model = result.aggregate, result.named.model
        numbers = [
            result.response_weighted_nll, result.participant_nll, mean.accuracy, mean.entropy, mean.option_nll,
            mean.uniform_nll, mean.pseudo_r2, mean.option_accuracy, mean.brier, mean.calibration_error,
            mean.overconfidence, result.temperature, mean.rescaled_nll,
        ]  # fmt: skip
        size = "–" if model.size is None else f"{model.size:.3g}"
        first = [escape(result.named.label), escape(model.kind), size, _estimate(result.nll, 3), _number(mean.bits)]
        rows.append([*first, *map(_number, numbers)])
    return (
        "<h2>Models</h2>\n<p>Means over studies, except where a column says otherwise. Entropy is the vocabulary’s at "
        "a response’s first token, in nats; columns from option NLL on are over responses with known options.</p>\n"
        f"{_table(header, rows)}"
    )


def _study_sections(comparison: Comparison) -> str:
    results = [*comparison.pairs, *comparison.conditions]
    if not results:
        return ""
    parts = []
    for result in results:
        header = ["study", "participants", "responses", "base", "post", "d", "difference", "option difference",
                  "at best temperatures", "participants, first fits better"]  # fmt: skip
        rows = [_study_row(row) for row in (*result.studies, result.aggregate)]
        open_ = " open" if len(results) <= 2 else ""
        parts.append(
            f"<details{open_}><summary>{escape(result.pair.post.label)} − {escape(result.pair.base.label)}</summary>\n"
            f"{_table(header, rows, last_is_mean=True)}\n</details>"
        )
    return "<h2>Studies</h2>\n" + "\n".join(parts)


def _study_row(row: PairStudy) -> list[str]:
    return [
        escape(row.study), f"{row.participants:,}", f"{row.responses:,}", _number(row.base_nll), _number(row.post_nll),
        _estimate(row.d, 3), _estimate(row.difference, 3, sign=True), _estimate(row.option_difference, 3, sign=True),
        _estimate(row.rescaled_difference, 3, sign=True), _share(row.participants_base_wins),
    ]  # fmt: skip


_METHODS = """<h2>Methods</h2>
<dl>
<dt>NLL</dt><dd>−log p of a response’s tokens over the whole vocabulary, in nats; a study’s value is the mean over its
responses, a model’s the unweighted mean over studies. Response-weighted: the mean over all responses. bits =
nats / log 2.</dd>
<dt>Cohen’s d</dt><dd>(mean<sub>post</sub> − mean<sub>base</sub>) / √((sd²<sub>base</sub> + sd²<sub>post</sub>) / 2)
over the responses of a study that both models scored, sd with n − 1; then the mean over studies, then over pairs of
one kind, as in the published study.</dd>
<dt>Intervals</dt><dd>95 %, from {draws} draws of a study’s participants with replacement (cluster bootstrap;
1,000 for a single model), widened by √(C / (C − 1)) for C participants. Studies are not drawn: the intervals are about
these studies. With few participants they are too narrow; a study of one participant enters the mean without
spread.</dd>
<dt>Sign test</dt><dd>Two-sided, exact, over the studies’ NLL differences; ties are left out.</dd>
<dt>Options</dt><dd>q(o) is the softmax over a response’s known options. Option NLL: −log q(response). Uniform:
log(number of options). Pseudo-R² (McFadden): 1 − option NLL / uniform. Option accuracy: the likeliest option is the
response. Brier: Σ<sub>o</sub> (q(o) − 1[o = response])². Calibration error: Σ<sub>bins</sub> share · |hits − mean
confidence| in ten bins of the likeliest option’s probability; overconfidence: mean confidence − hits.</dd>
<dt>Temperature</dt><dd>The one T per model that minimises the mean over studies of
−log softmax(log q / T)(response). T above 1: the model is too sure of its options. What a comparison still shows at
both models’ best temperatures is a loss of fit beyond mere overconfidence.</dd>
</dl>"""


def _provenance(comparison: Comparison) -> str:
    header = ["run", "model", "condition", "model hash", "device", "dtype", "folder"]
    rows = [
        [
            escape(r.named.label), escape(r.named.run.model_id), escape(r.named.run.condition),
            escape(r.named.run.model_hash[:16]), escape(r.named.run.device), escape(r.named.run.dtype),
            escape(str(r.named.run.path)),
        ]
        for r in comparison.runs
    ]  # fmt: skip
    run = comparison.runs[0].named.run
    settings = ", ".join(f"{name} {value}" for name, value in run.settings)
    return (
        f"<h2>Provenance</h2>\n{_table(header, rows, text=True)}\n"
        f"<p>Settings of all runs: <code>{escape(settings)}</code>. Data: {_count(len(run.data), 'file', 'files')}, "
        f"hashes from <code>{escape(run.data[0][:16] if run.data else '–')}</code>. Report by psykern "
        f"{escape(__version__)}. The numbers are in <code>tables/</code>, the figures in <code>figures/</code>.</p>"
    )


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, last_is_mean: bool = False, text: bool = False
) -> str:
    """``rows`` hold HTML."""
    kind = ' class="text path"' if text else ""
    head = "".join(f"<th{kind}>{escape(cell)}</th>" for cell in header)
    body = "\n".join(
        f"<tr{' class=mean' if last_is_mean and row is rows[-1] else ''}>"
        f"{''.join(f'<td{kind}>{cell}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _number(value: float, digits: int = 3, sign: bool = False) -> str:
    if math.isnan(value):
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def _estimate(value: Estimate, digits: int, sign: bool = False) -> str:
    text = _number(value.value, digits, sign)
    if math.isnan(value.low):
        return text
    low, high = (_number(end, digits) for end in (value.low, value.high))
    return f'{text} <span class="interval">[{low}, {high}]</span>'


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def format_comparison(comparison: Comparison) -> str:
    """The printed table: a line per pair, with the mean effect and its interval; empty without pairs."""
    header = ("pair", "kind", "d", "95 %", "NLL difference", "95 %", "base better: studies", "participants")
    rows = [
        (
            f"{result.pair.post.label} − {result.pair.base.label}",
            result.pair.kind,
            *_value_and_interval(result.aggregate.d),
            *_value_and_interval(result.aggregate.difference),
            _share(result.studies_base_wins),
            _share(result.aggregate.participants_base_wins),
        )
        for result in (*comparison.pairs, *comparison.conditions)
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            [
                *(c.ljust(w) for c, w in zip(row[:2], widths, strict=False)),
                *(c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True)),
            ]
        )
        for row in ((header, *rows) if rows else ())
    )


def _value_and_interval(value: Estimate) -> tuple[str, str]:
    interval = "–" if math.isnan(value.low) else f"[{_number(value.low)}, {_number(value.high)}]"
    return _number(value.value, sign=True), interval
