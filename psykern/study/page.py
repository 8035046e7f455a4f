"""The page of a report, report.html.

It holds its figures and style in itself, asks for nothing from outside, runs no script, and is laid out for a
phone's width, a desk and print. Equal comparisons give equal bytes.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from psykern.study.finished import FinishedRun
from psykern.study.results import Comparison, Interval, PairResult, PairStudy
from psykern.study.tables import number, share
from psykern.version import __version__

_OPEN_FORESTS = 3  # more pairs than this have their study-by-study figures folded


@dataclass(frozen=True, slots=True)
class Image:
    """A drawn figure, ready for the page."""

    name: str
    title: str
    caption: str
    svg: bytes


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
        f"(sign test p = {_p(result.sign_test)}) and for {share(row.participants_base_wins)} of participants."
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
                share(result.studies_base_wins),
                share(mean.participants_base_wins),
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
        first = [escape(result.named.label), escape(model.kind), size, _estimate(result.nll, 3), number(mean.bits)]
        rows.append([*first, *map(number, numbers)])
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
        escape(row.study), f"{row.participants:,}", f"{row.responses:,}", number(row.base_nll), number(row.post_nll),
        _estimate(row.d, 3), _estimate(row.difference, 3, sign=True), _estimate(row.option_difference, 3, sign=True),
        _estimate(row.rescaled_difference, 3, sign=True), share(row.participants_base_wins),
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
            escape(r.named.label), escape(r.named.run.model_id), escape(_condition(r.named.run)),
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


def _condition(run: FinishedRun) -> str:
    return run.condition if run.date is None else f"{run.condition}, on {run.date}"


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


def _estimate(value: Interval, digits: int, sign: bool = False) -> str:
    text = number(value.value, digits, sign)
    if math.isnan(value.low):
        return text
    low, high = (number(end, digits) for end in (value.low, value.high))
    return f'{text} <span class="interval">[{low}, {high}]</span>'


def _p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
