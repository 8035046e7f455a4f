"""What the commands print, their help, and their exit status."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from support.command import manifest, psykern_command, score
from support.toy import Toy, write_rows

import psykern
from psykern import Settings, _cpu, demo
from psykern.core.settings import MIN_SHARE

ROOT = Path(__file__).resolve().parents[2]


def test_score_prints_a_line_per_study_and_their_mean(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(toy.model, toy.data, tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    counts = manifest(tmp_path / "run")["counts"]
    assert lines[0].split() == [
        "study",
        "transcripts",
        "responses",
        "NLL",
        "accuracy",
        "option",
        "NLL",
        "uniform",
        "NLL",
    ]
    for line, study in zip(lines[1:4], summary["studies"], strict=True):
        name, transcripts, num_responses, nll, accuracy, *_ = line.split()
        assert (name, int(transcripts), int(num_responses)) == (study["study"], 3, study["responses"])
        assert (nll, accuracy) == (f"{study['mean_nll']:.3f}", f"{study['accuracy']:.3f}")
    assert lines[4].split()[:6] == [
        *["mean", "over", "studies"],
        "9",
        str(counts["responses"]),
        f"{summary['mean_nll']:.3f}",
    ]
    assert lines[5].startswith(
        f"{counts['responses']} responses of 9 transcripts; {counts['tokens']} tokens, "
        f"{counts['computed_tokens']} computed after sharing; "
    )
    assert lines[5].endswith("tokens/s")
    assert lines[6:] == [f"records: {tmp_path / 'run'}"]


@pytest.mark.parametrize("unit_tokens", [1, 2**21], ids=["many-units", "few-units"])
def test_the_progress_bar_counts_responses_and_tokens(
    unit_tokens: int, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(toy.model, toy.data, tmp_path / "run", "--unit-tokens", unit_tokens) == 0
    counts = manifest(tmp_path / "run")["counts"]
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert f"{counts['responses']:,} responses, {counts['tokens']:,} tokens" in last
    assert "100%" in last
    assert "left]" in last


@pytest.mark.parametrize("command", ["score", "plan"])
def test_quiet_prints_no_bar(command: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "run"] if command == "score" else []
    assert psykern_command(command, toy.model, toy.data, *out, "--device", "cpu", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_plan_prints_what_the_estimate_holds(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert psykern_command("plan", toy.model, toy.data, "--device", "cpu", "--wave-tokens", 64) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in re.split(r"\s{2,}", header)] == [
        *("study", "transcripts", "responses", "tokens", "to compute", "one trie", "scored rows", "branches"),
        *("body TFLOP", "attention", "head", "wave MiB"),
    ]
    estimate = psykern.estimate(toy.model, toy.data, Settings(device="cpu", wave_tokens=64))
    for line, study in zip(lines, estimate.studies, strict=False):
        cells = line.split()
        counts = (study.transcripts, study.responses, study.tokens, study.computed_tokens, study.bound_tokens)
        assert cells[:8] == [study.study, *map(str, (*counts, study.scored_rows, study.branches))]
        assert cells[8:11] == [f"{n / 1e12:.2f}" for n in (study.flops_body, study.flops_attention, study.flops_head)]
        assert cells[11] == f"{study.wave_bytes / 2**20:.0f}"
    *_, sums, weights, gpu = lines
    assert sums.split()[0] == "all"
    assert int(sums.split()[4]) == sum(study.computed_tokens for study in estimate.studies)
    assert len(lines) == len(estimate.studies) + 3
    assert weights.startswith("weights: ") and gpu.startswith(
        "one H100 80GB, bfloat16: the weights stay in its memory;"
    )


def test_plan_equals_what_score_computes(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert psykern_command("plan", toy.model, toy.data, "--device", "cpu") == 0
    sums = [int(cell.replace(",", "")) for cell in capsys.readouterr().out.splitlines()[-3].split()[1:5]]
    assert score(toy.model, toy.data, tmp_path / "run") == 0
    counts = manifest(tmp_path / "run")["counts"]
    assert sums == [counts[name] for name in ("transcripts", "responses", "tokens", "computed_tokens")]


def test_plan_needs_no_weights(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(toy.model / name, tmp_path / name)
    assert psykern_command("plan", tmp_path, toy.data, "--device", "cpu") == 0
    without = capsys.readouterr().out
    assert psykern_command("plan", toy.model, toy.data, "--device", "cpu") == 0
    assert capsys.readouterr().out == without


def test_plan_names_rejected_rows(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [toy.rows[0], {"text": "<<a"}])
    assert psykern_command("plan", toy.model, data, "--device", "cpu", "--quiet") == 3
    out, err = capsys.readouterr()
    assert "bandit" in out
    assert re.fullmatch(rf"psykern: rejected: {re.escape(str(data))}:2: text: '<<' at character 0 .*\n", err)


def test_the_demo_scores_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (demo.MODEL / "config.json").is_file() or not demo.SAMPLE.is_dir():
        pytest.skip(f"the demo's assets are not there: {demo.MODEL}, {demo.SAMPLE}")
    assert psykern_command("demo", "--out", tmp_path / "demo", "--quiet") == 0
    out = capsys.readouterr().out
    assert "The tiny models are a demonstration" in out
    for run in (tmp_path / "demo" / "model", tmp_path / "demo" / "posttrained"):
        summary = json.loads((run / "summary.json").read_text())
        assert len(summary["studies"]) >= 2
        assert all(study["study"] in out for study in summary["studies"] if len(study["study"]) <= 30)
        closed = [study for study in summary["studies"] if study["option_responses"]]
        assert closed
        if run.name == "model":
            for study in closed:
                assert study["mean_option_nll"] < study["uniform_option_nll"], study["study"]
        assert manifest(run)["seconds"]["total"] < 30
    page = tmp_path / "demo" / "report" / "report.html"
    assert f"report: {page}" in out.splitlines()
    assert "tiny-posttrained against tiny-base" in page.read_text()
    (pair,) = csv.DictReader((tmp_path / "demo" / "report" / "tables" / "pairs.csv").open())
    assert float(pair["difference"]) > 0  # the imitation of post-training fits people worse
    assert float(pair["entropy_difference"]) < 0  # and is surer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_bf16", [True, False], ids=["bf16", "no-bf16"])
def test_what_a_dtype_costs_is_said_in_one_line_at_the_start(
    has_bf16: bool,
    dtype: str,
    toy: Toy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_cpu, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(_cpu, "multiplies_bf16", lambda: has_bf16)
    for _ in range(2):  # every process says it
        assert score(toy.model, toy.data, tmp_path / "run", "--dtype", dtype, "--quiet") == 0
        said = (
            "psykern: dtype bfloat16: this processor has no fast products of bf16 (instruction set avx512), so numbers "
            "are widened to fp32: no faster than float32 and less exact, with keys and values in half the memory\n"
        )
        assert capsys.readouterr().err == (said if dtype == "bfloat16" and not has_bf16 else "")
    products = {"float32": "fp32 products", "bfloat16": "bf16 products" if has_bf16 else "fp32 products of bf16"}
    assert manifest(tmp_path / "run")["arithmetic"] == f"{products[dtype]} (avx512), fp32 sums"


SCORE_OPTIONS = {
    "--protocol": ["exact", "study"],
    "--options": ["none", "given", "observed"],
    "--max-options": [],
    "--boundary": ["joint", "split"],
    "--over-length": ["error", "skip", "truncate"],
    "--backend": ["auto", "reference"],
    "--dtype": ["auto", "float32", "bfloat16", "float16"],
    "--device": [],
    "--marks": ["keep", "drop"],
    "--wave-tokens": [],
    "--batch-tokens": [],
    "--limit": [],
    "--studies": [],
    "--strict": [],
    "--quiet": [],
}
LITERALS = (
    *("protocol", "boundary", "options", "over_length", "same_participants", "implementation", "backend", "dtype"),
    "marks",
)


def option_choices(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Every option that --help lists, with its choices."""
    assert psykern_command(command, "--help") == 0
    listed = capsys.readouterr().out.split("options:\n")[-1]  # behind the usage
    found = re.findall(r"^  (?:-\w, )?(--[a-z-]+)(?: \{([^}]*)\})?", listed, re.MULTILINE)
    return {name: choices.split(",") if choices else [] for name, choices in found}


