"""Configs against what transformers makes of the same file, tensor names against its models, and one layer alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import CONFIGS, LLAMA3_ROPE, YARN_ROPE, make_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from psykern.core.errors import CheckpointError
from psykern.kernels import Backend, Segments
from psykern.kernels.compute import Compute
from psykern.models.batch import Batch, LayerState, Scratch
from psykern.models.families import FAMILIES, read_spec
from psykern.models.model import Model
from psykern.models.rope import Rope
from psykern.models.spec import ModelSpec

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def write(folder: Path, absent: str | None = None, **config: Any) -> Path:
    """SIZES and ``config`` as config.json, without the key ``absent``."""
    keys = {key: value for key, value in (SIZES | config).items() if key != absent}
    (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    return folder


def read_both(folder: Path, absent: str | None = None, **config: Any) -> tuple[ModelSpec, PreTrainedConfig]:
    """The same config.json as psykern and as transformers read it."""
    write(folder, absent, **config)
    return read_spec(folder), AutoConfig.from_pretrained(folder)


def rotary_of(config: PreTrainedConfig, layer_type: str) -> tuple[Tensor, float]:
    """Inverse frequencies and attention scaling of transformers' own module for layers of this type."""
    name = config.model_type
    modeling = import_module(f"transformers.models.{name}.modeling_{name}")
    module = getattr(modeling, f"{name.capitalize()}RotaryEmbedding")(config)
    prefix = f"{layer_type}_" if hasattr(module, f"{layer_type}_inv_freq") else ""
    return getattr(module, f"{prefix}inv_freq"), getattr(module, f"{prefix}attention_scaling")


def ropes_of(spec: ModelSpec) -> tuple[Rope, ...]:
    return tuple(layer.mixer.rope for layer in spec.layers)


def windows_of(spec: ModelSpec) -> list[int | None]:
    return [layer.mixer.window for layer in spec.layers]


def assert_rope(rope: Rope, frequencies: Tensor, scale: float) -> None:
    torch.testing.assert_close(torch.tensor(rope.inverse_frequencies), frequencies, rtol=1e-6, atol=0)
    assert rope.scale == pytest.approx(scale, rel=1e-7)


# --- rotary embeddings

OLD_LLAMA3 = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
OLD_YARN = {k: v for k, v in YARN_ROPE.items() if k != "rope_theta"}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": OLD_LLAMA3,
    "llama3-of-Llama-3.1": OLD_LLAMA3 | {"original_max_position_embeddings": 1024},
    "llama3-low-freq-2": OLD_LLAMA3 | {"low_freq_factor": 2.0, "factor": 32.0},
    "yarn": OLD_YARN,
    "yarn-own-attention-factor": {k: v for k, v in OLD_YARN.items() if k != "attention_factor"},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-not-truncated": OLD_YARN | {"truncate": False},
    "yarn-factor-1": {"rope_type": "yarn", "factor": 1.0},
    "yarn-of-Qwen2.5": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
}
each_rope = pytest.mark.parametrize("parameters", ROPES.values(), ids=ROPES)
THETA = 500_000.0


@each_rope
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "olmo2"])
@pytest.mark.parametrize("style", ["old", "new"])
def test_rope_equals_transformers(style: str, model_type: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    """Old: rope_theta beside rope_scaling. New: rope_parameters with both."""
    if style == "old":
        rope: dict[str, Any] = {"rope_theta": THETA, "rope_scaling": parameters}
    else:
        rope = {"rope_parameters": parameters | {"rope_theta": THETA}}
    spec, theirs = read_both(tmp_path, model_type=model_type, **rope)
    (ours,) = set(ropes_of(spec))
    assert_rope(ours, *rotary_of(theirs, "full_attention"))
    if parameters["rope_type"] != "default":  # transformers' table of functions has no entry for it
        assert_rope(ours, *ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, CPU))


