"""Runs with adapters: one or several on a base, and an adapter's folder in a model's place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.adapters import edit_config, make_adapter
from support.exactness import in_fp64
from support.scoring import assert_same_scores, records
from support.toy import Oracle, Toy, assert_records, make_toy

import psykern
from psykern import CheckpointError, RunFolderError, Settings
from psykern.data.dataset import Dataset
from psykern.models import locate, weights
from psykern.runs import cluster
from psykern.study.finished import open_runs

SETTINGS = Settings(device="cpu")


@dataclass(frozen=True)
class Adapters:
    one: Path
    two: Path
    oracle: Oracle  # of the first


@pytest.fixture(scope="module")
def adapters(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Two on the toy model."""
    folder = tmp_path_factory.mktemp("adapters")
    merged = [
        make_adapter(folder / name, make_toy(folder / "again"), seed=seed, r=4, target_modules=["q_proj", "up_proj"])
        for seed, name in enumerate(["one", "two"])
    ]
    for name in ("one", "two"):
        edit_config(folder / name, base_model_name_or_path=str(toy.model))
    return Adapters(folder / "one", folder / "two", Oracle(in_fp64(merged[0]), toy.model))


@pytest.fixture(scope="module")
def both(toy: Toy, adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> tuple[psykern.Run, ...]:
    """A run of each, on a base that is opened and hashed once."""
    calls: list[str] = []

    def counted(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (calls.append(name), of(*given))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "hash_model", counted("hash", weights.hash_model))
        patch.setattr(weights, "open_weights", counted("open", weights.open_weights))
        out = tmp_path_factory.mktemp("both")
        runs = psykern.score_adapters(toy.model, toy.data, out, [adapters.one, str(adapters.two)], SETTINGS)
    assert calls == ["open", "hash"]
    assert [run.folder for run in runs] == [out / "one", out / "two"]
    return runs


def test_records_equal_the_oracle(toy: Toy, adapters: Adapters, both: tuple[psykern.Run, ...]) -> None:
    for own, row in zip(records(both[0]), toy.rows, strict=True):
        assert_records(own, adapters.oracle.records(row["text"]))


def test_manifests_tell_adapters_apart(
    toy: Toy, toy_run: psykern.Run, adapters: Adapters, both: tuple[psykern.Run, ...]
) -> None:
    one, two = (run.manifest for run in both)
    assert len({one.model_hash, two.model_hash, toy_run.manifest.model_hash}) == 3
    assert one.adapter is not None and two.adapter is not None and toy_run.manifest.adapter is None
    assert one.adapter.path == str(adapters.one) and one.adapter.hash != two.adapter.hash
    assert one.model_id == f"{toy.model} + {adapters.one}"
    written = json.loads((Path(both[0].folder) / "manifest.json").read_text())
    assert written["adapter"] == {"path": str(adapters.one), "hash": one.adapter.hash}
    assert [run.model_hash for run in open_runs(Path(both[0].folder).parent)] == [one.model_hash, two.model_hash]


def test_another_adapter_does_not_go_on_with_a_run(
    toy: Toy, adapters: Adapters, both: tuple[psykern.Run, ...], tmp_path: Path
) -> None:
    run = shutil.copytree(both[0].folder, tmp_path / "run")
    for other in (adapters.two, None):
        with pytest.raises(RunFolderError, match="model_hash"):
            psykern.score(toy.model, toy.data, run, SETTINGS, adapter=other)
    again = psykern.score(toy.model, toy.data, run, SETTINGS, adapter=adapters.one)
    assert again.units_done == again.units_total


def test_an_adapters_folder_has_the_base_that_it_names(
    adapters: Adapters, toy: Toy, both: tuple[psykern.Run, ...]
) -> None:
    with psykern.load(adapters.one, device="cpu") as scorer:
        assert (scorer.name, scorer.hash) == (both[0].manifest.model_id, both[0].manifest.model_hash)
        assert_same_scores(scorer.score(toy.rows, SETTINGS, study="rows"), psykern.read_run(both[0].folder))
        with pytest.raises(ValueError, match="adapter: expected none, as the model is loaded"):
            psykern.score(scorer, toy.data, "never", SETTINGS, adapter=adapters.two)
    plans = [psykern.estimate(model, toy.data, SETTINGS) for model in (toy.model, adapters.one)]
    assert plans[0].studies == plans[1].studies


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path of adapter_config.json names none; give the base"),
        ({"base_model_name_or_path": "./gone"}, "of adapter_config.json names './gone'; give the base as the model"),
    ],
    ids=["none", "gone"],
)
def test_an_adapters_folder_without_its_base(
    changes: dict[str, Any], message: str, adapters: Adapters, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters.one, tmp_path / "one"))
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match="an adapter folder without its base") as error:
        psykern.load(folder, device="cpu")
    assert str(error.value).startswith(f"{folder}: ") and message in str(error.value)


def test_the_revision_of_a_base_on_the_hub(
    adapters: Adapters, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    folder = Path(shutil.copytree(adapters.one, tmp_path / "one"))
    edit_config(folder, base_model_name_or_path="owner/base", revision="v2")
    resolve = locate.resolve_model

    def resolved(model: str | Path, of_weights: bool = True) -> Path:
        asked.append(str(model))
        return toy.model if str(model).startswith("owner/") else resolve(model, of_weights)

    monkeypatch.setattr(locate, "resolve_model", resolved)
    found = locate.locate(folder)
    assert (asked[-1], found.name) == ("owner/base@v2", f"owner/base@v2 + {folder}")


def test_what_is_no_adapter_on_a_base(adapters: Adapters, toy: Toy, tmp_path: Path) -> None:
    for model, adapter, message in (
        (toy.model, toy.model, f"{toy.model}: expected an adapter's folder, with adapter_config.json"),
        (toy.model, "gone", "adapter: 'gone': no such model folder"),
        (adapters.one, adapters.two, "on top of it: expected the base of one adapter"),
    ):
        with pytest.raises(CheckpointError, match=message):
            psykern.score(model, toy.data, tmp_path / "run", SETTINGS, adapter=adapter)
    with pytest.raises(CheckpointError, match="adapter: expected folders of different names, got"):
        psykern.score_adapters(toy.model, toy.data, tmp_path / "run", [adapters.one, f"{adapters.one}/"], SETTINGS)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_worker_of_a_cluster_has_the_adapter(
    adapters: Adapters, toy: Toy, both: tuple[psykern.Run, ...], tmp_path: Path
) -> None:
    """Without a cluster: what the actor makes of what it is given."""
    dataset = Dataset.find(toy.data)
    recipe = cluster._Worker(str(toy.model), str(adapters.one), SETTINGS, dataset, str(tmp_path)).recipe()
    expected = both[0].manifest
    assert (recipe.model_id, recipe.model_hash, recipe.adapter) == (
        expected.model_id,
        expected.model_hash,
        expected.adapter,
    )


def test_an_adapters_own_tokenizer(adapters: Adapters, toy: Toy, tmp_path: Path) -> None:
    """And its chat template, as the two belong together."""
    folder = Path(shutil.copytree(adapters.one, tmp_path / "one"))
    tokenizer = json.loads((toy.model / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None  # no token in front
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with psykern.load(toy.model, adapter=folder, device="cpu", chat=True) as scorer:
        assert scorer.language.tokenizer.front == ()
    with psykern.load(toy.model, adapter=adapters.one, device="cpu") as scorer:
        assert scorer.language.tokenizer.front == (0,)