@pytest.mark.parametrize("command", ["score", "plan"])
def test_help_lists_every_option_and_choice(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    listed = option_choices(command, capsys)
    for name, choices in SCORE_OPTIONS.items():
        assert set(choices) <= set(listed[name]), name
    kinds = get_type_hints(Settings)
    for name in LITERALS:
        assert listed[f"--{name.replace('_', '-')}"] == list(get_args(kinds[name]))
    assert ("--out" in listed) == (command == "score")


def test_help_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    psykern_command("score", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for value in ("exact", "joint", "given", 26, "error", MIN_SHARE):
        assert f"(default: {value})" in text


def test_help_of_demo_and_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(option_choices("demo", capsys)) == {"--help", "--out", "--quiet"}
    assert psykern_command("--help") == 0
    out = capsys.readouterr().out
    assert all(
        re.search(rf"^ +{command} +\w", out, re.MULTILINE) for command in ("score", "plan", "compare", "demo", "models")
    )
    assert psykern_command("--version") == 0
    assert capsys.readouterr().out == f"psykern {psykern.__version__}\n"


def test_options_reach_the_run(toy: Toy, tmp_path: Path) -> None:
    options = ["--protocol", "study", "--options", "observed-experiment", "--max-options", 5, "--over-length", "skip"]
    options += ["--backend", "reference", "--dtype", "float32", "--wave-tokens", 77, "--batch-tokens", 33, "--limit", 2]
    assert score(toy.model, toy.data, tmp_path / "run", *options, "--studies", "words", "bandit") == 0
    got = manifest(tmp_path / "run")
    assert (got["protocol"], got["boundary"], got["options"], got["max_options"]) == (
        "study",
        "joint",
        "observed-experiment",
        5,
    )
    assert (got["over_length"], got["backend"], got["dtype"]) == ("skip", "reference", "float32")
    assert (got["wave_tokens"], got["batch_tokens"], got["limit"]) == (77, 33, 2)
    assert got["studies"] == ["bandit", "words"]  # the order that they are named in says nothing
    assert got["counts"]["transcripts"] == 4


def test_the_exit_status_of_the_installed_command(toy: Toy, tmp_path: Path) -> None:
    """As the entry point of pyproject.toml calls it, in a process of its own."""
    assert 'psykern = "psykern.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    data = write_rows(tmp_path / "rows.jsonl", [toy.rows[0], {"text": 5}])
    command = [sys.executable, "-c", "import sys; from psykern.__main__ import main; sys.exit(main())"]
    arguments = ["plan", str(toy.model), str(data), "--device", "cpu", "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "bandit" in done.stdout
    assert "rows.jsonl:2: text: expected a string, got a number" in done.stderr