@each_rope
def test_old_and_new_style_are_one_rope(parameters: dict[str, Any], tmp_path: Path) -> None:
    old = {"rope_theta": THETA, "rope_scaling": parameters}
    older = {"rope_theta": THETA, "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in parameters.items()}}
    new = {"rope_parameters": parameters | {"rope_theta": THETA}}
    ropes = {ropes_of(read_spec(write(tmp_path, model_type="qwen2", **rope))) for rope in (old, older, new)}
    assert len(ropes) == 1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": THETA, "rope_scaling": OLD_YARN},
        {"rope_theta": THETA, "rope_scaling": None},
        {
            "rope_parameters": {
                "full_attention": YARN_ROPE | {"rope_theta": THETA},
                "sliding_attention": {"rope_type": "default", "rope_theta": THETA},
            }
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 2e5, "factor": 3.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ],
    ids=["old-yarn", "old-default", "nested-yarn", "nested-two-thetas"],
)
def test_olmo3_scales_its_full_layers_only(rope: dict[str, Any], tmp_path: Path) -> None:
    spec, theirs = read_both(tmp_path, model_type="olmo3", sliding_window=16, **rope)
    assert theirs.layer_types == ["sliding_attention"] * 3 + ["full_attention"] + theirs.layer_types[4:]
    for i, kind in enumerate(theirs.layer_types):
        assert_rope(ropes_of(spec)[i], *rotary_of(theirs, kind))


def test_original_length_beside_the_rope_goes_before_that_within(tmp_path: Path) -> None:
    spec, theirs = read_both(
        tmp_path, model_type="llama", original_max_position_embeddings=128, rope_theta=THETA, rope_scaling=OLD_LLAMA3
    )
    assert_rope(ropes_of(spec)[0], *rotary_of(theirs, "full_attention"))


@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_rotary_tables_equal_transformers_and_grow(name: str, tmp_path: Path) -> None:
    """The tables of a layer: asked for few positions, then for more, then for few again."""
    oracle = make_model(tmp_path, model_type="llama", rope_parameters=ROPES[name] | {"rope_theta": THETA})
    model = Model(tmp_path, Compute.resolve("cpu"))
    for num_positions in (5, 300, 7):
        cos, sin = model.layer(1, num_positions).mixer.rotary
        assert len(cos) >= num_positions
        expected = oracle.model.rotary_emb(torch.zeros(1), torch.arange(len(cos))[None])
        for table, theirs in zip((cos, sin), expected, strict=True):
            torch.testing.assert_close(table, theirs[0, :, : cos.shape[1]], rtol=0, atol=1e-6)


# --- sliding windows


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 8},
        {"use_sliding_window": True, "sliding_window": 16},  # 28 layers without a window
        {"use_sliding_window": True, "sliding_window": 16, "num_hidden_layers": 30},
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
        },
    ],
    ids=["absent", "off", "null", "all", "from-3", "none", "from-28-of-8", "from-28-of-30", "layer-types"],
)
def test_qwen_windows_equal_transformers(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    assert_windows(*read_both(tmp_path, model_type=model_type, **config))


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window": 16},
        {"sliding_window": 16, "num_hidden_layers": 3},  # not one full layer
        {"sliding_window": 16, "layer_types": ["full_attention", *["sliding_attention"] * 6, "full_attention"]},
        {"sliding_window": 16, "layer_types": ["full_attention"] * 8},
    ],
    ids=["every-fourth", "three-layers", "layer-types", "all-full"],
)
def test_olmo3_windows_equal_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    assert_windows(*read_both(tmp_path, model_type="olmo3", **config))


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_families_without_windows_have_none(model_type: str, tmp_path: Path) -> None:
    spec, _ = read_both(tmp_path, model_type=model_type, sliding_window=16, use_sliding_window=True)
    assert windows_of(spec) == [None] * 8


def assert_windows(spec: ModelSpec, theirs: PreTrainedConfig) -> None:
    assert windows_of(spec) == [theirs.sliding_window if t == "sliding_attention" else None for t in theirs.layer_types]


