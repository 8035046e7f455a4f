"""Adapters against peft's own merged models, and those that are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from support.adapters import WEIGHTS, edit_config, edit_tensors, make_adapter
from support.checkpoints import CONFIGS, make_model, oracle_logprobs
from support.exactness import TOLERANCE, in_fp64
from support.groups import random_group, wanted
from support.quantised import quantise
from support.quantised_cases import CASES as QUANTISED
from support.quantised_cases import SIZES
from torch import Tensor
from transformers import PreTrainedModel

from psykern.core.errors import CheckpointError, NonFiniteError
from psykern.core.types import TargetScores
from psykern.engine.engine import Engine
from psykern.engine.plan import plan
from psykern.kernels.compute import Compute
from psykern.models.model import Model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
BOTH = ["embed_tokens", "lm_head"]

# A configuration of CONFIGS and one of peft; each is another way to be wrong.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": LINEAR}),
    "qwen3-tied": ("qwen3", {"target_modules": "all-linear", "lora_alpha": 3}),
    "patterns": (
        "olmo3",
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 6, "proj": 9},  # the first that matches
            "alpha_pattern": {r"layers\.[02]\.mlp\.down_proj": 3},
            "layers_to_transform": [1, 2],
            "fan_in_fan_out": True,
        },
    ),
    "regular-expression": (
        "llama",
        {"target_modules": r".*\.[01]\.self_attn\.(q|v)_proj", "exclude_modules": r".*1.*v.*"},
    ),
    "embedding-and-head": ("qwen3-one-kv-head", {"target_modules": ["v_proj", *BOTH]}),
    "dora": ("qwen3-one-kv-head", {"target_modules": [*LINEAR, *BOTH], "use_dora": True}),
    "bias-of-its-own": ("llama-rope3-bias", {"target_modules": LINEAR, "lora_bias": True}),
    "biases": ("qwen2-window", {"target_modules": ["q_proj"], "bias": "all"}),
    "saved": ("olmo2", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm", *BOTH]}),
    "vision": ("qwen3_vl", {"target_modules": ["q_proj", "down_proj", "qkv"]}),  # the tower's, too
    "cross-attention": ("mllama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    "tied-and-saved-head": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied-and-saved-embedding": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}


def opened(folder: Path, adapter: Path, **how: Any) -> Model:
    return Model(folder, Compute.resolve("cpu"), adapter=adapter, **how)


def score(model: Model) -> TargetScores:
    return Engine(model).run(plan(GROUP, wave_tokens=100, batch_tokens=64, min_share=4))


GROUP = random_group(np.random.default_rng(5), 4, 320, 2)  # transcripts as tokens, that share prefixes


def assert_scores(scores: TargetScores, oracle: PreTrainedModel) -> None:
    """Against forward passes in fp64 of each transcript and each of its branches."""
    oracle, contexts = in_fp64(oracle), wanted(GROUP)
    whole = {tuple(context) for context, _ in contexts}
    whole -= {one for one in whole if any(other != one and other[: len(one)] == one for other in whole)}
    tables = {context: oracle_logprobs(oracle, np.array(context)) for context in whole}
    for i, (context, token) in enumerate(contexts):
        table = next(t for known, t in tables.items() if known[: len(context)] == tuple(context))
        assert abs(scores.logprob[i] - table[len(context) - 1, token]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_those_of_pefts_merged_model(case: str, tmp_path: Path) -> None:
    name, lora = CASES[case]
    base = make_model(tmp_path / "base", **CONFIGS[name])
    merged = make_adapter(tmp_path / "adapter", base, r=4, **lora)
    model = opened(tmp_path / "base", tmp_path / "adapter")
    assert_scores(score(model), merged)
    slots = opened(tmp_path / "base", tmp_path / "adapter", num_slots=2)  # as on a device, streamed
    assert_scores(score(slots), merged)


def test_a_base_in_bf16_is_merged_in_fp32(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", dtype=torch.bfloat16, **CONFIGS["llama"])  # given in fp32
    merged = make_adapter(tmp_path / "adapter", base, r=4, target_modules=LINEAR)
    assert_scores(score(opened(tmp_path / "base", tmp_path / "adapter")), merged)


def test_a_base_in_4_bits_has_the_adapter_of_its_floats(tmp_path: Path) -> None:
    """As the study runs Centaur: psykern adds the change to what the 4 bits mean."""
    folder, case = tmp_path / "base", QUANTISED["nf4-double"]
    base = make_model(folder, **SIZES)
    base.load_state_dict(quantise(folder, case.quantiser, case.config, case.also))
    merged = make_adapter(tmp_path / "adapter", base, r=4, target_modules=LINEAR)
    model = opened(folder, tmp_path / "adapter")
    assert_scores(score(model), merged)
    assert model.changes and "nf4" in model.changes[0]


def test_a_bare_decoder_and_other_spellings(tmp_path: Path) -> None:
    """Of the model without its head; of one that was compiled; with the adapter's name, as FSDP's own files have it."""
    base = make_model(tmp_path / "base", **CONFIGS["llama"])
    merged = make_adapter(tmp_path / "adapter", base.model, r=4, target_modules=["q_proj"])
    model = opened(tmp_path / "base", tmp_path / "adapter")
    assert_equal_layers(model, merged)

    def spell(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            longer = name.replace("base_model.model.", "base_model.model._orig_mod.model.").replace(
                ".weight", ".default.weight"
            )
            tensors[longer] = tensors.pop(name)

    edit_tensors(tmp_path / "adapter", spell)
    assert_equal_layers(opened(tmp_path / "base", tmp_path / "adapter"), merged)


def assert_equal_layers(model: Model, decoder: PreTrainedModel) -> None:
    for i, layer in enumerate(decoder.layers):
        for name, tensor in layer.state_dict().items():
            torch.testing.assert_close(model.tensors(i)[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of peft, about its own conversion
def test_changes_of_single_experts(tmp_path: Path) -> None:
    """As adapters name them since before transformers 5, whose experts are one tensor: peft converts them."""
    base = make_model(tmp_path / "base", **CONFIGS["qwen3-moe"])
    generator, tensors, front = torch.Generator().manual_seed(0), {}, "base_model.model.model.layers."
    for expert in (f"{layer}.mlp.experts.{e}" for layer in range(3) for e in range(8)):
        for module, (rows, columns) in {"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)}.items():
            for part, shape in (("lora_A", (4, columns)), ("lora_B", (rows, 4))):
                tensors[f"{front}{expert}.{module}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.1
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    assert_scores(score(opened(tmp_path / "base", tmp_path / "adapter")), merged.eval())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("made")
    base = make_model(folder / "base", **CONFIGS["llama"])
    make_adapter(folder / "adapter", base, r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))


def test_what_the_adapter_leaves_alone_stays_mapped(made: Path) -> None:
    """No second copy: a changed tensor is made anew each time, in fp32, the others are the files' own memory."""
    source = opened(made / "base", made / "adapter")._source
    changed, other = (f"model.layers.0.self_attn.{module}.weight" for module in ("q_proj", "k_proj"))
    assert source.tensor(changed).data_ptr() != source.tensor(changed).data_ptr() and not source.is_mapped(changed)
    for name in ("lm_head.weight", other):
        assert source.is_mapped(name) and source.tensor(name).data_ptr() == source.tensor(name).data_ptr()


