"""A report: its files (report.py, tables.py, figures), what the page says, and the page in a real browser."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.simulated_runs import Humans, rows, write_run

import psykern
from psykern.cli import main
from psykern.study.figures.style import KINDS, OTHER

pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

HUMANS = Humans(studies=("alpha", "beta <b>&amp;", "ga$m_$ma"), participants=12, responses=10)
RUNS = {  # model: shift of the NLL, sharpness, condition
    "Qwen3-4B-Base": (0.0, 1.0, "plain"),
    "Qwen3-4B": (0.2, 1.5, "plain"),
    "Qwen3-8B-Base": (-0.1, 1.0, "plain"),
    "Qwen3-8B": (0.1, 1.5, "plain"),
    "Qwen3-VL-8B-Instruct": (0.0, 1.2, "plain"),
    "Qwen3-8B chat": (0.4, 2.0, "chat"),
}
FIGURES = {
    *("nll_by_size", "accuracy_by_size", "d_by_kind", "d_by_generation", "d_by_domain", "d_pairs_by_domain"),
    *("forest_01", "forest_02", "forest_03", "scatter", "calibration", "determinism", "conditions"),
}
TABLES = {"models", "studies", "pairs", "pair_studies", "effects", "calibration"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(
            folder / name.replace(" ", "-"),
            f"Qwen/{name.split()[0]}",
            rows(HUMANS, shift=shift, sharpness=sharpness, seed=i),
            condition=condition,
        )
        for i, (name, (shift, sharpness, condition)) in enumerate(RUNS.items())
    ]


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("domains") / "domains.csv"
    path.write_text("study,domain\nalpha,games\nga$m_$ma,memory\n")
    return path


@pytest.fixture(scope="module")
def report(runs: list[Path], domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report"
    assert main(["compare", *map(str, runs), "--out", str(out), "--domains", str(domains), "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def again(runs: list[Path], domains: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, psykern.Comparison]:
    """A second report on the same runs, by the function."""
    out = tmp_path_factory.mktemp("again") / "report"
    return out, psykern.compare_runs(runs, out, domains=domains)


def table(report: Path, name: str) -> list[dict[str, str]]:
    with (report / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Files


def test_every_figure_and_table_is_there(report: Path) -> None:
    assert {path.stem for path in (report / "figures").glob("*.svg")} == FIGURES
    assert {path.stem for path in (report / "figures").glob("*.png")} == FIGURES
    names = {path.stem for path in (report / "tables").iterdir()}
    assert {name for name in names if not name.startswith("participants-")} == TABLES
    assert len([name for name in names if name.startswith("participants-")]) == len(RUNS)
    assert "participants-Qwen3-8B-chat" in names


def test_tables_hold_the_comparisons_numbers(report: Path, again: tuple[Path, psykern.Comparison]) -> None:
    _, comparison = again
    models = {row["model"]: row for row in table(report, "models")}
    for result in comparison.runs:
        row = models[result.named.label]
        assert float(row["nll"]) == pytest.approx(result.aggregate.nll)
        assert float(row["temperature"]) == pytest.approx(result.temperature)
        assert int(row["responses"]) == result.aggregate.responses
    pairs = table(report, "pairs")
    assert [float(row["d_high"]) for row in pairs] == pytest.approx(
        [result.aggregate.d.high for result in (*comparison.pairs, *comparison.conditions)]
    )
    studies = table(report, "pair_studies")
    assert len(studies) == 4 * 3
    assert {row["study"]: row["domain"] for row in studies} == {
        "alpha": "games",
        "beta <b>&amp;": "",
        "ga$m_$ma": "memory",
    }
    assert {row["option_difference"] for row in studies if row["study"] == "ga$m_$ma"} == {""}  # no options: no value
    participants = table(report, "participants-Qwen3-8B")
    assert len(participants) == 36
    mean = np.mean([float(row["nll"]) for row in participants])
    assert mean == pytest.approx(float(models["Qwen3-8B"]["participant_nll"]))


def test_equal_comparisons_give_equal_bytes(report: Path, again: tuple[Path, psykern.Comparison]) -> None:
    other, _ = again
    files = sorted(path.relative_to(report) for path in report.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert [file for file in files if (report / file).read_bytes() != (other / file).read_bytes()] == []


def test_what_a_comparison_lacks_is_in_no_figure(tmp_path: Path) -> None:
    """Models of unknown size without options, partner or domain."""
    run = write_run(tmp_path / "run", "me/mine", rows(Humans(options=0)))
    comparison = psykern.compare_runs([run], tmp_path / "report", unpaired=True)
    assert list((tmp_path / "report" / "figures").iterdir()) == []
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h2>Models</h2>" in page and "<h2>Figures</h2>" not in page and "Pairs" not in page
    assert psykern.format_comparison(comparison) == ""


# The page


class Page(HTMLParser):
    """Tags that are open, whatever is asked for from outside, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("data:"):
                self.outside.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_is_well_formed_and_self_contained(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert page.outside == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in html and "@import" not in html
    assert page.tags.count("img") == len(FIGURES)
    assert '<meta name="viewport"' in html


def test_the_page_says_what_was_found(report: Path) -> None:
    text = " ".join(Page((report / "report.html").read_text(encoding="utf-8")).text.split())
    assert "beta <b>&amp;" in text  # a study's name is text, not markup
    pairs = {row["post"]: row for row in table(report, "pairs")}
    difference = float(pairs["Qwen3-8B"]["difference"])
    assert f"Qwen3-8B changes the NLL by +{difference:.3f}" in text
    assert "(published: 0.14)" in text and "(published: 0.07)" in text
    for heading in ("Findings", "Pairs", "Conditions", "Figures", "Models", "Studies", "Methods", "Provenance"):
        assert heading in text
    assert re.search(r"\bnan", text, re.IGNORECASE) is None


def test_dates_of_the_prompts_are_shown(tmp_path: Path) -> None:
    """Of two days, which may be set against each other."""
    given = {"Qwen3-4B-Base": "2026-11-30", "Qwen3-4B": "2026-12-01"}
    runs = [
        write_run(tmp_path / name, f"Qwen/{name}", rows(HUMANS, seed=1), condition="chat", date=date)
        for name, date in given.items()
    ]
    psykern.compare_runs(runs, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    for date in given.values():
        assert f'<td class="text path">chat, on {date}</td>' in page
    with (tmp_path / "report" / "tables" / "models.csv").open() as file:
        assert [row["date"] for row in csv.DictReader(file)] == list(given.values())


def test_kinds_differ_by_colour_and_marker() -> None:
    known = {kind: KINDS[kind] for kind in ("base", "instruction", "reasoning", "vision", "code", "math", "human")}
    looks = [*known.values(), OTHER]
    assert len({color for color, _, _ in looks}) == len(looks)
    assert len({marker for _, marker, _ in looks}) == len(looks)
    okabe_ito = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"}
    assert okabe_ito <= {color for color, _, _ in looks}


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def browse(tmp_path: Path, *arguments: str) -> str:
    """Standard output of headless Chromium with a new profile."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium, found none on PATH")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


MEASURE = """
<iframe id="page" src="report.html" style="width: {width}px; height: 4000px; border: 0"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const root = frame.contentDocument, images = [...root.images];
  const wide = [...root.querySelectorAll("h1,h2,p,li,figure,img,figcaption,.scroll,dd")];
  const right = Math.max(...wide.map(element => element.getBoundingClientRect().right));
  document.title = "done";
  document.body.dataset.found = [
    root.documentElement.scrollWidth, Math.ceil(right), images.length,
    images.filter(image => image.complete && image.naturalWidth > 0).length,
    Math.min(...images.map(image => image.getBoundingClientRect().width)),
  ].join(" ");
}};
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1000], ids=["phone", "desk"])
def test_the_page_fits_its_width_in_chromium(width: int, report: Path, tmp_path: Path) -> None:
    """Nothing but a table's own box scrolls sideways, and all images are drawn."""
    shutil.copy(report / "report.html", tmp_path)
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><body>{MEASURE.format(width=width)}")
    dom = browse(
        tmp_path, "--allow-file-access-from-files", "--dump-dom", "--virtual-time-budget=8000",
        f"--window-size={width + 40},1200", (tmp_path / "frame.html").as_uri(),
    )  # fmt: skip
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None, dom[-2000:]
    scroll_width, right, images, drawn, narrowest = map(float, found[1].split())
    assert scroll_width <= width
    assert right <= width
    assert (images, drawn) == (len(FIGURES), len(FIGURES))
    assert narrowest > 0.8 * min(width, 600)