# --- sizes, defaults, tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_config_and_tensors_equal_transformers(name: str, tmp_path: Path) -> None:
    """As transformers saves them: sizes, windows, ropes; names and shapes of all tensors but a tied head."""
    oracle = make_model(tmp_path, **CONFIGS[name])
    theirs = oracle.config
    spec = read_spec(tmp_path)
    layer_types = getattr(theirs, "layer_types", None) or ["full_attention"] * theirs.num_hidden_layers
    assert windows_of(spec) == [theirs.sliding_window if t == "sliding_attention" else None for t in layer_types]
    assert spec.num_layers == theirs.num_hidden_layers
    for rope, kind in zip(ropes_of(spec), layer_types, strict=True):
        assert_rope(rope, *rotary_of(theirs, kind))
    assert spec.has_tied_head == theirs.tie_word_embeddings
    assert {spec.eps, *(eps for layer in spec.layers for eps in (layer.norms.eps, layer.mixer.eps))} == {
        theirs.rms_norm_eps
    }
    assert spec.max_positions == theirs.max_position_embeddings
    tied = {"lm_head.weight"} if theirs.tie_word_embeddings else set()
    tensors = {n: tuple(t.shape) for n, t in oracle.state_dict().items() if n not in tied}
    assert spec.tensors() == tensors


READ_AS: dict[str, tuple[Callable[[ModelSpec], object], Callable[[PreTrainedConfig], object]]] = {
    "rms_norm_eps": (lambda spec: spec.eps, lambda theirs: theirs.rms_norm_eps),
    "max_position_embeddings": (lambda spec: spec.max_positions, lambda theirs: theirs.max_position_embeddings),
    "tie_word_embeddings": (lambda spec: spec.has_tied_head, lambda theirs: theirs.tie_word_embeddings),
    "attention_bias": (
        lambda spec: spec.layers[0].mixer.o_bias,
        lambda theirs: getattr(theirs, "attention_bias", False),
    ),
    "mlp_bias": (lambda spec: spec.layers[0].ffn.has_bias, lambda theirs: getattr(theirs, "mlp_bias", False)),
    "num_key_value_heads": (lambda spec: spec.layers[0].mixer.num_kv_heads, lambda theirs: theirs.num_key_value_heads),
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("key", READ_AS)
def test_an_absent_key_means_what_transformers_takes_it_for(key: str, model_type: str, tmp_path: Path) -> None:
    spec, theirs = read_both(tmp_path, key, model_type=model_type, num_attention_heads=32)  # 32: Qwen's own default
    mine, wanted = READ_AS[key]
    assert mine(spec) == wanted(theirs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_rope_means_what_transformers_takes_it_for(model_type: str, tmp_path: Path) -> None:
    spec, theirs = read_both(tmp_path, model_type=model_type, sliding_window=16)
    for rope, kind in zip(ropes_of(spec), getattr(theirs, "layer_types", ["full_attention"] * 8), strict=True):
        assert_rope(rope, *rotary_of(theirs, kind))


@pytest.mark.parametrize(
    ("model_type", "switch"), [("olmo3", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 2})]
)
def test_an_absent_window_means_what_transformers_takes_it_for(
    model_type: str, switch: dict[str, Any], tmp_path: Path
) -> None:
    assert_windows(*read_both(tmp_path, model_type=model_type, **switch))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_head_size_means_what_transformers_takes_it_for(model_type: str, tmp_path: Path) -> None:
    """Qwen3's heads have 128 numbers whatever the hidden size, those of the others share it out."""
    spec, theirs = read_both(tmp_path, "head_dim", model_type=model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert spec.layers[0].mixer.q_size == model.model.layers[0].self_attn.q_proj.out_features


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),  # as it is: widened tile by tile, without loss
    ],
    ids=["fp32-in-bf16", "bf16-in-bf16", "bf16-in-fp32"],
)
def test_the_head_of_a_device_is_in_half_precision_where_its_rows_are(
    stored: torch.dtype, dtype: torch.dtype, expected: torch.dtype, tmp_path: Path
) -> None:
    make_model(tmp_path, dtype=stored, **CONFIGS["llama"])
    model = Model(tmp_path, Compute(CPU, dtype, "cpu"))
    assert model.head().dtype == stored
    model.compute = Compute(torch.device("meta"), dtype, "cpu")
    assert model.head().dtype == expected


# --- what is refused


