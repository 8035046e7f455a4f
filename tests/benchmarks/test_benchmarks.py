"""The benchmarks: each runs with tiny shapes on the CPU, wrong results are refused, the summary counts right."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench_elementwise
import bench_experts
import bench_gpu_rates
import bench_linear
import bench_option_logprobs
import bench_prefix_attention
import bench_run
import bench_scale
import bench_score
import bench_streaming
import comparison
import exactness
import gpu_smoke
import gpu_summary
import harness
import numpy as np
import pytest
import rates
import torch
from providers import Scored
from support.checkpoints import CONFIGS, make_model
from support.exactness import TOLERANCE
from torch import Tensor

from psykern import demo
from psykern.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]

QUICK = ["--quick", "--repeats", "1"]


def providers(folder: Path, name: str) -> set[str]:
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert json.loads((folder / f"{name}.json").read_text())["machine"]["device"] == rows[0]["device"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    return {row["provider"] for row in rows}


def test_kernels_with_tiny_shapes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    common = [*QUICK, "--folder", str(tmp_path), "--name"]
    bench_option_logprobs.main([*common, "o"])
    assert providers(tmp_path, "o") == {"psykern", "psykern:reference", "torch", "torch_compiled", "gemm"}
    bench_prefix_attention.main([*common, "p", "--cases", "shared", "branches"])
    shared = {"psykern", "psykern:reference", "flex_attention", "psykern_apart", "sdpa_apart", "sdpa_batch"}
    assert providers(tmp_path, "p") == shared | {"sdpa_sequences"}
    bench_elementwise.main([*common, "e"])
    assert providers(tmp_path, "e") == {"psykern", "torch", "copy"}


def test_the_head_beside_the_peak_with_a_tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SQUARE", 64)
    rows = {str(row["provider"]): row for row in bench_option_logprobs.bench(9, 64, repeats=1, vocab_size=1000)}
    assert set(rows) == {"psykern", "psykern_bf16", "psykern_bf16_both", "log_softmax"}
    assert all(float(str(row["share_of_peak"])) > 0 for row in rows.values())


def test_products_with_a_tiny_shape(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench_linear.main([*QUICK, "--folder", str(tmp_path), "--name", "l"])
    assert providers(tmp_path, "l") >= {"psykern", "mm", "openblas"}


def test_experts_with_a_tiny_shape(tmp_path: Path) -> None:
    bench_experts.main([*QUICK, "--folder", str(tmp_path), "--name", "m"])
    assert providers(tmp_path, "m") >= {"psykern", "psykern_loop", "psykern_whole", "reference"}
    even = bench_experts.routes_of(64, bench_experts.QWEN3_30B_A3B, "even")
    assert set(even.offsets.diff().tolist()) == {4}  # 64 rows to 8 of 128 experts each


def test_layers_are_those_of_the_models() -> None:
    """From Qwen2.5-0.5B's config.json, by hand."""
    expected = {"qkv": (896, [896, 128, 128]), "o": (896, [896]), "gate_up": (896, [4864, 4864]), "down": (4864, [896])}
    assert bench_linear.layers_of("Qwen2.5-0.5B") == expected
    assert bench_linear.layers_of("Qwen3-0.6B")["o"] == (2048, [1024])


def test_rates_are_shares_of_the_peak_of_best_runs() -> None:
    """By hand: 4e9 operations in 2 s at best are 2 GFLOP/s, 1e9 in 1 s half of that."""
    works = {
        "peak 0": rates.Work(lambda: None, 4e9),
        "peak 1": rates.Work(lambda: None, 4e9),
        "mm": rates.Work(lambda: None, 1e9),
    }
    timings = {
        "peak 0": harness.Timing.of([3, 2, 5]),
        "peak 1": harness.Timing.of([9]),
        "mm": harness.Timing.of([4, 1]),
    }
    found = rates.Rates.of(works, timings)
    assert found.columns() == {"peak_gflops": 2.0, "mm_of_peak": 0.5, "onednn_of_peak": "", "openblas_of_peak": ""}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rates_of_this_machine(dtype: torch.dtype) -> None:
    found = rates.measure(dtype, side=64, repeats=1)
    assert found.peak > 0 and found.libraries["mm"] > 0
    assert ("openblas" in found.libraries) == (dtype == torch.float32)


