"""Models that see, on text alone: their configs as published and as saved, and the names that their files may have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import CONFIGS, make_model
from support.configs import assert_rope, ropes_of, rotary_of
from support.model_folders import INDEX, SINGLE
from support.published import CONFIGS as PUBLISHED
from transformers import AutoConfig

from psykern.core.errors import CheckpointError
from psykern.kernels.compute import Compute
from psykern.models.families import parse_spec
from psykern.models.model import Model
from psykern.models.spec import EMBEDDING, HEAD


def parse(config: dict[str, Any]) -> Any:
    return parse_spec(config, "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_under_transformers(name: str, tmp_path: Path) -> None:
    spec = parse(PUBLISHED[name])
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    theirs = AutoConfig.from_pretrained(tmp_path).get_text_config()
    crossing = getattr(theirs, "cross_attention_layers", [])
    numbers = [i for i in range(theirs.num_hidden_layers) if i not in crossing]
    assert [layer.prefix for layer in spec.layers] == [f"model.layers.{i}." for i in numbers]
    assert_rope(set(ropes_of(spec)).pop(), *rotary_of(theirs, "full_attention"))
    mixer = spec.layers[0].mixer
    assert (spec.eps, spec.vocab_size, spec.max_positions, spec.hidden_size, mixer.window, mixer.num_kv_heads) == (
        *(theirs.rms_norm_eps, theirs.vocab_size, theirs.max_position_embeddings, theirs.hidden_size, None),
        theirs.num_key_value_heads,
    )


def test_what_the_published_configs_say_in_numbers() -> None:
    """By hand: transformers may err too. Of 40 layers of Llama 3.2 Vision a text passes through 32."""
    qwen2, qwen3, llama = (parse(PUBLISHED[f"{name}"]) for name in ("Qwen2.5-VL-7B", "Qwen3-VL-2B", FAR))
    assert qwen2 == parse(PUBLISHED["Qwen2.5-VL-7B-saved-by-4.54"]) == parse(PUBLISHED["Qwen2.5-VL-7B-saved-by-5"])
    assert (qwen2.has_tied_head, qwen3.has_tied_head, llama.has_tied_head) == (False, True, False)
    assert (len(qwen2.layers), len(qwen3.layers), len(llama.layers)) == (28, 28, 32)
    assert llama.tensors()[EMBEDDING] == (128264, 4096) and llama.tensors()[HEAD] == (128256, 4096)
    assert qwen3.layers[0].mixer.qk_norm == "head" and qwen2.layers[0].mixer.qkv_bias


FAR = "Llama-3.2-11B-Vision"


def test_a_multi_axis_rope_may_be_stretched() -> None:
    """As Qwen2.5-VL's page advises for long texts."""
    rope = {"type": "yarn", "mrope_section": [16, 24, 24], "factor": 4.0, "original_max_position_embeddings": 32768}
    plain = {key: value for key, value in rope.items() if key != "mrope_section"}
    with_axes = parse(PUBLISHED["Qwen2.5-VL-7B"] | {"rope_scaling": rope})
    assert ropes_of(with_axes) == ropes_of(parse(PUBLISHED["Qwen2.5-VL-7B"] | {"rope_scaling": plain}))
    assert ropes_of(with_axes) != ropes_of(parse(PUBLISHED["Qwen2.5-VL-7B"]))


def changed(name: str, **text: Any) -> dict[str, Any]:
    return PUBLISHED[name] | {"text_config": PUBLISHED[name]["text_config"] | text}