def test_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", num_hidden_layers=1, **CONFIGS["llama"])
    make_adapter(tmp_path / "adapter", base, r=4, target_modules=LINEAR, use_dora=True)
    model, before = opened(tmp_path / "base", tmp_path / "adapter"), torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(model.tensors(0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_nan_in_an_adapter_is_named(made: Path, adapter: Path) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(adapter, lambda tensors: tensors[name].view(-1)[3:4].fill_(torch.nan))
    with pytest.raises(NonFiniteError) as error:
        score(opened(made / "base", adapter))
    assert "layer 1 (counted from 0); its weights hold NaN or infinity: model.layers.1.self_attn" in str(error.value)
    assert f"and {name} of the adapter {adapter}" in str(error.value)


Q1 = "base_model.model.model.layers.1.self_attn.q_proj"
A, B = f"{Q1}.lora_A.weight", f"{Q1}.lora_B.weight"


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


REFUSED_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "A-without-B": (lambda t: t.pop(B), f"{A}: expected lora_A, lora_B of model.layers.1.self_attn.q_proj, got lora_A"),
    "a-layer-without": (
        lambda t: (t.pop(A), t.pop(B)),
        "target_modules names model.layers.1.self_attn.q_proj of the base, and adapter_model.safetensors has no change",
    ),
    "shape": (
        lambda t: t.update({B: torch.zeros(65, 4)}),
        f"{B}: expected [64, 4], as the base's model.layers.1.self_attn.q_proj.weight is [64, 64] and r is 4, got [65",
    ),
    "rank": (lambda t: t.update({A: torch.zeros(5, 64), B: torch.zeros(64, 5)}), "is [64, 64] and r is 4, got [5, 64]"),
    "another-layer": (
        lambda t: t.update({f"{Q1}.lora_A.weight".replace(".1.", ".3."): torch.zeros(4, 64)}),
        "it changes what this base has not: base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight; expected "
        "tensors of a llama model with 3 layers",
    ),
    "another-adapters-name": (rename(A, f"{Q1}.lora_A.other.weight"), "it changes what this base has not"),
    "untargeted": (
        lambda t: t.update({A.replace("q_", "k_"): torch.zeros(4, 64), B.replace("q_", "k_"): torch.zeros(32, 4)}),
        "target_modules does not name model.layers.1.self_attn.k_proj, and peft would pass over it",
    ),
    "magnitudes": (lambda t: t.update({f"{Q1}.lora_magnitude_vector": torch.ones(64)}), "expected lora_A, lora_B of"),
    "no-saved-module": (lambda t: t.pop("base_model.model.lm_head.weight"), "modules_to_save names lm_head, and"),
    "twice": (lambda t: t.update({f"{Q1}.lora_A.default.weight": t[A].clone()}), "are one tensor: expected it once"),
    "two-ways": (
        lambda t: t.update({A.replace(".model.model.", ".model."): t[A].clone()}),
        "are one tensor, model.layers.1.self_attn.q_proj.weight: expected it once",
    ),
    "dtype": (lambda t: t.update({A: t[A].double()}), f"{A} is torch.float64: float64 weights are not supported"),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_an_adapter_that_does_not_fit_is_refused(case: str, made: Path, adapter: Path) -> None:
    edit, message = REFUSED_TENSORS[case]
    edit_tensors(adapter, edit)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        opened(made / "base", adapter)
    assert str(adapter) in str(error.value)


REFUSED_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication: layers that are there several times"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices: single trained rows"),
    ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters: "),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens: "),
    ({"use_qalora": True}, "use_qalora: "),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: block-diagonal"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes the base's weights too"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq' changes"),
    ({"new_switch": 1}, "new_switch: not known here, and it may change what the adapter does: got 1"),
    ({"r": 0}, "r: expected a positive integer, got 0"),
    ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern: q_proj: expected a positive integer, got '4'"),
    ({"alpha_pattern": {"(": 4}}, "'(' is no regular expression"),
    ({"lora_alpha": None}, "lora_alpha: expected a number, got None"),
    ({"use_dora": True}, "expected lora_A, lora_B, lora_magnitude_vector of model.layers.0.self_attn.q_proj"),
    ({"target_modules": ["q_proj", "k_proj"]}, "target_modules names model.layers.0.self_attn.k_proj of the base"),
    ({"modules_to_save": ["lm_head", "embed_tokens"]}, "modules_to_save names model.embed_tokens, and"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED_CONFIGS, ids=[next(iter(c)) for c, _ in REFUSED_CONFIGS])
