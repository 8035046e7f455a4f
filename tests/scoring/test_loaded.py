"""A model that is loaded once: runs take it, what contradicts it is refused, and its next scores begin at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy import Toy, make_talking, make_toy_data, write_rows

import psykern
from psykern import Settings, _cpu, demo
from psykern.engine.plan import Wave
from psykern.engine.wave import Launched, run_wave
from psykern.models.model import Model


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    return make_talking(make_toy_data(folder), folder / "talking")


@pytest.fixture(scope="module")
def scorer(toy: Toy) -> psykern.Scorer:
    return psykern.load(toy.model, device="cpu")


def contents(run: Path) -> dict[str, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_runs_take_a_loaded_model(
    toy: Toy, scorer: psykern.Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(device="cpu", unit_tokens=500)
    psykern.score_conditions(toy.model, toy.data, tmp_path / "each", ["plain", "chat"], settings)
    monkeypatch.setattr("psykern.scoring.scorer.Model", lambda *_: pytest.fail("the model was loaded again"))
    run = psykern.score(scorer, toy.data, tmp_path / "one", Settings(unit_tokens=500, wave_tokens=99))
    assert (run.manifest.model_id, run.manifest.wave_tokens) == (str(toy.model), 99)
    psykern.score_conditions(scorer, toy.data, tmp_path / "both", ["plain", "chat"], settings)
    assert contents(tmp_path / "both") == contents(tmp_path / "each")
    assert psykern.read_run(tmp_path / "one")["response"].equals(psykern.read_run(tmp_path / "both/plain")["response"])


def test_a_text_longer_than_a_wave_is_one_wave_whoever_asks(
    toy: Toy, scorer: psykern.Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs, rows in memory and questions: what would be carried needs more memory than a wave of twice the budget."""
    waves: list[tuple[int, int]] = []

    def spy(model: Model, wave: Wave, *others: Any) -> Launched:
        waves.append((len(wave.token_ids), wave.num_carried))
        return run_wave(model, wave, *others)

    monkeypatch.setattr("psykern.engine.engine.run_wave", spy)
    data = write_rows(tmp_path / "rows.jsonl", toy.rows[:1])
    (study,) = psykern.estimate(toy.model, data, Settings(device="cpu", options="none")).studies
    wave_tokens = study.computed_tokens // 2
    (tight,) = psykern.estimate(
        toy.model, data, Settings(device="cpu", options="none", wave_tokens=wave_tokens)
    ).studies
    assert tight == study, "one wave, as large"
    psykern.score(scorer, data, tmp_path / "run", Settings(options="none", wave_tokens=wave_tokens))
    scorer.score(toy.rows[:1], Settings(options="none", wave_tokens=wave_tokens))
    assert waves == [(study.computed_tokens, 0)] * 2
    with psykern.load(toy.model, device="cpu", wave_tokens=wave_tokens) as small:
        waves.clear()
        small.surprisal([toy.rows[0]["text"]])
        assert len(waves) == 1 and waves[0][0] > wave_tokens and waves[0][1] == 0


def test_what_contradicts_it_is_refused_before_anything_is_made(
    toy: Toy, scorer: psykern.Scorer, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="dtype: expected 'auto' or 'float32', as the model is loaded, got 'bfloat16'"):
        psykern.score(scorer, toy.data, out, Settings(dtype="bfloat16"))
    with pytest.raises(ValueError, match="revision: expected none, as the model is loaded, got 'v1'"):
        psykern.score(scorer, toy.data, out, revision="v1")
    assert not out.exists()


@pytest.mark.parametrize("model", [torch.nn.Linear(1, 1), object(), None, b"folder"], ids=lambda m: type(m).__name__)
def test_what_is_no_model(model: Any, toy: Toy, tmp_path: Path) -> None:
    message = rf"model: expected a folder or a hub id, got {type(model).__name__}; save the model and its tokenizer to"
    with pytest.raises(TypeError, match=message):
        psykern.load(model)
    with pytest.raises(TypeError, match=message):
        psykern.score(model, toy.data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_slow_dtype_is_warned_of_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "multiplies_bf16", lambda: False)
    with pytest.warns(psykern.SlowDtypeWarning, match="dtype bfloat16: this processor has no fast products of bf16"):
        psykern.load(demo.MODEL, device="cpu", dtype="bfloat16")


def test_a_second_score_begins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 ms are asked for; the bound is ten times that, as other tests take the cores meanwhile."""
    scorer = psykern.load(demo.MODEL, device="cpu")
    rows = [{"text": f"You choose between J and F. You press <<{k}>>.", "options": ["J", "F"]} for k in "JFJ"]
    begun: list[float] = []

    def timed(model: Model, *of: Any) -> Any:
        begun.append(time.perf_counter())
        return run_wave(model, *of)

    monkeypatch.setattr("psykern.engine.engine.run_wave", timed)
    waits = []
    for _ in range(5):
        begun.clear()
        called = time.perf_counter()
        assert scorer.score(rows).num_rows == 3
        waits.append(begun[0] - called)
    print("seconds from call to first wave:", [f"{wait:.4f}" for wait in waits])
    assert min(waits[1:]) < 0.2