def test_a_process_that_holds_libraries_back_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(os, "execv", lambda *command: begun.append((command, "OPENBLAS_CORETYPE" in os.environ)))
    for name in rates.HOLDING_BACK:
        monkeypatch.delenv(name, raising=False)
    for name, value in rates.SLEEPING.items():
        monkeypatch.setenv(name, value)
    rates.begin_unheld()
    assert begun == []
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    rates.begin_unheld()
    assert begun.pop() == ((sys.executable, [sys.executable, *sys.argv]), False)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    rates.begin_unheld()
    assert begun == [((sys.executable, [sys.executable, *sys.argv]), False)]


def test_exactness_is_measured_and_a_wrong_result_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path, **CONFIGS["qwen3"])
    tokens = np.random.default_rng(0).integers(320, size=400)
    rows = {str(row["provider"]): row for row in exactness.measured("m", tmp_path, model, [tokens])}
    assert set(rows) == {"psykern:cpu", "psykern:reference", "transformers"}
    assert all(1e-8 < float(str(row["token_worst"])) < TOLERANCE and row["tokens"] == 399 for row in rows.values())
    with pytest.raises(SystemExit, match=r"m: psykern is 2\.0e-02 nats from fp64: refused"):
        exactness.row("m", "psykern", np.full(400, 0.02), None)


def test_what_bf16_costs_beside_transformers(tmp_path: Path) -> None:
    shutil.copy(demo.MODEL / "tokenizer.json", tmp_path)
    make_model(tmp_path, vocab_size=Tokenizer.load(tmp_path).size, **CONFIGS["qwen3"])
    study = min(demo.SAMPLE.glob("*.jsonl.gz"), key=lambda file: file.stat().st_size)
    own, other = exactness.rounded_cases(tmp_path, [study])
    assert (own["provider"], other["provider"]) == ("psykern", "transformers")
    assert own["tokens"] == other["tokens"] and int(str(own["tokens"])) > 100
    rounding = [float(str(row["rms"])) for row in (own, other)]
    assert min(rounding) > 1e-4  # of numbers with 8 bits
    assert rounding[0] < 1.5 * rounding[1] < 1.0


@pytest.mark.slow
def test_a_whole_command_with_a_tiny_shape(tmp_path: Path) -> None:
    bench_run.main(["--quick", "--limit", "1", "--folder", str(tmp_path), "--name", "r"])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["what"] for row in rows][1:] == ["the first run", "the second run", "two studies beside fp32"]
    assert all(row["same_bytes"] for row in rows[1:3]) and all(row["responses"] > 0 for row in rows)


@pytest.mark.slow
def test_alternatives_to_the_tables_with_tiny_shapes(tmp_path: Path) -> None:
    """Under Triton's interpreter, which a process must choose before it imports the kernels."""
    pytest.importorskip("triton")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "benchmarks")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    quickly = "from support.quick_interpreter import look_up_builtins_once as quick; quick(); import tune; tune.main()"
    command = [sys.executable, "-c", quickly, *QUICK, "--folder", str(tmp_path), "--name", "t"]
    op = "option_logprobs"  # attention's take half a minute more, those of experts a third
    subprocess.run([*command, "--ops", op], env=environment, capture_output=True, check=True, timeout=300)
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert {row["op"] for row in rows} == {op}
    for case in {row["case"] for row in rows}:
        alternatives = [row["alternative"] for row in rows if row["case"] == case]
        assert {"table", "loads"} < set(alternatives) and len(alternatives) == len(set(alternatives)) > 6