@pytest.mark.slow
def test_a_screenshot_shows_the_page(report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(tmp_path, f"--screenshot={shot}", "--window-size=900,6000", (report / "report.html").as_uri())
    pixels = np.asarray(image_module.open(io.BytesIO(shot.read_bytes())).convert("RGB"), dtype=int)
    for color in ("#0072B2", "#009E73"):  # base and reasoning models
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=2) < 12).sum() > 500, color
    assert 0.5 < (pixels.min(axis=2) > 250).mean() < 0.99  # a white page that something is drawn on


# The command


def test_the_command_prints_pairs_and_where_the_page_is(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, runs[:2]), "--out", str(tmp_path / "report")]) == 0
    out, err = capsys.readouterr()
    header, line, last = out.splitlines()
    assert header.split()[:3] == ["pair", "kind", "d"]
    assert line.startswith("Qwen3-4B − Qwen3-4B-Base  reasoning  +0.")
    assert last == f"report: {tmp_path / 'report' / 'report.html'}"
    assert [text for text in err.splitlines() if str(runs[0]) in text]


def test_a_report_is_never_overwritten(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["compare", *map(str, runs[:2]), "--out", str(tmp_path)]) == 1
    assert "expected a new or empty folder to write the report to, it holds mine.txt" in capsys.readouterr().err


