"""Runs of models that transformers computes: identity, manifest, counts, plans, adapters, Ray, the commands."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.adapters import make_adapter
from support.command import manifest, psykern_command
from support.command import score as score_command
from support.foreign_folders import FOLDERS, ROWS
from support.records import recipe
from support.scoring import records, score
from support.tiny import encode, transcript
from support.toy import TOLERANCE, Toy, assert_records, make_toy, write_rows

import psykern
from psykern import Run, RunFolderError, Settings
from psykern.data.dataset import Dataset
from psykern.data.tokenizer import Tokenizer
from psykern.runs.cluster import _Worker
from psykern.runs.manifest import identity, plain

SHARED = "transformers: psykern's attention, prefixes shared"
SETTINGS = Settings(device="cpu", implementation="transformers")


@pytest.fixture(scope="module")
def foreign_run(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of the toy model, which is native too."""
    return psykern.score(toy.model, toy.data, tmp_path_factory.mktemp("foreign"), SETTINGS)


@pytest.fixture(scope="module")
def alibi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has one pass per sequence."""
    folder = tmp_path_factory.mktemp("alibi")
    replace(FOLDERS["gpt2"], config={"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}).make(folder)
    return folder


def test_the_records_are_those_of_the_native_model(toy: Toy, toy_run: Run, foreign_run: Run) -> None:
    assert (toy_run.manifest.implementation, foreign_run.manifest.implementation) == ("native", SHARED)
    assert foreign_run.manifest.counts == toy_run.manifest.counts
    assert foreign_run.manifest.model_hash == toy_run.manifest.model_hash
    for own, row in zip(records(foreign_run), toy.rows, strict=True):
        assert_records(own, toy.oracle.records(row["text"]))


def test_another_implementation_is_another_run(toy: Toy, foreign_run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(foreign_run.folder, tmp_path / "run")
    parts = sorted((folder / "responses").iterdir())
    before = [part.read_bytes() for part in parts]
    parts[0].unlink()
    again = psykern.score(toy.model, toy.data, folder, SETTINGS)
    assert again.units_done == len(parts)
    assert [part.read_bytes() for part in parts] == before
    with pytest.raises(RunFolderError, match=r'differs in implementation: "transformers: .* there, "native" here'):
        score(toy.model, toy.data, folder)


def test_the_identity_has_no_reasons_and_native_ones_are_as_ever() -> None:
    def of(implementation: str) -> dict[str, object]:
        return identity(plain(asdict(recipe(implementation=implementation))))

    mode = "transformers: one pass per sequence"
    assert of(f"{mode}, because a") == of(f"{mode}, because b") != of(SHARED)
    before = plain(asdict(recipe()))
    del before["implementation"]  # as manifests were
    assert identity(before) == of("native") != of(SHARED)


@pytest.mark.filterwarnings("ignore::psykern.NoSharingWarning")
def test_one_pass_per_sequence_is_counted_as_it_is(alibi: Path, tmp_path: Path) -> None:
    """The first two transcripts begin alike, and each is computed whole, up to its last scored token."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings = replace(SETTINGS, options="none")
    run = psykern.score(alibi, data, tmp_path / "run", settings)
    tokens = 0
    for row in ROWS:
        encoded = encode(Tokenizer.load(alibi), transcript(row["text"]))
        tokens += int(encoded.spans_tok.max()) - 1  # that one is predicted, not computed
    assert (
        run.manifest.implementation == "transformers: one pass per sequence, because its attention cannot be replaced"
    )
    without = Path(shutil.copytree(alibi, tmp_path / "without weights"))
    (without / "model.safetensors").unlink()
    estimate = psykern.estimate(without, data, settings)
    (study,) = estimate.studies
    assert study.computed_tokens == study.bound_tokens == run.manifest.counts.computed_tokens == tokens
    assert (estimate.implementation, estimate.weights.gpu) == (run.manifest.implementation, None)
    assert study.flops_body > 0


def test_settings_that_contradict_the_loaded_model(toy: Toy) -> None:
    native, foreign = Settings(implementation="native"), Settings(implementation="transformers")
    text = ["You press <<J>>."]
    message = "implementation: expected 'auto' or '{}', as the model is loaded, got"
    with psykern.load(toy.model, device="cpu", implementation="transformers") as scorer:
        assert scorer.score(text).equals(scorer.score(text, foreign))
        with pytest.raises(ValueError, match=message.format("transformers")):
            scorer.score(text, native)
    with psykern.load(toy.model, device="cpu") as scorer:
        assert scorer.score(text).equals(scorer.score(text, native))
        with pytest.raises(ValueError, match=message.format("native")):
            psykern.score(scorer, toy.data, "run", foreign)


def test_adapters_and_conditions(toy: Toy, tmp_path: Path) -> None:
    """Of a kind that peft merges; each adapter on a base of its own."""
    for seed, name in enumerate(("one", "two")):
        make_adapter(tmp_path / name, make_toy(tmp_path / "again"), seed=seed, r=2, target_modules=["q_proj"])
    adapters = [tmp_path / "one", tmp_path / "two"]
    how = {"out": tmp_path / "runs", "adapters": adapters, "conditions": ["plain", "persona"]}
    settings = replace(SETTINGS, limit=1, studies=("bandit",))
    native = replace(settings, implementation="native")
    runs = psykern.score_adapters(toy.model, toy.data, settings=settings, **how)
    assert [run.manifest.implementation for run in runs] == [SHARED] * 4
    plains = [records(run)[0] for run in runs[::2]]
    for adapter, own in zip(adapters, plains, strict=True):
        alone = psykern.score(toy.model, toy.data, tmp_path / f"native-{adapter.name}", native, adapter=adapter)
        expected = [record["logprob"] for record in records(alone)[0]]
        assert [record["logprob"] for record in own] == pytest.approx(expected, rel=0, abs=2 * TOLERANCE)
    assert plains[0] != plains[1]


def test_a_worker_of_ray_loads_what_the_settings_say(toy: Toy, tmp_path: Path) -> None:
    worker = _Worker(str(toy.model), None, SETTINGS, Dataset.find(toy.data), str(tmp_path / "run"))
    assert worker.recipe().implementation == SHARED


def test_the_commands(alibi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What will be slow is said in one line, once."""
    data, flags = write_rows(tmp_path / "rows.jsonl", ROWS), ("--implementation", "transformers", "--quiet")
    assert score_command(alibi, data, tmp_path / "run", *flags) == 0
    _, err = capsys.readouterr()
    why = "one pass per sequence, common beginnings again and again, because its attention cannot be replaced"
    assert err == f"psykern: {alibi}: {why}\n"
    assert manifest(tmp_path / "run")["implementation"].startswith("transformers: one pass per sequence, because ")
    assert psykern_command("plan", alibi, data, "--device", "cpu", *flags) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("implementation transformers: one pass per sequence, because its attention")