def test_end_to_end_with_a_tiny_shape_and_the_packages_own_sample(tmp_path: Path) -> None:
    options = ["--shape", "Qwen3-0.6B", "--data", str(tmp_path), "--folder", str(tmp_path), "--name", "s"]
    names = ["study", "psykern", "careful", "psykern:streamed"]
    bench_score.main([*QUICK, *options, "--studies", "guenther2024substitutions", "--providers", *names])
    assert providers(tmp_path, "s") == set(names)


def test_streaming_with_a_tiny_shape(tmp_path: Path) -> None:
    options = ["--small", "--model", str(tmp_path / "model"), "--tokens", "500", "--folder", str(tmp_path)]
    bench_streaming.main([*options, "--dtypes", "float32", "--name", "t"])
    (row,) = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert min(row[name] for name in ("share", "layer_seconds", "anonymous_mb", "disk_gb_s", "limit_gb")) > 0


def test_the_idle_share_counts_what_no_kernel_covers() -> None:
    """Kernels of 0 to 4, 1 to 2 and 3 to 5 leave no gap; that of 7 to 10, launched first, leaves 2 of 10 before it."""
    spans = np.array([[7, 10], [0, 4], [1, 2], [3, 5]], np.float64)
    assert harness.idle_share(spans) == pytest.approx(0.2)
    assert harness.idle_share(spans[1:]) == 0.0


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_option_logprobs.scored

    def wrong(*arguments: object) -> Tensor:
        return right(*arguments) + 0.01

    monkeypatch.setattr(bench_option_logprobs, "scored", wrong)
    with pytest.raises(AssertionError, match="not close"):
        bench_option_logprobs.main(QUICK)


def test_scores_far_from_the_first_providers_or_of_other_bytes_get_no_row() -> None:
    """By hand: 3 and 4 nats off of two scores are an RMS of sqrt(12.5), 3.54."""
    right, near, far = (Scored(np.array(x, np.float32)) for x in ([-1, -2], [-1.5, -2], [-4, -6]))
    compared = comparison.Comparison("a study")
    check = partial(compared.check, distance=comparison.Distance(comparison.rms_of, 1.0, "{:.2f} RMS"))
    given = {"one": right, "two": near, "three": far}
    runs = {name: lambda scored=scored: scored for name, scored in given.items()}
    timed = [
        bench_score.Provider(name, run, torch.float32, 2, lambda scored, name=name: check(name, scored=scored))
        for name, run in runs.items()
    ]
    found = bench_score.bench(timed, harness.CPU, square=64)
    assert [next(found).difference for _ in range(2)] == [0.0, pytest.approx(0.125**0.5)]
    with pytest.raises(SystemExit, match=r"^a study: three differs from one by 3\.54 RMS: refused$"):
        next(found)
    assert check("one", scored=right, before=right.logprob.copy()) == 0.0
    with pytest.raises(SystemExit, match="a study: two: two runs give different bytes: refused"):
        check("two", scored=near, before=near.logprob + 1e-6)


def test_a_provider_of_others_that_fails_loses_only_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise RuntimeError("no kernel image")

    kept = harness.keep_working({"psykern": lambda: 1, "flash": fails}, lambda name, result: None)
    assert list(kept) == ["psykern"]
    assert "not measured: flash: RuntimeError: ['no kernel image']" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no kernel image"):
        harness.keep_working({"psykern": fails}, lambda name, result: None)


