"""The command line: what it prints, its exit status, and what is left on the disk when the input is bad."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import CONFIGS, make_model
from support.toy import CONTEXT, Row, Toy, fitting, make_toy, make_toy_data, responses, write_rows

import psykern
from psykern import Settings, demo, kernels
from psykern.cli import main
from psykern.core.settings import MIN_SHARE
from psykern.engine import engine
from psykern.engine.engine import Engine
from psykern.study import finished as runs

ROOT = Path(__file__).resolve().parents[1]
pipeline = importlib.import_module("psykern.runs.run")  # the package's attribute of that name is the function


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy_data(tmp_path_factory.mktemp("toy"), count=3)


@pytest.fixture
def broken_model(toy: Toy, tmp_path: Path) -> Path:
    """A copy of the toy model's folder to damage."""
    return shutil.copytree(toy.model, tmp_path / "broken-model")


def psykern_command(*arguments: object) -> int:
    """The exit status, also where argparse leaves."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code


def score(model: object, data: object | Sequence[object], out: object, *options: object) -> int:
    data = data if isinstance(data, list) else [data]
    return psykern_command("score", model, *data, "--out", out, "--device", "cpu", *options)


def assert_error(capsys: pytest.CaptureFixture[str], status: int, *parts: object) -> None:
    """One line on standard error that holds the parts, status 1, nothing on standard output."""
    assert status == 1
    out, err = capsys.readouterr()
    assert out == ""
    message = err[err.index("psykern: error: ") :]  # a progress bar may stand before it
    assert message.count("\n") == 1, message
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in message


def rejects(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "rejects.jsonl").read_text().splitlines()]


def manifest(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return loaded


# What is printed


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
        *("study", "transcripts", "responses", "tokens", "to compute", "scored rows", "branches"),
        *("body TFLOP", "attention", "head", "wave MiB"),
    ]
    estimate = psykern.estimate(toy.model, toy.data, Settings(device="cpu", wave_tokens=64))
    for line, study in zip(lines, estimate.studies, strict=False):
        cells = line.split()
        counts = (study.transcripts, study.responses, study.tokens, study.computed_tokens)
        assert cells[:7] == [study.study, *map(str, (*counts, study.scored_rows, study.branches))]
        assert cells[7:10] == [f"{n / 1e12:.2f}" for n in (study.flops_body, study.flops_attention, study.flops_head)]
        assert cells[10] == f"{study.wave_bytes / 2**20:.0f}"
    sums = lines[-1].split()
    assert sums[0] == "all"
    assert int(sums[4]) == sum(study.computed_tokens for study in estimate.studies)
    assert len(lines) == len(estimate.studies) + 1


def test_plan_equals_what_score_computes(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert psykern_command("plan", toy.model, toy.data, "--device", "cpu") == 0
    sums = [int(cell.replace(",", "")) for cell in capsys.readouterr().out.splitlines()[-1].split()[1:5]]
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


SCORE_OPTIONS = {
    "--protocol": ["exact", "study"],
    "--options": ["none", "given", "observed"],
    "--max-options": [],
    "--boundary": ["joint", "split"],
    "--over-length": ["error", "skip", "truncate"],
    "--backend": ["auto", "reference"],
    "--dtype": ["auto", "float32", "bfloat16"],
    "--device": ["auto", "cpu", "cuda"],
    "--wave-tokens": [],
    "--batch-tokens": [],
    "--limit": [],
    "--studies": [],
    "--strict": [],
    "--quiet": [],
}
LITERALS = ("protocol", "boundary", "options", "over_length", "backend", "dtype", "device")


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
    assert all(re.search(rf"^ +{command} +\w", out, re.MULTILINE) for command in ("score", "plan", "compare", "demo"))
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
    assert got["studies"] == ["words", "bandit"]
    assert got["counts"]["transcripts"] == 4


def test_the_exit_status_of_the_installed_command(toy: Toy, tmp_path: Path) -> None:
    """As the entry point of pyproject.toml calls it, in a process of its own."""
    assert 'psykern = "psykern.cli:main"' in (ROOT / "pyproject.toml").read_text()
    data = write_rows(tmp_path / "rows.jsonl", [toy.rows[0], {"text": 5}])
    command = [sys.executable, "-c", "import sys; from psykern.cli import main; sys.exit(main())"]
    arguments = ["plan", str(toy.model), str(data), "--device", "cpu", "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "bandit" in done.stdout
    assert "rows.jsonl:2: text: expected a string, got a number" in done.stderr


# Bad models


def test_a_missing_model_is_named_and_the_folder_can_be_used_again(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no" / "such" / "model"
    assert_error(capsys, score(missing, toy.data, tmp_path / "run"), missing, "no such model folder")
    assert score(toy.model, toy.data, tmp_path / "run") == 0


def test_a_hub_model_that_cannot_be_had(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert_error(
        capsys, score("owner/name", toy.data, tmp_path / "run"), "owner/name", "no route to host", "download it"
    )
    assert_error(
        capsys, score(toy.model, "owner/data", tmp_path / "run"), "owner/data", "no route to host", "download it"
    )


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def too_small_embedding(folder: Path) -> None:
    make_model(folder, **(CONFIGS["qwen3"] | {"vocab_size": 300}))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no-config": (remove("config.json"), ["config.json: no such file"]),
    "config-not-json": (put("config.json", "{"), ["config.json: cannot be read as JSON"]),
    "unknown-family": (
        put("config.json", '{"model_type": "gpt2"}'),
        ["model_type: expected one of llama", "got 'gpt2'"],
    ),
    "no-weights": (remove("model.safetensors"), ["no weights: looked for model.safetensors"]),
    "truncated-weights": (truncate, ["model.safetensors: damaged"]),
    "missing-tensor": (drop_tensor, ["missing tensors: model.layers.1.mlp.up_proj.weight"]),
    "pickled-weights": (pickle_weights, ["pickled weights are refused", "pytorch_model.bin"]),
    "no-tokenizer": (remove("tokenizer.json"), ["no tokenizer.json"]),
    "tokenizer-not-json": (put("tokenizer.json", "[1,"), ["tokenizer.json: cannot be read as a tokenizer"]),
    "tokenizer-of-another-model": (too_small_embedding, ["the tokenizer has", "the embedding 300 rows"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_named(
    name: str, toy: Toy, broken_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, parts = DAMAGE[name]
    damage(broken_model)
    status = score(broken_model, toy.data, tmp_path / "run", "--quiet")
    assert_error(capsys, status, broken_model, *parts)
    assert not list((tmp_path / "run").glob("**/*.parquet"))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("layer", [0, 2])
def test_weights_that_are_not_finite_stop_the_run_and_name_the_layer(
    value: str, layer: int, toy: Toy, broken_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(broken_model / "model.safetensors")
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    tensors[name][3, 5] = float(value)
    save_file(tensors, broken_model / "model.safetensors")
    assert_error(capsys, score(broken_model, toy.data, tmp_path / "run"), f"began in layer {layer} ", name)
    assert not list((tmp_path / "run").glob("**/*.parquet"))


# Bad data


def not_gzip(path: Path) -> Path:
    path = path / "rows.jsonl.gz"
    path.write_text("not packed\n")
    return path


def lfs_pointer(path: Path) -> Path:
    path = path / "rows.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    return path


def empty_folder(path: Path) -> Path:
    (path / "folder").mkdir()
    return path / "folder"


def other_kind(path: Path) -> Path:
    (path / "rows.csv").write_text("text\n<<a>>\n")
    return path / "rows.csv"


def not_allowed(path: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    write_rows(path / "rows.jsonl", [{"text": "<<a>>"}]).chmod(0)
    return path / "rows.jsonl"


NO_DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path / "rows.jsonl", "no such file or folder"),
    "lfs-pointer": (lfs_pointer, "Git LFS pointer"),
    "empty-folder": (empty_folder, "expected files that end in .jsonl.gz"),
    "other-kind": (other_kind, "expected a name that ends in .jsonl.gz"),
    "not-allowed": (not_allowed, "Permission denied"),
}


@pytest.mark.parametrize("name", NO_DATA)
def test_data_that_cannot_be_read_at_all_is_named(
    name: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = NO_DATA[name]
    path = make(tmp_path)
    assert_error(capsys, score(toy.model, [toy.data, path], tmp_path / "run"), path, reason)


BAD_LINES = {
    b'{"text": "<<a>>"': "not JSON",
    b"[1]": "row: expected an object, got a list",
    b'{"participant": 1}': "text: missing",
    b'{"text": 7}': "text: expected a string, got a number",
    b'{"text": "a \xff <<b>>"}': "not UTF-8: byte 0xff",
    b'{"text": "<<a <<b>> c>>"}': "text: '<<' at character 4 inside the response",
    b'{"text": "a <<b"}': "text: '<<' at character 2 is never closed",
    b'{"text": "a>> <<b>>"}': "text: '>>' at character 1 without '<<'",
    b'{"text": "a <<b>>", "options": "J"}': "options: expected a list, got a string",
    b'{"text": "a <<b>>", "options": ["b", ""]}': "options: option 2 is empty",
    b'{"text": "a <<b>>", "options": [["b"], ["c"]]}': "options: expected one list for each of 1 responses",
}


def test_bad_rows_are_rejected_and_the_others_scored(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps(row).encode() for row in toy.rows]
    lines = [*good[:4], *BAD_LINES, *good[4:]]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    assert score(toy.model, tmp_path / "rows.jsonl", tmp_path / "run", "--quiet") == 3
    assert capsys.readouterr().err == f"psykern: 11 rows were rejected: {tmp_path / 'run' / 'rejects.jsonl'}\n"
    found = rejects(tmp_path / "run")
    assert [(r["file"], r["line"]) for r in found] == [(str(tmp_path / "rows.jsonl"), n) for n in range(5, 16)]
    for reject, reason in zip(found, BAD_LINES.values(), strict=True):
        assert reject["reason"].startswith(reason)
    assert manifest(tmp_path / "run")["counts"]["rejects"] == 11
    assert score(toy.model, toy.data, tmp_path / "good") == 0
    assert psykern.read_run(tmp_path / "run").equals(psykern.read_run(tmp_path / "good"))


def test_a_truncated_archive_gives_the_rows_before_its_end(toy: Toy, tmp_path: Path) -> None:
    rows = [toy.rows[0] | {"participant": i, "note": np.random.default_rng(i).bytes(50_000).hex()} for i in range(5)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert score(toy.model, tmp_path / "rows.jsonl.gz", tmp_path / "run") == 3
    (reject,) = rejects(tmp_path / "run")
    assert "file is damaged or truncated after line" in reject["reason"]
    participants = set(psykern.read_run(tmp_path / "run").column("participant").to_pylist())
    assert participants == {str(i) for i in range(reject["line"] - 1)} != set()


def test_what_is_no_archive_is_rejected(toy: Toy, tmp_path: Path) -> None:
    assert score(toy.model, [not_gzip(tmp_path), toy.data], tmp_path / "run") == 3
    assert [reject["file"] for reject in rejects(tmp_path / "run")] == [str(tmp_path / "rows.jsonl.gz")]
    assert manifest(tmp_path / "run")["counts"]["transcripts"] == len(toy.rows)


@pytest.mark.parametrize("protocol", ["exact", "study"])
def test_an_option_that_encodes_to_nothing_rejects_its_row(
    protocol: str, toy: Toy, broken_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """exact: a tokenizer whose normalizer drops the option; study: its rules drop white space before `>>`."""
    tokenizer = json.loads((broken_model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    (broken_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    blank = {"exact": "\u200b", "study": "  "}[protocol]
    bad = toy.rows[1] | {"text": "You press <<J>>\nYou press <<F>>\n", "options": ["J", blank]}
    data = write_rows(tmp_path / "rows.jsonl", [toy.rows[0], bad, *toy.rows[2:]])
    assert score(broken_model, data, tmp_path / "run", "--protocol", protocol) == 3
    (reject,) = rejects(tmp_path / "run")
    assert (reject["file"], reject["line"]) == (str(data), 2)
    assert reject["reason"] == f'option 2 ("{blank}") of response 1 encodes to no token'
    assert manifest(tmp_path / "run")["counts"]["transcripts"] == len(toy.rows) - 1
    capsys.readouterr()
    status = score(broken_model, data, tmp_path / "strict", "--protocol", protocol, "--strict")
    assert_error(capsys, status, f"{data}:2: option 2", "encodes to no token")


def test_strict_stops_at_the_first_bad_row(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [toy.rows[0], {"text": "<<a"}, {"text": "b>>"}])
    status = score(toy.model, data, tmp_path / "run", "--strict")
    assert_error(capsys, status, f"{data}:2: text: '<<' at character 0 is never closed")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_rows_that_are_odd_but_not_wrong(toy: Toy, tmp_path: Path) -> None:
    """Bare NaN, numbers as strings, repeated participants, no response, an empty and a blank one."""
    lines = [
        '{"text": "x <<a>>", "RTs": [NaN], "age": NaN, "participant": "7", "options": NaN}',
        '{"text": "x <<a>>", "participant": 7.0}',
        '{"text": "nothing was said"}',
        '{"text": ""}',
        '{"text": "x <<>> y << >>"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert score(toy.model, tmp_path / "rows.jsonl", tmp_path / "run") == 0
    records = psykern.read_run(tmp_path / "run").to_pylist()
    assert [(r["participant"], r["response"]) for r in records] == [("7", "a"), ("7", "a"), ("5", ""), ("5", " ")]
    assert [r["logprob"] is None for r in records] == [False, False, True, False]
    assert records[0]["logprob"] == records[1]["logprob"]
    assert records[2]["flag"] == "empty"
    assert manifest(tmp_path / "run")["counts"]["transcripts"] == 5


@pytest.mark.parametrize(
    ("content", "status"),
    [("", 0), ('{"text": "no response here"}\n', 0), ('{"text": 1}\n', 3)],
    ids=["empty", "none", "bad"],
)
def test_data_without_any_response_gives_an_empty_run(
    content: str, status: int, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    assert score(toy.model, tmp_path / "rows.jsonl", tmp_path / "run") == status
    assert "0 responses of" in capsys.readouterr().out
    assert len(psykern.read_run(tmp_path / "run")) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["mean_nll"] is None
    assert manifest(tmp_path / "run")["counts"]["responses"] == 0
    assert psykern_command("plan", toy.model, tmp_path / "rows.jsonl", "--device", "cpu") == status


def test_a_study_that_is_not_in_the_data_is_named(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = score(toy.model, toy.data, tmp_path / "run", "--studies", "words", "wrods")
    assert_error(capsys, status, "studies: no transcript of wrods in the data")
    status = psykern_command("plan", toy.model, toy.data, "--device", "cpu", "--studies", "wrods")
    assert_error(capsys, status, "studies: no transcript of wrods in the data")


@pytest.fixture(scope="module")
def short_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short-context")
    make_toy(folder, max_position_embeddings=CONTEXT)
    return folder


def test_transcripts_longer_than_the_context(
    toy: Toy, short_context: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--options", "none", "--quiet"]
    long = [i for i, row in enumerate(toy.rows) if fitting(toy, row) < len(list(responses(row["text"])))]
    assert 0 < len(long) < len(toy.rows)
    status = score(short_context, toy.data, tmp_path / "error", *options)
    row = toy.rows[long[0]]
    where = f"{toy.data}:{long[0] + 1}: {row['study']}, participant {row['participant']}: needs"
    assert_error(capsys, status, where, f"the model has {CONTEXT}", '"skip"', '"truncate"')

    assert score(short_context, toy.data, tmp_path / "skip", *options, "--over-length", "skip") == 0
    line = f"longer than the model's context: {len(long)} transcripts skipped, 0 responses dropped"
    assert line in capsys.readouterr().out.splitlines()

    assert score(short_context, toy.data, tmp_path / "truncate", *options, "--over-length", "truncate") == 0
    dropped = sum(len(list(responses(toy.rows[i]["text"]))) - fitting(toy, toy.rows[i]) for i in long)
    line = f"longer than the model's context: 0 transcripts skipped, {dropped} responses dropped"
    assert line in capsys.readouterr().out.splitlines()


# Bad folders, machines and wishes


def test_a_run_is_never_overwritten(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert score(toy.model, toy.data, run, "--limit", 1) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert_error(capsys, score(toy.model, toy.data, run), run, "holds another run", "limit: 1 there, null here")
    refused = score(toy.model, toy.data, run, "--limit", 1, "--no-resume")
    assert_error(capsys, refused, run, "expected a new or empty folder", "it holds manifest.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused = score(toy.model, toy.data, tmp_path / "mine")
    assert_error(capsys, refused, tmp_path / "mine", "expected a new or empty folder", "it holds notes.txt")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/psykern-run")):
        assert_error(capsys, score(toy.model, toy.data, out), out)
    assert (tmp_path / "file").read_text() == "mine"
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert_error(capsys, score(toy.model, toy.data, tmp_path / "locked"), "cannot be written: Permission denied")


def test_too_little_memory_says_which_budget_to_lower(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "free_bytes", lambda device: 2**20)
    status = score(toy.model, toy.data, tmp_path / "run")
    assert_error(capsys, status, "MiB are free", "lower --wave-tokens", "--batch-tokens")


def test_an_allocation_that_fails_says_which_budget_to_lower(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("psykern.models.layer.Layer.__call__", fail)
    assert_error(capsys, score(toy.model, toy.data, tmp_path / "run"), "out of memory", "lower --wave-tokens")


@pytest.mark.parametrize("backend", [name for name in get_args(kernels.Backend) if name not in ("auto", "reference")])
def test_a_backend_that_is_missing_says_how_to_get_it(
    backend: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = score(toy.model, toy.data, tmp_path / "run", "--backend", backend)
    try:
        kernels.resolve(backend, torch.device("cpu"))
    except kernels.BackendError:
        assert_error(capsys, status, f"backend '{backend}' is not available on cpu", kernels._HOW_TO_GET[backend])
        assert not (tmp_path / "run").exists()
    else:
        assert status == 0
        assert manifest(tmp_path / "run")["backend"] == backend


@pytest.mark.parametrize("command", ["score", "plan"])
def test_cuda_without_a_gpu(
    command: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ["--out", tmp_path / "run"] if command == "score" else []
    status = psykern_command(command, toy.model, toy.data, *out, "--device", "cuda")
    assert_error(capsys, status, "device 'cuda' was asked for", "no CUDA device")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wave-tokens", "0"], "wave_tokens: expected at least 1, got 0"),
        (["--batch-tokens", "-5"], "batch_tokens: expected at least 1, got -5"),
        (["--min-share", "0"], "min_share: expected at least 1, got 0"),
        (["--max-options", "0"], "max_options: expected at least 1, got 0"),
        (["--limit", "0"], "limit: expected at least 1, got 0"),
        (["--limit", "ten"], "argument --limit: invalid int value: 'ten'"),
        (["--wave-tokens", "1e5"], "argument --wave-tokens: invalid int value: '1e5'"),
        (["--protocol", "chat"], "argument --protocol: invalid choice: 'chat'"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (
            ["--protocol", "study", "--boundary", "split"],
            "boundary: the study's protocol tokenizes a text as one string",
        ),
        (["--studies"], "argument --studies: expected at least one argument"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_2_and_touches_nothing(
    options: list[str], message: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(toy.model, toy.data, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["score"], ["score", "model"], ["score", "model", "data"], ["plan", "model"], ["x"]]
)
def test_too_few_arguments_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert psykern_command(*arguments) == 2
    assert "usage: psykern" in capsys.readouterr().err


STOPS = {
    "interrupted": (KeyboardInterrupt(), 130, "interrupted"),
    "not-finite": (psykern.NonFiniteError("scores are not finite"), 1, "scores are not finite"),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_was_written_before_a_stop_is_kept(
    name: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of the units is stopped: two parts stay, whole, and no manifest says that the run is complete."""
    error, expected, message = STOPS[name]
    arguments = ("--unit-tokens", 1, "--quiet")
    assert score(toy.model, toy.data, tmp_path / "whole", *arguments) == 0

    def pairs(*arguments: Any, **named: Any) -> Iterator[Any]:
        for done, pair in enumerate(original(*arguments, **named)):
            if done == 2:
                raise error
            yield pair

    original = Engine.pairs
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "pairs", pairs)
        capsys.readouterr()
        assert score(toy.model, toy.data, tmp_path / "run", *arguments) == expected
    assert message in capsys.readouterr().err
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "responses").iterdir()}
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run" / "responses").iterdir()}
    assert kept == {name: whole[name] for name in sorted(whole)[:2]}
    assert manifest(tmp_path / "run")["finished"] is None

    assert score(toy.model, toy.data, tmp_path / "run", *arguments) == 0  # goes on
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "responses").iterdir()} == whole
    assert manifest(tmp_path / "run")["counts"] == manifest(tmp_path / "whole")["counts"]