BOTH = "Qwen2.5-VL-7B-saved-by-4.54"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mllama-without-text": (PUBLISHED[FAR] | {"text_config": None}, "config.json: text_config: expected an object"),
    "qwen3-without-text": (
        {key: value for key, value in PUBLISHED["Qwen3-VL-2B"].items() if key != "text_config"},
        "config.json: text_config: expected an object, the config of the language model, got None",
    ),
    "crossing-too-far": (
        changed(FAR, cross_attention_layers=[3, 40]),
        "config.json: text_config: cross_attention_layers: expected numbers of some of the layers, 0 to 39, got [3, 4",
    ),
    "crossing-below": (changed(FAR, cross_attention_layers=[-1]), "cross_attention_layers: expected numbers"),
    "crossing-words": (changed(FAR, cross_attention_layers=[["3"]]), "cross_attention_layers: expected numbers"),
    "all-crossing": (changed(FAR, num_hidden_layers=1, cross_attention_layers=[0]), "cross_attention_layers: expected"),
    "mllama-tied": (changed(FAR, tie_word_embeddings=True), "tie_word_embeddings: expected false"),
    "windows": (changed("Qwen3-VL-2B", use_sliding_window=True), "use_sliding_window: expected false"),
    "unknown-inside": (changed(FAR, attn_scale=2.0), "config.json: text_config: attn_scale (2.0): expected no key"),
    "unknown-outside": (PUBLISHED[FAR] | {"attn_scale": 2.0}, "config.json: attn_scale (2.0): expected no key"),
    "two-places": (
        PUBLISHED[BOTH] | {"rms_norm_eps": 1e-5},
        "text_config.rms_norm_eps is 1e-06 and rms_norm_eps is",
    ),
    "two-ropes": (
        PUBLISHED[BOTH] | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "text_config.rope_scaling is {'rope_type': 'default', 'type': 'default'} and rope_scaling is {'type': 'yarn'",
    ),
    "a-language-model-that-sees": (
        {**PUBLISHED["Qwen2.5-VL-7B"], "model_type": "qwen2", "rope_scaling": None},
        "config.json: vision_config ({'hidden_size'",
    ),
    "axes-of-a-language-model": (
        {**PUBLISHED["Qwen2.5-VL-7B"], "model_type": "qwen2", "vision_config": None},
        "config.json: rope_scaling.mrope_section: expected one of rope_type, ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_cannot_be_read_names_file_and_key(name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(CheckpointError) as error:
        parse(config)
    assert message in str(error.value)


def test_the_root_is_asked_first_whether_the_head_is_tied() -> None:
    inside = {"tie_word_embeddings": False}
    config = changed("Qwen3-VL-2B", **inside)
    assert parse(config).has_tied_head
    assert not parse(config | {"tie_word_embeddings": None}).has_tied_head


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """Of a name in CONFIGS: the folder that transformers saved, and its tensors by the names of its modules."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def of(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, dict(make_model(folder, **CONFIGS[name]).state_dict())
        return made[name]

    return of


INSIDE, SEES = "model.language_model.", ("model.visual.", "model.vision_model.", "model.multi_modal_projector.")


def as_modules(name: str) -> str:
    """As training frameworks save them, from the modules of transformers 4.52 and later."""
    return name


def with_model_inside(name: str) -> str:
    """Before 4.52: Llama 3.2 Vision as published, and others in servers' names."""
    outside = name.removeprefix("model.")
    if name == HEAD:
        return f"language_model.{HEAD}"
    return name.replace(INSIDE, "language_model.model.") if name.startswith(INSIDE) else outside


def flat(name: str) -> str:
    """Before 4.52: Qwen2.5-VL as published."""
    return name.replace(INSIDE, "model.") if name.startswith(INSIDE) or name == HEAD else name.removeprefix("model.")


def without_head(name: str) -> str:
    """From the model without its head."""
    return name.removeprefix("model.")


def bare(name: str) -> str:
    """From the language model alone, without its head."""
    return name.removeprefix(INSIDE)


LAYOUTS = {
    "qwen2_5_vl-published": ("qwen2_5_vl-window", flat, ""),
    "qwen2_5_vl-as-modules": ("qwen2_5_vl-window", as_modules, "_orig_mod."),
    "qwen2_5_vl-of-servers": ("qwen2_5_vl-window", with_model_inside, ""),
    "qwen3_vl-published": ("qwen3_vl-tied", as_modules, ""),
    "qwen3_vl-merged-by-peft": ("qwen3_vl-tied", as_modules, "base_model.model."),
    "qwen3_vl-without-head": ("qwen3_vl-tied", without_head, "module."),
    "qwen3_vl-bare": ("qwen3_vl-tied", bare, ""),
    "mllama-published": ("mllama", with_model_inside, ""),
    "mllama-as-modules": ("mllama", as_modules, "module._orig_mod."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_found_under_its_names(
    layout: str, saved: Callable[[str], tuple[Path, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    """In shards, of which one has nothing that a text needs; tensors of other parts are not even mapped."""
    family, spell, wrapper = LAYOUTS[layout]
    source, state = saved(family)
    tied = "tied" in family
    stored = {wrapper + spell(n): t for n, t in state.items() if not (tied and n == HEAD)}
    if layout == "qwen3_vl-bare":
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith("model.")}
    if "qwen" in family:
        stored[f"{wrapper}mtp.layers.0.weight"] = torch.zeros(3, dtype=torch.int8)
    shutil.copy(source / "config.json", tmp_path)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for i, name in enumerate(stored):
        sees = any(part in name for part in ("vis", "multi_modal", "mtp"))
        shards.setdefault(f"model-0000{0 if sees else 1 + i % 2}-of-2.safetensors", {})[name] = stored[name]
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    model = Model(tmp_path, Compute.resolve("cpu"))
    assert torch.equal(model.embed(torch.arange(320)), state[f"{INSIDE}embed_tokens.weight"][:320])
    assert torch.equal(model.head(), state[HEAD])
    for layer, spec in enumerate(model.spec.layers):
        for name, tensor in model.tensors(layer).items():
            assert torch.equal(tensor, state[INSIDE + spec.prefix.removeprefix("model.") + name]), name
    assert not [name for name in model._source.names if "vis" in name or "mtp" in name or "modal" in name]


def test_the_files_of_transformers_are_the_published_ones(
    saved: Callable[[str], tuple[Path, dict[str, torch.Tensor]]],
) -> None:
    """So the engine's tests, which take them as they are, read these; the functions here spell what it writes."""
    for family, spell in (("qwen2_5_vl-window", flat), ("qwen3_vl-tied", as_modules), ("mllama", with_model_inside)):
        folder, state = saved(family)
        written = set(load_file(folder / SINGLE))
        assert written == {spell(name) for name in state if not (name == HEAD and "tied" in family)}


@pytest.mark.parametrize(
    "name",
    ["language_model.model.layers.0.extra.weight", "language_model.model.layers.6.mlp.up_proj.weight", "visual.a"],
)
def test_an_unknown_tensor_is_still_refused_by_its_name(
    name: str, saved: Callable[[str], tuple[Path, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    """Also where it would be a part of another family that sees, or of a layer behind the last."""
    folder, _ = saved("mllama")
    shutil.copy(folder / "config.json", tmp_path)
    save_file(load_file(folder / SINGLE) | {name: torch.zeros(1)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=f"unused tensors: {name}$"):
        Model(tmp_path, Compute.resolve("cpu"))


def test_layers_that_do_not_cross_are_not_skipped(
    saved: Callable[[str], tuple[Path, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    """Where the config says that they do, they would be missed in silence."""
    folder = Path(shutil.copytree(saved("mllama")[0], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["cross_attention_layers"] = [0, 1, 2, 5]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unused tensors: .*model.layers.1.self_attn.q_proj.weight"):
        Model(folder, Compute.resolve("cpu"))


def test_a_head_of_as_many_rows_as_the_embedding_is_refused(
    saved: Callable[[str], tuple[Path, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    folder, _ = saved("mllama")
    shutil.copy(folder / "config.json", tmp_path)
    head = "language_model.lm_head.weight"
    save_file(load_file(folder / SINGLE) | {head: torch.zeros(328, 64)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=rf"{head} \(expected \[320, 64\], got \[328, 64\]\)"):
        Model(tmp_path, Compute.resolve("cpu"))