def row(**values: object) -> dict[str, object]:
    return {"rows": 2048, "share_of_gemm": 0.95, "psykern_times": 1.0, "peak_mb": 50.0, **values}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """As gpu.sh leaves them: one part passed, one failed; numbers by hand."""
    (tmp_path / "status.tsv").write_text("build\t0\t31\ntests\t1\t12\n")
    rows = [
        row(provider="psykern"),
        row(provider="psykern", rows=128, share_of_gemm=0.5, peak_mb=101.0),  # few rows: its share is not asked for
        row(provider="liger", psykern_times=3.0),
        row(provider="torch_compiled", psykern_times=0.9),
        row(provider="gemm", psykern_times=0.8),
    ]
    found = {"machine": {"device": "a GPU", "cuda": "13.0"}, "rows": rows}
    (tmp_path / "option_logprobs_gpu.json").write_text(json.dumps(found))
    return tmp_path


def test_the_summary_takes_the_worst_number_of_each_target(results: Path) -> None:
    targets = {t["target"].partition(":")[2].strip(): t for t in gpu_summary.summary(results)["targets"]}
    share = targets["share of the plain GEMM's rate, R >= 2048"]
    assert (share["measured"], share["reached"]) == (0.95, "yes")
    assert (targets["times the others"]["measured"], targets["times the others"]["reached"]) == (0.9, "no")
    assert (targets["extra memory, MB"]["measured"], targets["extra memory, MB"]["reached"]) == (101.0, "no")
    assert targets["idle share of the device"]["reached"] == "not measured"


def test_the_summary_compares_attention_with_others_of_its_shape(results: Path) -> None:
    """By hand: 2 / 4 at 4k tokens; what is shorter does not count. And a part whose rows name no provider."""
    shapes = {tokens: f"32 (8) of 128, {tokens} tokens" for tokens in (2048, 4096)}
    rows: list[dict[str, object]] = [
        {"kind": "attention", "provider": name, "shape": shapes[tokens], "seconds": seconds, "tflops": 100 * seconds}
        for name, tokens, seconds in (("psykern", 2048, 9), ("sdpa", 2048, 1), ("psykern", 4096, 4), ("sdpa", 4096, 2))
    ]
    rows.append({"kind": "products", "provider": "square", "shape": "8192 x 8192 x 8192", "seconds": 1, "tflops": 1})
    machine = {"device": "a GPU", "cuda": "13.0"}
    (results / "gpu_rates.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    (results / "run_gpu.json").write_text(json.dumps({"machine": machine, "rows": [{"what": "the first run"}]}))
    (results / "status.tsv").write_text("gpu_rates\t0\t31\nrun_gpu\t0\t12\n")
    gpu_summary.main([str(results)])
    targets = {t["target"]: t["measured"] for t in gpu_summary.summary(results)["targets"]}
    assert targets["attention, sustained: times torch's default, from 4k"] == 0.5
    assert targets["attention, sustained: TFLOP/s, 4k tokens"] == 400
    assert targets["attention, sustained: times cuDNN's, from 4k"] is None


def test_numbers_of_tiny_shapes_or_of_a_cpu_are_not_measured(results: Path) -> None:
    (results / "quick").touch()
    assert {t["reached"] for t in gpu_summary.summary(results)["targets"]} == {"not measured"}
    (results / "quick").unlink()
    path = results / "option_logprobs_gpu.json"
    path.write_text(path.read_text().replace('"cuda"', '"other"'))
    assert {t["reached"] for t in gpu_summary.summary(results)["targets"]} == {"not measured"}


def test_what_a_part_wrote_before_it_was_cut_counts_as_partial(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "status.tsv").write_text("option_logprobs_gpu\t124\t70\nscore_qwen3-8b\t137\t150\n")
    (results / "score_qwen3-8b.json").write_text('{"machine": {"device": "a G')
    gpu_summary.main([str(results)])
    printed = capsys.readouterr().out
    assert "ran out of time    70 s  5 rows, partial: psykern, liger, torch_compiled, gemm" in printed
    assert "score_qwen3-8b           ran out of time   150 s\n" in printed
    assert "0.95  yes, partial" in printed
    assert json.loads((results / "summary.json").read_text())["machine"]["device"] == "a GPU"


def test_a_part_that_fails_loses_no_other(tmp_path: Path) -> None:
    """With a Python that fails in all parts but one, and leaves one no time."""
    python = tmp_path / "python"
    summary = f'*gpu_summary*) exec {sys.executable} "$@"'
    python.write_text(f'#!/bin/sh\ncase "$*" in {summary};; *elementwise*) echo done;; *) exit 7;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "DEVICE": "cpu", "QUICK": "1", "OUT": str(tmp_path / "out")}
    (tmp_path / "out").mkdir()
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "results")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1, found.stderr
    states = [line.split()[:2] for line in found.stdout.splitlines() if line.endswith(" s")]
    parts = ["build", "smoke", "tests_engine", "gpu_rates", "score_qwen3-8b", "score_qwen3-0.6b"]  # of each call
    parts += ["build", "tune", "tune_experts", "run_gpu"]
    parts += ["build", "score_qwen3-8b", "score_qwen3-0.6b", "option_logprobs_gpu", "prefix_attention_gpu"]
    parts += ["score_llama-3.2-1b", "elementwise_gpu", "sanitizer"]
    assert states == [[part, "passed" if part == "elementwise_gpu" else "failed"] for part in parts]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"summary.txt", "gpu-results.tar.gz"}
    late = subprocess.run(command, env={**environment, "LIMIT": "1"}, capture_output=True, text=True, check=False)
    assert late.returncode == 1
    assert "elementwise_gpu          ran out of time" in late.stdout