def as_id(config: dict[str, Any]) -> str:
    return json.dumps(config).translate(str.maketrans("", "", '{}"'))[:60]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type: expected one of llama, .*, got 'gpt2'"),
    ({"model_type": None}, "model_type: expected one of llama, .*, got None"),
    ({"model_type": ["llama"]}, "model_type: expected one of llama"),
    ({"vocab_size": None}, "vocab_size: expected a positive integer, got None"),
    ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
    ({"intermediate_size": None}, "intermediate_size: expected a positive integer, got None"),
    ({"num_attention_heads": None}, "num_attention_heads: expected a positive integer, got None"),
    ({"num_hidden_layers": None}, "num_hidden_layers: expected a positive integer, got None"),
    ({"hidden_size": "64"}, "hidden_size: expected a positive integer, got '64'"),
    ({"hidden_size": 64.0}, "hidden_size: expected a positive integer, got 64.0"),
    ({"vocab_size": True}, "vocab_size: expected a positive integer, got True"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, got 0"),
    ({"head_dim": -1}, "head_dim: expected a positive integer, got -1"),
    ({"head_dim": 15}, "head_dim: .*15"),  # a pair of numbers is rotated together
    ({"max_position_embeddings": "4096"}, "max_position_embeddings: expected a positive integer, got '4096'"),
    ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3 key heads"),
    ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quantised weights are not supported"),
    ({"rms_norm_eps": None}, "rms_norm_eps: "),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: "),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: "),
    ({"rope_theta": "high"}, "rope_theta: "),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: expected default, .*, got 'dynamic'"),
    ({"rope_scaling": {"type": "longrope"}}, "rope_type: expected default, .*, got 'longrope'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3' needs low_freq_factor"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' needs factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "four"}}, "factor"),
    ({"rope_scaling": OLD_LLAMA3 | {"factor": "eight"}}, "factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": "four"}}, "factor"),
    ({"rope_scaling": "yarn"}, "rope_scaling: "),
    ({"rope_parameters": ["yarn"]}, "rope_parameters: "),
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type: expected default, .*, got 'dynamic'",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: only 1.0 is supported"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[as_id(config) for config, _ in REFUSED])
def test_a_config_that_cannot_be_computed_names_file_and_key(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_spec(write(tmp_path, **({"model_type": "llama"} | config)))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


REFUSED_WINDOWS: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": ["full_attention"] * 7}, "layer_types: expected 8 of full_attention or sliding_attention"),
    ({"layer_types": ["chunked_attention"] * 8}, "layer_types: expected 8 of full_attention or sliding_attention"),
    ({"layer_types": 8}, "layer_types: expected 8 of full_attention or sliding_attention"),
    ({"sliding_window": "16"}, "sliding_window: expected a positive integer, got '16'"),
    ({"sliding_window": -1}, "sliding_window: expected a positive integer, got -1"),
    ({"max_window_layers": "all"}, "max_window_layers: expected"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED_WINDOWS, ids=[as_id(config) for config, _ in REFUSED_WINDOWS])
def test_windows_that_cannot_be_read_name_file_and_key(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    windowed: dict[str, Any] = {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    }
    with pytest.raises(CheckpointError, match=message) as error:
        read_spec(write(tmp_path, **(windowed | config)))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


# --- a model's parts


def opened(
    folder: Path, dtype: torch.dtype = torch.float32, backend: Backend = "cpu", **config: Any
) -> tuple[Model, PreTrainedModel]:
    """A model and its oracle in fp32; ``dtype`` is that of the saved weights."""
    oracle = make_model(folder, dtype=dtype, **config)
    return Model(folder, Compute.resolve("cpu", backend=backend)), oracle


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model, oracle = opened(tmp_path, **CONFIGS["qwen3"])
    assert torch.equal(model.head(), oracle.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_weights_are_widened_but_the_head(dtype: torch.dtype, tmp_path: Path) -> None:
    model, oracle = opened(tmp_path, dtype, **CONFIGS["llama"])
    ids = torch.tensor([3, 319, 3, 0], dtype=torch.int32)
    assert torch.equal(model.embed(ids), oracle.model.embed_tokens.weight[ids.long()])
    assert {t.dtype for t in model.tensors(0).values()} == {torch.float32}
    assert model.head().dtype == dtype
    assert torch.equal(model.head().float(), oracle.lm_head.weight)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.final_norm(hidden), oracle.model.norm(hidden), rtol=1e-6, atol=1e-6)


def test_each_layer_has_its_own_weights(tmp_path: Path) -> None:
    model, oracle = opened(tmp_path, **CONFIGS["olmo3"])
    for i in range(model.num_layers):
        theirs = oracle.model.layers[i].state_dict()
        mine = model.tensors(i)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 95, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError) as error:
        Model(tmp_path, Compute.resolve("cpu"))
    assert "model.layers.2.mlp.up_proj.weight" in str(error.value)
    assert "model.layers.0.mlp.gate_proj.weight (expected [95, 64], got [96, 64])" in str(error.value)


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_layer_equals_transformers_for_all_rows_and_for_some(name: str, backend: Backend, tmp_path: Path) -> None:
    """Layer 1 on one transcript of 40 tokens that stands behind 3 rows of the store which it does not see."""
    model, oracle = opened(tmp_path, backend=backend, **CONFIGS[name])
    states: list[Tensor] = []
    oracle.model.layers[1].register_forward_hook(lambda _, given, gives: states.extend((given[0], gives)))
    oracle.model(torch.randint(320, (1, 40), generator=torch.Generator().manual_seed(0)), use_cache=False)
    hidden, expected = (state[0] for state in states)  # [40, D]

    for rows in (None, torch.tensor([0, 7, 8, 30, 39]), torch.tensor([39])):
        num_queries = 40 if rows is None else len(rows)
        keys, values = torch.full((2, 43, *model.spec.layers[1].mixer.kv_shape), torch.nan)
        batch = Batch(
            positions=torch.arange(40, dtype=torch.int32),
            store_row=3,
            query_rows=rows,
            query_positions=torch.arange(40, dtype=torch.int32)[slice(None) if rows is None else rows],
            segments=Segments(
                positions=torch.arange(40, dtype=torch.int32)[slice(None) if rows is None else rows],
                query_offsets=torch.tensor([0, num_queries], dtype=torch.int32),
                range_offsets=torch.tensor([0, 1], dtype=torch.int32),
                key_ranges=torch.tensor([[3, 43]], dtype=torch.int32),
            ),
        )
        given = hidden.clone()
        out = given if rows is None else torch.full((num_queries, 64), torch.nan)
        model.layer(1, 40)(given, out, LayerState(keys, values), batch, Scratch.make(40, model))
        torch.testing.assert_close(out, expected if rows is None else expected[rows], rtol=1e-4, atol=1e-4)
        assert keys[:3].isnan().all() and keys[3:].isfinite().all() and values[3:].isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "olmo3", "qwen2"])