# Conditions


def test_several_conditions_are_runs_of_one_folder(
    toy: Toy, broken_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (broken_model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    (broken_model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert score(broken_model, toy.data, tmp_path / "run", "--condition", "plain,chat,persona", "--quiet") == 0
    printed = capsys.readouterr().out
    for name in ("plain", "chat", "persona"):
        assert f"{name}:\n" in printed and f"records: {tmp_path / 'run' / name}\n" in printed
        assert json.loads((tmp_path / "run" / name / "manifest.json").read_text())["condition"] == name
    assert f"nothing is known of the participants of {len(toy.rows)} transcripts: left out" in printed
    assert [run.condition for run in runs.open_runs(tmp_path / "run")] == ["chat", "persona", "plain"]


def test_chat_without_a_template_leaves_by_an_error(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = score(toy.model, toy.data, tmp_path / "run", "--condition", "plain,chat")
    assert_error(capsys, status, f"{toy.model}: condition chat needs a chat template", "the tokenizer has none")
    assert not list((tmp_path / "run").rglob("*.parquet"))


@pytest.mark.parametrize("value", ["talk", "plain,plain", "plain,", ""])
def test_a_condition_that_is_none(value: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(toy.model, toy.data, tmp_path / "run", "--condition", value) == 2
    assert f"--condition: expected different ones of plain, chat, persona, got {value!r}" in capsys.readouterr().err


def test_a_plan_is_of_one_condition(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    status = psykern_command("plan", toy.model, toy.data, "--condition", "plain,persona")
    assert_error(capsys, status, "condition: a plan is of one condition, got plain,persona")


@pytest.mark.parametrize(("given", "pattern"), [([], "[A-Z]"), (["[0-9]+"], "[0-9]+")], ids=["letters", "pattern"])
def test_discrete_keeps_matching_responses(given: list[str], pattern: str, toy: Toy, tmp_path: Path) -> None:
    assert score(toy.model, toy.data, tmp_path, "--quiet", "--discrete", *given) == 0
    kept = psykern.read_run(tmp_path).column("response").to_pylist()
    assert len(kept) == sum(bool(re.fullmatch(pattern, m[1])) for row in toy.rows for m in responses(row["text"])) > 0
    assert json.loads((tmp_path / "manifest.json").read_text())["discrete"] == pattern


def test_discrete_says_what_it_expects(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(toy.model, toy.data, tmp_path / "run", "--discrete", "[A-") == 2
    assert "discrete: expected a regular expression, got '[A-'" in capsys.readouterr().err