def test_work_without_a_pause_with_tiny_shapes(tmp_path: Path) -> None:
    bench_gpu_rates.main(["--quick", "--seconds", "0.001", "--folder", str(tmp_path), "--name", "g"])
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert {row["kind"] for row in rows} == set(bench_gpu_rates.KINDS)
    square = rows[0]
    assert square["tflops"] == pytest.approx(2 * 64**3 / square["seconds"] / 1e12, abs=1e-3)


@pytest.mark.parametrize("group", gpu_smoke.GROUPS)
def test_smoke_with_tiny_shapes(group: str, tmp_path: Path) -> None:
    arguments = ["--quick", "--group", group, "--dtype", "float32", "--folder", str(tmp_path), "--name", "s"]
    with pytest.raises(SystemExit, match="0"):
        gpu_smoke.main(arguments)
    rows = json.loads((tmp_path / f"s_{group}_float32.json").read_text())["rows"]
    assert {row["backend"] for row in rows} == {"reference", "cpu"} and all(row["is_right"] for row in rows)


def test_smoke_sees_an_error_that_moves_and_one_that_does_not() -> None:
    right = torch.ones(5)
    calls = iter([right, right + 1e-6, right + 1, right + 1, right, right])
    place = gpu_smoke.Place()
    case = gpu_smoke.Case("c", lambda backend: [next(calls)], lambda: [right], 1e-5)
    found = [gpu_smoke.checked(case, "reference", place) for _ in range(3)]
    assert [row["is_right"] for row in found] == [False, False, True]
    assert [row["error"] for row in found] == ["the second run gave other bytes", "", ""]


def test_the_rehearsal_has_the_means_of_psych_201(shared: Path, tmp_path: Path) -> None:
    """And a tiny part of it runs through everything but the model."""
    sources = bench_scale.load_sources(shared / "psych")
    shares = bench_scale.weights_of(sources)
    assert shares.min() > 0 and shares.sum() == pytest.approx(1)
    responses = sum(share * source.responses for share, source in zip(shares, sources, strict=True))
    assert responses == pytest.approx(25_906_599 / 208_021, rel=1e-6)
    studies = 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_scale, "STUDIES", studies)
        rows = bench_scale.rehearse(1e-9, 2, 0, 2**17, tmp_path)
    assert [(row["piece"], row["way"]) for row in rows] == [(0, "text"), (0, "cache"), (1, "text"), (1, "cache")]
    assert sum(row["transcripts"] for row in rows if row["way"] == "cache") == studies