def test_a_layer_allocates_no_array_of_its_rows(name: str, tmp_path: Path) -> None:
    """Of 2,000 rows with 64 hidden floats each; what is allocated are scalars of the checks of arguments."""
    model, _ = opened(tmp_path, **CONFIGS[name])
    rows, heads = 2000, model.spec.layers[0].mixer.kv_shape
    layer, scratch, hidden = model.layer(0, rows), Scratch.make(rows, model), torch.randn(rows, 64)
    positions, ends = torch.arange(rows, dtype=torch.int32), torch.tensor([0, rows], dtype=torch.int32)
    segments = Segments(positions, ends, torch.tensor([0, 1], dtype=torch.int32), ends[None])
    batch = Batch(positions=positions, store_row=0, query_rows=None, query_positions=positions, segments=segments)
    keys, values = torch.empty(2, rows, *heads)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(hidden, hidden, LayerState(keys, values), batch, scratch)
    allocated = {event.name: event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 4 * rows}
    assert hidden.isfinite().all() and not allocated


def test_tensors_that_are_not_finite_are_found_by_layer(tmp_path: Path) -> None:
    oracle = make_model(tmp_path, **CONFIGS["llama"])
    with torch.no_grad():
        oracle.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
        oracle.model.norm.weight[0] = torch.nan
    oracle.save_pretrained(tmp_path)
    model = Model(tmp_path, Compute.resolve("cpu"))
    found = [model.non_finite_tensors(layer) for layer in (-1, 0, 1, 2)]
    assert found == [["model.norm.weight"], [], ["model.layers.1.mlp.up_proj.weight"], []]