def test_a_config_that_is_not_obeyed_is_refused(
    config: dict[str, Any], message: str, made: Path, adapter: Path
) -> None:
    edit_config(adapter, **config)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        opened(made / "base", adapter)
    assert str(adapter) in str(error.value)


@pytest.mark.parametrize("config", [{"new_switch": None}, {"newer": {}}, {"init_lora_weights": "gaussian"}], ids=str)
def test_what_says_nothing_is_harmless(config: dict[str, Any], made: Path, adapter: Path) -> None:
    edit_config(adapter, **config)
    opened(made / "base", adapter)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_change_of_one_of_two_tied_weights_is_refused(target: str, tmp_path: Path) -> None:
    """peft's merged model changes both, its unmerged one that alone."""
    base = make_model(tmp_path / "base", **CONFIGS["qwen3"])
    make_adapter(tmp_path / "adapter", base, r=4, target_modules=["q_proj", target])
    with pytest.raises(CheckpointError, match=rf"{target}.*: tie_word_embeddings is true, and the adapter changes one"):
        opened(tmp_path / "base", tmp_path / "adapter")


def test_files_that_are_no_adapter(made: Path, adapter: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: damaged or not a safetensors file"):
        opened(made / "base", adapter)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: pickled weights are refused"):
        opened(made / "base", adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: no such file; an adapter needs it"):
        opened(made / "base", adapter)