def test_a_refusal_is_one_line_and_leaves_no_page(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(runs[0]), "--out", str(tmp_path / "report"), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("psykern: error: ") and "Qwen3-4B-Base has no partner" in err
    assert not (tmp_path / "report" / "report.html").exists()
    assert main(["compare", str(runs[0]), "--out", str(tmp_path / "report"), "--unpaired", "--quiet"]) == 0


def test_runs_whose_labels_look_alike_have_each_their_participants(tmp_path: Path) -> None:
    """The chat run of a model, and a model that is called so."""
    given = {"m": "plain", "m chat": "chat", "m-chat": "plain"}
    runs = [
        write_run(tmp_path / name, f"o/{name.split()[0]}", rows(HUMANS, shift=i), condition=condition)
        for i, (name, condition) in enumerate(given.items())
    ]
    psykern.compare_runs(runs, tmp_path / "report", unpaired=True)
    found = [path.read_text() for path in (tmp_path / "report" / "tables").glob("participants-*.csv")]
    assert len(set(found)) == 3


def test_without_matplotlib_the_error_says_what_to_install(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", *map(str, runs[:2]), "--out", str(tmp_path / "report")]) == 1
    assert "a report needs matplotlib" in (err := capsys.readouterr().err) and "psykern[report]" in err
    assert not (tmp_path / "report").exists()


def test_importing_psykern_does_not_import_matplotlib() -> None:
    code = "import sys, psykern; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_in_words() -> None:
    from psykern.study.page import _estimate, _p
    from psykern.study.results import Interval
    from psykern.study.tables import number, share

    assert number(-0.12345) == "−0.123" and number(0.5, sign=True) == "+0.500" and number(math.nan) == "–"
    assert _estimate(Interval(1.0, math.nan, math.nan), 1) == "1.0"
    assert "[0.9, 1.1]" in _estimate(Interval(1.0, 0.9, 1.1), 1)
    assert (_p(0.04), _p(1e-5), _p(math.nan), share(0.255)) == ("0.040", "1.0e-05", "–", "26%")
