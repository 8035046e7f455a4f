"""What is refused with implementation "transformers", by name: each line of what ``psykern models`` says, and more."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.foreign_folders import make_foreign
from support.tiny import build_tiny

import psykern
from psykern.core.errors import CheckpointError
from psykern.listing import REFUSED
from psykern.scoring.language import load_language

TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 300}


def said(**config: Any) -> Callable[[Path], None]:
    """A folder with this config.json alone."""

    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config))

    return make


def bidirectional(folder: Path) -> None:
    make_foreign(folder, **TINY, model_type="bert", vocab_size=300, is_decoder=False)


def pickled(folder: Path) -> None:
    model = make_foreign(folder, **GPT2)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
CASES: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "encoder-decoders (t5, bart, …)": (said(model_type="t5"), "t5 .* expected a causal language model"),
    "models that are not causal (bert, …)": (bidirectional, "bert: its tokens see later ones: expected a causal"),
    "models whose code is in their folder (auto_map)": (
        said(model_type="mine", auto_map=CODE),
        "'mine' .*: its code is in the folder, and is never executed",
    ),
    "a model_type that transformers does not have": (said(model_type="mine"), "'mine' is none of transformers'"),
    "pickled weights (pytorch_model.bin)": (pickled, "pickled weights are refused, because loading them can run code"),
    "quantised weights through transformers": (
        said(**GPT2, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised weights are read with implementation 'native' alone",
    ),
}


def test_all_that_is_said_to_be_refused_is_tried() -> None:
    assert set(CASES) == set(REFUSED)


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path) -> None:
    make, message = CASES[case]
    build_tiny().save(str(tmp_path / "tokenizer.json"))
    make(tmp_path)
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('the code of a folder was run')")
    (tmp_path / "configuration_x.py").write_text("raise SystemExit('the code of a folder was run')")
    with pytest.raises(CheckpointError, match=message) as caught:
        psykern.load(tmp_path, implementation="transformers")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


MORE: Mapping[str, tuple[dict[str, Any], str]] = {  # of config.json, or beside it
    "a kernel of the hub": (
        {"text_config": {"_attn_implementation": "owner/kernel@v1"}},
        "_attn_implementation 'owner/kernel@v1': code from the hub is never executed; remove the key",
    ),
    "an adapter beside the weights": ({"adapter": True}, "an adapter beside the weights is not applied"),
}


@pytest.mark.parametrize("case", MORE)
def test_what_the_library_would_take_silently(case: str, tmp_path: Path) -> None:
    more, message = MORE[case]
    make_foreign(tmp_path, **GPT2)
    build_tiny().save(str(tmp_path / "tokenizer.json"))
    if "adapter" in more:
        # as a model's own, so that the folder is none of an adapter alone
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": []}))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(CheckpointError, match=message):
        psykern.load(tmp_path, implementation="transformers")


# What the native implementation refuses, and whether the error points to transformers' modules.
NATIVE: Mapping[str, tuple[dict[str, Any], bool]] = {
    "unknown here": (GPT2, True),
    "a refused variant": ({"model_type": "llama", **TINY, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, True),
    "unknown anywhere": ({"model_type": "mine"}, False),
    "an encoder": ({"model_type": "t5"}, False),
    "quantised": ({**GPT2, "quantization_config": {"quant_method": "gptq", "bits": 4}}, False),
    "no config": ({"vocab_size": 300}, False),
}


@pytest.mark.parametrize("case", NATIVE)
def test_the_native_error_points_to_transformers_where_that_could_work(case: str, tmp_path: Path) -> None:
    config, could = NATIVE[case]
    build_tiny().save(str(tmp_path / "tokenizer.json"))
    said(**config)(tmp_path)
    for use in (psykern.load, load_language):
        with pytest.raises(CheckpointError) as caught:
            use(tmp_path)
        assert ("--implementation transformers" in str(caught.value)) == could
    if could:
        spec, _ = load_language(tmp_path, implementation="transformers")
        assert spec.num_layers == 1
