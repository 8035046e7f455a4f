"""models.py of study: the published models, and YAML files that describe others."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.simulated_runs import Humans, rows, write_run

from psykern import ComparisonError
from psykern.study.compare import compare
from psykern.study.models import BASE, PUBLISHED_NLL, STUDY_MODELS, StudyModel, find_model, model_name, read_models

HUMANS = Humans(participants=30)


def test_models_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(
        "me/first:\n  family: Mine\n  size: 7\n  kind: base\n  name: First\n"
        "second:\n  family: Mine\n  generation: Mine 2\n  kind: reasoning\n  base: First\n"
    )
    found = read_models(path)
    assert found["me/first"] == StudyModel("First", "Mine", "Mine", 7.0, BASE, None)
    assert found["second"] == StudyModel("second", "Mine", "Mine 2", None, "reasoning", "First")
    runs = [write_run(tmp_path / name, f"me/{name}", rows(HUMANS)) for name in ("first", "second")]
    (pair,) = compare(runs, models=path, draws=50).pairs
    assert (pair.pair.base.label, pair.pair.post.label) == ("First", "second")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected names of models with their fields, got list"),
        ("m: 7\n", "models.yaml: m: expected fields"),
        ("m: {family: F, kind: base, szie: 7}\n", "got szie"),
        ("m: {kind: base}\n", "m: family: expected a text, got None"),
        ("m: {family: F, kind: base, size: big}\n", "size: expected billions of weights, got 'big'"),
        ("m: {family\n", "cannot be read as YAML"),
    ],
)
def test_a_yaml_that_makes_no_sense(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(ComparisonError, match=message):
        read_models(tmp_path / "models.yaml")


def test_table_of_the_studys_models() -> None:
    for model in STUDY_MODELS.values():
        assert (model.kind == BASE) <= (model.base is None)
        if model.base is not None:
            base = STUDY_MODELS[model.base.lower()]
            assert base.size is not None and base.family == model.family
    families = {model.family for model in STUDY_MODELS.values()}
    assert families == {"Qwen1.5", "Qwen2", "Qwen2.5", "Qwen3", "Qwen3.5", "Llama 3", "OLMo 3"}
    assert all(STUDY_MODELS[name.lower()].kind == BASE for name in PUBLISHED_NLL)
    expected = {
        "Qwen/Qwen1.5-0.5B-Chat": ("instruction", 0.5, "Qwen1.5-0.5B"),
        "Qwen/Qwen2.5-Coder-7B": ("code", 7, "Qwen2.5-7B"),
        "Qwen/Qwen3-8B": ("reasoning", 8, "Qwen3-8B-Base"),
        "Qwen/Qwen3-8B@main": ("reasoning", 8, "Qwen3-8B-Base"),
        "Qwen/Qwen3-8B@refs/pr/7": ("reasoning", 8, "Qwen3-8B-Base"),
        "Qwen/Qwen3-32B": ("reasoning", 32, None),
        "Qwen/Qwen3-30B-A3B-Base": ("base", 30, None),
        "Qwen/Qwen3-VL-32B-Thinking": ("vision", 32, "Qwen3-14B-Base"),
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("reasoning", 8, "Llama-3.1-8B"),
        "meta-llama/Meta-Llama-3.1-70B-Instruct": ("instruction", 70, "Llama-3.1-70B"),
        "unsloth/Llama-3.2-90B-Vision": ("vision", 90, "Llama-3.1-70B"),
        "allenai/Olmo-3.1-32B-Think/": ("reasoning", 32, "Olmo-3-1125-32B"),
        "/models/Llama-3.1-Centaur-70B": ("human", 70, "Llama-3.1-70B"),
    }
    for model_id, values in expected.items():
        found = find_model(model_id, {})
        assert found is not None and (found.kind, found.size, found.base) == values, model_id
    assert find_model("me/unknown", {}) is None


def test_revisions_of_a_model() -> None:
    """One model where nothing else is said of a revision; a model that nobody describes is called by its revision."""
    one, two = (StudyModel(name, "f", "g", None, BASE, None) for name in ("one", "two"))
    described = {"me/mine": one, "me/mine@v2": two}
    assert [find_model(f"me/Mine{at}", described) for at in ("", "@v1", "@v2")] == [one, one, two]
    names = {"me/mine": "mine", "me/mine@v2": "mine@v2", "me/mine@refs/pr/7": "mine@refs/pr/7", "/my/a@b": "a@b"}
    assert {model_id: model_name(model_id) for model_id in names} == names


def test_a_model_with_an_adapter() -> None:
    """Both are its name; the adapter's alone will do where somebody says that it is one."""
    assert model_name("Qwen/Qwen3-8B@v1 + /my/tuned/") == "Qwen3-8B@v1+tuned"
    centaur = find_model("meta-llama/Llama-3.1-70B + marcelbinz/Llama-3.1-Centaur-70B-adapter", {})
    assert centaur is not None and (centaur.kind, centaur.base) == ("human", "Llama-3.1-70B")
    assert find_model("Qwen/Qwen3-8B + me/tuned", {}) is None
    assert find_model("Qwen/Qwen3-8B + runs/Qwen3-8B", {}) is None, "a folder that is called like a model is none"
    mine = StudyModel("mine", "f", "g", None, "human", "Qwen3-8B")
    for name in ("qwen3-8b+tuned", "tuned", "me/tuned", "qwen/qwen3-8b + me/tuned"):
        assert find_model("Qwen/Qwen3-8B + me/tuned", {name: mine}) is mine
