"""Decoder-only transformers of the study's families, described by a small table and computed one layer at a time.

``ModelConfig`` reads ``config.json``; ``Model`` hands out the weights of one layer; ``decoder_layer`` computes that
layer for one batch of a wave. There is one decoder: the families differ in where norms stand, in biases, in rotary
embeddings and in sliding windows, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from psykern import kernels
from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import Checkpoint, read_config, widen
from psykern.models.slots import Layout, Slots, free_bytes

_RESIDENT_SHARE = 0.7  # of the free memory: weights beyond that are streamed, the rest is for waves
_STREAMED_SLOTS = 2  # one is computed with while the other is filled


@dataclass(frozen=True, slots=True)
class Family:
    """How one ``model_type`` differs. A bias is there always, never, or as a key of ``config.json`` says."""

    norm_after: bool = False  # norms stand after the sublayers (OLMo), not before them
    qk_norm: Literal["none", "head", "projection"] = "none"
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    window_switch: str | None = None  # key that turns sliding windows on; None: never
    full_every: int | None = None  # where `layer_types` is absent: every n-th layer has no window
    scaled_rope_layers: Literal["all", "full_attention"] = "all"  # layers that old-style `rope_scaling` applies to
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of absent keys, beside _DEFAULTS


# What absent keys of `config.json` mean in every family that does not say otherwise: transformers' own defaults.
_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "qwen2": Family(qkv_bias=True, window_switch="use_sliding_window", defaults=_QWEN_DEFAULTS),
    "qwen3": Family(
        qk_norm="head",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        window_switch="use_sliding_window",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    "olmo2": Family(
        norm_after=True,
        qk_norm="projection",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        defaults={"rms_norm_eps": 1e-5},
    ),
    "olmo3": Family(
        norm_after=True,
        qk_norm="projection",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        window_switch="sliding_window",
        full_every=4,
        scaled_rope_layers="full_attention",
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500_000.0},
    ),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary angles: position times ``inverse_frequencies``, cosines and sines times ``scale``."""

    inverse_frequencies: tuple[float, ...]  # [Dh/2]
    scale: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a ``config.json`` that the forward pass needs."""

    model_type: str
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]  # [layers] sliding window in tokens, None: all earlier tokens are seen
    ropes: tuple[Rope, ...]  # [layers]

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """From ``folder/config.json``. Raises ``CheckpointError`` for what psykern does not know how to compute."""
        return parse_config(read_config(folder), str(folder / "config.json"))


def parse_config(config: Mapping[str, Any], name: str) -> ModelConfig:
    """``ModelConfig`` of a parsed ``config.json``; ``name`` is used in errors."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"{name}: model_type: expected one of {', '.join(FAMILIES)}, got {model_type!r}")
    family = FAMILIES[model_type]
    config = {**_DEFAULTS, **family.defaults, **config}
    sizes = {}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        sizes[key] = _positive(config, key, name)
    num_heads = sizes["num_attention_heads"]
    num_kv_heads = _positive(config, "num_key_value_heads", name, default=num_heads)
    head_dim = _positive(config, "head_dim", name, default=sizes["hidden_size"] // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"{name}: head_dim: expected an even number, as pairs are rotated, got {head_dim}")
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{name}: {num_heads} attention heads are not a multiple of {num_kv_heads} key heads")
    if config["hidden_act"] != "silu":
        raise CheckpointError(f"{name}: hidden_act: expected 'silu', got {config['hidden_act']!r}")
    if config.get("quantization_config"):
        raise CheckpointError(f"{name}: quantization_config: quantised weights are not supported")
    layer_types = _layer_types(config, family, sizes["num_hidden_layers"], name)
    max_positions = _positive(config, "max_position_embeddings", name)
    ropes = {kind: _rope(config, family, kind, head_dim, max_positions, name) for kind in set(layer_types)}

    def has(bias: bool | str) -> bool:
        return _boolean(config, bias, name) if isinstance(bias, str) else bias

    window = config.get("sliding_window")
    return ModelConfig(
        model_type=model_type,
        family=family,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(config, "rms_norm_eps", name),
        max_positions=max_positions,
        tied_head=_boolean(config, "tie_word_embeddings", name),
        qkv_bias=has(family.qkv_bias),
        o_bias=has(family.o_bias),
        mlp_bias=has(family.mlp_bias),
        windows=tuple(window if kind == "sliding_attention" else None for kind in layer_types),
        ropes=tuple(ropes[kind] for kind in layer_types),
    )


def _positive(config: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"{name}: {key}: expected a positive integer, got {value!r:.80}")
    return value


def _number(config: Mapping[str, Any], key: str, name: str) -> float:
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"{name}: {key}: expected a number, got {value!r}")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str, name: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{name}: {key}: expected true or false, got {value!r}")
    return value


def _layer_types(config: Mapping[str, Any], family: Family, num_layers: int, name: str) -> list[str]:
    """'sliding_attention' or 'full_attention' for each layer."""
    if family.window_switch is None or not config.get(family.window_switch) or config.get("sliding_window") is None:
        return ["full_attention"] * num_layers
    _positive(config, "sliding_window", name)
    layer_types = config.get("layer_types")
    if layer_types is None and family.full_every is not None:
        layer_types = [
            "full_attention" if (i + 1) % family.full_every == 0 else "sliding_attention" for i in range(num_layers)
        ]
    elif layer_types is None:
        first = _number(config, "max_window_layers", name)
        layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or any(t not in kinds for t in layer_types):
        raise CheckpointError(
            f"{name}: layer_types: expected {num_layers} of {' or '.join(kinds)}, got {layer_types!r:.80}"
        )
    return list(layer_types)


def _rope(
    config: Mapping[str, Any], family: Family, layer_type: str, head_dim: int, max_positions: int, name: str
) -> Rope:
    """The rotary embedding of one kind of layer, from ``rope_parameters`` (new) or ``rope_theta`` and
    ``rope_scaling`` (old)."""
    new, old = (_mapping(config, key, name) for key in ("rope_parameters", "rope_scaling"))
    parameters: dict[str, Any] = {"rope_theta": config["rope_theta"]}
    if new is not None:
        parameters |= _mapping(new, layer_type, name) or new
    elif old is not None and family.scaled_rope_layers in ("all", layer_type):
        parameters |= old
    if (parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError(f"{name}: partial_rotary_factor: only 1.0 is supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_NEEDS:
        raise CheckpointError(f"{name}: rope_type: expected {', '.join(_ROPE_NEEDS)}, got {kind!r}")
    original = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    parameters["original_max_position_embeddings"] = original or max_positions
    for key in _ROPE_NEEDS[kind]:
        if key not in parameters:
            raise CheckpointError(f"{name}: rope_type {kind!r} needs {key}")
        _number(parameters, key, name)

    theta, scale = _number(parameters, "rope_theta", name), 1.0
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    frequencies = 1.0 / wavelengths
    if kind == "linear":
        frequencies = frequencies / parameters["factor"]
    elif kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, parameters)
    elif kind == "yarn":
        frequencies, scale = _yarn_frequencies(wavelengths, theta, head_dim, parameters)
    return Rope(tuple(frequencies.tolist()), scale)


# The kinds of rotary embedding, and the parameters that they cannot do without.
_ROPE_NEEDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def _mapping(config: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any] | None:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{name}: {key}: expected an object, got {value!r}")
    return value


def _llama3_frequencies(frequencies: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated (Llama 3.1)."""
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    original = p["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    stretched = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(is_between, between, stretched)


def _yarn_frequencies(wavelengths: Tensor, theta: float, head_dim: int, p: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Frequencies interpolated by a ramp over the dimensions, and the attention factor (Peng et al. 2023, arXiv
    2309.00071)."""
    factor, original = p["factor"], p["original_max_position_embeddings"]

    def attention_scale(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    scale = p.get("attention_factor")
    if scale is None and p.get("mscale") and p.get("mscale_all_dim"):
        scale = attention_scale(p["mscale"]) / attention_scale(p["mscale_all_dim"])
    elif scale is None:
        scale = attention_scale()

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return (1 / (factor * wavelengths)) * (1 - kept) + (1 / wavelengths) * kept, float(scale)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a checkpoint of ``config``, as ``transformers`` names them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linear = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms: dict[str, tuple[int, ...]] = {"post_attention_layernorm": (hidden,)}
    norms["post_feedforward_layernorm" if config.family.norm_after else "input_layernorm"] = (hidden,)
    if config.family.qk_norm != "none":
        per_head = config.family.qk_norm == "head"
        norms["self_attn.q_norm"] = (config.head_dim if per_head else queries,)
        norms["self_attn.k_norm"] = (config.head_dim if per_head else keys,)
    for i in range(config.num_layers):
        for part, (rows, columns, bias) in linear.items():
            shapes[f"model.layers.{i}.{part}.weight"] = (rows, columns)
            if bias:
                shapes[f"model.layers.{i}.{part}.bias"] = (rows,)
        for part, shape in norms.items():
            shapes[f"model.layers.{i}.{part}.weight"] = shape
    return shapes


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer's weights in the compute dtype, by their names within the layer, and its window and rotary tables."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    window: int | None
    cos: Tensor  # [P, Dh/2] fp32
    sin: Tensor  # [P, Dh/2] fp32
    is_fused: bool  # qkv_proj, kv_proj and gate_up_proj are there, and used

    def linear(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """x [N, in] to ``out`` [N, out]."""
        weight, bias = self.tensors[f"{name}.weight"].T, self.tensors.get(f"{name}.bias")
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)

    def add_linear(self, name: str, x: Tensor, total: Tensor) -> None:
        """Adds the image of x [N, in] to ``total`` [N, out]."""
        torch.addmm(total, x, self.tensors[f"{name}.weight"].T, out=total)
        if (bias := self.tensors.get(f"{name}.bias")) is not None:
            total.add_(bias)

    def norm(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"]


class Model:
    """A checkpoint opened for scoring: weights are handed out one layer at a time.

    On a CPU the layers are the mapped file itself, or one layer's copy where they are stored in another dtype. On a
    device they are in slots (:mod:`.slots`), all at once where they fit beside the embedding and the head.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, num_slots: int | None = None) -> None:
        """``num_slots``: layers that are held at once; None: on a device as many as fit, on a CPU none where the
        stored dtype is ``dtype``. Raises ``CheckpointError`` where the folder's config, tensors or shapes are not as
        they must be.
        """
        self.config = ModelConfig.read(folder)
        self.device = device
        self.dtype = dtype
        self._checkpoint = Checkpoint.open(folder)
        optional = ["*.rotary_emb.inv_freq", *(["lm_head.weight"] if self.config.tied_head else [])]
        shapes = expected_tensors(self.config)
        self._checkpoint.check(shapes, optional)
        prefix = "model.layers.0."
        self._shapes = {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}
        self._tables: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._outside: dict[str, Tensor] = {}  # embedding, head and final norm on a device
        self.is_fused = device.type != "cpu" or num_slots is not None  # on a CPU two products are as fast as one
        self._slots = self._make_slots(num_slots)
        if device.type != "cpu":  # now, so that what is free afterwards is free
            for name in shapes:
                if not name.startswith("model.layers."):
                    self._on_device(name)

    def _make_slots(self, num_slots: int | None) -> Slots | None:
        on_cpu = self.device.type == "cpu"
        if num_slots is None and on_cpu and all(t.dtype == self.dtype for t in self._stored(0).values()):
            return None
        layout = Layout.of(self._shapes)
        if num_slots is None and on_cpu:
            num_slots = 1
        elif num_slots is None:
            outside = ("model.embed_tokens.weight", "lm_head.weight")
            stored = (self._checkpoint.tensor(name) for name in outside if name in self._checkpoint.names)
            needed = sum(tensor.numel() * self._dtype_on_device(tensor).itemsize for tensor in stored)
            needed += layout.size * self.dtype.itemsize * self.config.num_layers
            free = free_bytes(self.device) or 0
            num_slots = self.config.num_layers if needed <= _RESIDENT_SHARE * free else _STREAMED_SLOTS
        # No method as the source: slots that hold their model keep a device's memory until a garbage collection.
        return Slots(
            partial(_stored_layer, self._checkpoint, tuple(self._shapes)),
            layout,
            num_layers=self.config.num_layers,
            num_slots=num_slots,
            device=self.device,
            dtype=self.dtype,
        )

    def _stored(self, index: int) -> dict[str, Tensor]:
        return _stored_layer(self._checkpoint, self._shapes, index)

    @property
    def is_resident(self) -> bool:
        """All layers stay where they are computed with: nothing is copied for a further wave."""
        return self._slots is None or self._slots.is_resident

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] token ids on the model's device to [N, D] in the compute dtype."""
        return self._on_device("model.embed_tokens.weight")[token_ids.long()].to(self.dtype)

    def layer(self, index: int, num_positions: int) -> Layer:
        """Layer ``index`` with rotary tables for at least ``num_positions`` positions.

        Its tensors are valid until the next layer is asked for: that one may take their place.
        """
        cos, sin = self._rotary_tables(self.config.ropes[index], num_positions)
        tensors = self._stored(index) if self._slots is None else self._slots.layer(index)
        return Layer(self.config, tensors, self.config.windows[index], cos, sin, self.is_fused)

    def final_norm(self, hidden: Tensor, backend: kernels.Backend) -> Tensor:
        weight = widen(self._on_device("model.norm.weight"), self.dtype)
        return kernels.add_rms_norm(hidden, None, weight, self.config.rms_norm_eps, backend=backend)[0]

    def head(self) -> Tensor:
        """The head's weight [V, D], on a CPU in the checkpoint's own dtype: ``option_logprobs`` widens it by tiles."""
        return self._on_device("model.embed_tokens.weight" if self.config.tied_head else "lm_head.weight")

    def non_finite_tensors(self, layer: int) -> list[str]:
        """Names of the tensors of one layer that hold a NaN or an infinity; layer -1: those outside the layers."""
        prefix = f"model.layers.{layer}."
        names = [
            n for n in expected_tensors(self.config) if (n.startswith(prefix) if layer >= 0 else "layers" not in n)
        ]
        return [n for n in names if not torch.isfinite(self._checkpoint.tensor(n)).all()]

    def _on_device(self, name: str) -> Tensor:
        """A tensor outside the layers: on a CPU as it is stored, to a device copied once."""
        stored = self._checkpoint.tensor(name)
        if self.device.type == "cpu":
            return stored
        if name not in self._outside:
            self._outside[name] = stored.to(self.device, self._dtype_on_device(stored))
        return self._outside[name]

    def _dtype_on_device(self, stored: Tensor) -> torch.dtype:
        """Of a tensor outside the layers. Tensor cores multiply half precision with its like alone; fp32 takes either,
        and a head in half precision is half the bytes."""
        return stored.dtype if self.dtype == torch.float32 else self.dtype

    def _rotary_tables(self, rope: Rope, num_positions: int) -> tuple[Tensor, Tensor]:
        tables = self._tables.get(rope)
        if tables is None or len(tables[0]) < num_positions:
            # Twice as many as before: each time the host waits for the device.
            rows = max(num_positions, min(self.config.max_positions, 1 << (num_positions - 1).bit_length()))
            frequencies = torch.tensor(rope.inverse_frequencies, device=self.device)
            angles = torch.arange(rows, device=self.device)[:, None].float() * frequencies
            tables = self._tables[rope] = (angles.cos() * rope.scale, angles.sin() * rope.scale)
        return tables


def _stored_layer(checkpoint: Checkpoint, names: Iterable[str], index: int) -> dict[str, Tensor]:
    """Layer ``index`` as the file has it, by the names within a layer."""
    return {name: checkpoint.tensor(f"model.layers.{index}.{name}") for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rows of one batch and what their queries see. Positions and rows are on the model's device; what describes
    the segments stays on the CPU, where a kernel's tiles are planned from it."""

    positions: Tensor  # [n] int32
    store_row: int  # first of the n rows of the key/value store that are this batch's own
    query_rows: Tensor | None  # [m] int64, rows of the batch that need an output; None: all
    query_positions: Tensor  # [m] int32
    segments: kernels.Segments  # of the m queries, on the CPU; its rows are those of the store


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """The arrays between a layer's operations, made once for all batches of a run: a batch takes what it needs."""

    normed: Tensor  # [n, D]
    projected: Tensor  # [n * columns] queries, and where products are fused keys and values too
    inner: Tensor  # [n * 2F] gate and up

    @classmethod
    def make(cls, rows: int, model: Model) -> Workspace:
        config = model.config
        heads = config.num_heads + (2 * config.num_kv_heads if model.is_fused else 0)
        shapes = ((rows, config.hidden_size), (rows * heads * config.head_dim,), (rows * 2 * config.intermediate_size,))
        return cls(*(torch.empty(shape, dtype=model.dtype, device=model.device) for shape in shapes))

    @classmethod
    def grown(cls, work: Workspace | None, rows: int, model: Model) -> Workspace:
        """``work`` itself where it has room for ``rows``, else a new one."""
        return work if work is not None and len(work.normed) >= rows else cls.make(rows, model)

    def project(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] of ``projected``."""
        return self.projected[: rows * columns].view(rows, columns)


def decoder_layer(
    layer: Layer,
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    out: Tensor,
    work: Workspace,
    backend: kernels.Backend,
) -> None:
    """One layer for one batch: hidden [n, D] to ``out`` [m, D], its keys and values into the store's rows.

    keys, values: [M, Hkv, Dh], the store of this layer. ``out`` is ``hidden`` itself where all rows are queries. No
    array of a batch's size is allocated.
    """
    q = _project(layer, hidden, keys, values, batch, work, backend)
    if batch.query_rows is not None:
        torch.index_select(hidden, 0, batch.query_rows, out=out)
        x = _input_norm(layer, out, work, backend)
        q = layer.linear("self_attn.q_proj", x, work.project(len(out), layer.config.num_heads * layer.config.head_dim))
    _attention(layer, q.unflatten(1, (-1, layer.config.head_dim)), out, keys, values, batch, work, backend)
    _mlp(layer, out, work, backend)


def _project(
    layer: Layer, hidden: Tensor, keys: Tensor, values: Tensor, batch: Batch, work: Workspace, backend: kernels.Backend
) -> Tensor:
    """Keys and values of hidden [n, D] into the store, and queries [n, Hq * Dh] where all rows need them.

    One product for all three where the layer is fused; else keys and values are computed where they belong, and
    nothing is copied.
    """
    n, config = len(hidden), layer.config
    own = slice(batch.store_row, batch.store_row + n)
    needs_queries = batch.query_rows is None
    queries, heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    x = _input_norm(layer, hidden, work, backend)
    if layer.is_fused:
        name, first = ("self_attn.qkv_proj", queries) if needs_queries else ("self_attn.kv_proj", 0)
        q = projected = layer.linear(name, x, work.project(n, first + 2 * heads))
        values[own].copy_(projected[:, first + heads :].unflatten(1, values.shape[1:]))
        k = projected[:, first : first + heads].unflatten(1, keys.shape[1:])
    else:
        layer.linear("self_attn.v_proj", x, values[own].flatten(1))
        k = layer.linear("self_attn.k_proj", x, keys[own].flatten(1)).view(keys[own].shape)
        q = work.project(n, queries)
        if needs_queries:
            layer.linear("self_attn.q_proj", x, q)
    _norm_and_rotate(layer, "self_attn.k_norm", k, batch.positions, keys[own], backend)
    return q[:, :queries]


def _attention(
    layer: Layer,
    q: Tensor,
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    work: Workspace,
    backend: kernels.Backend,
) -> None:
    """hidden [m, D] plus attention of q [m, Hq, Dh], in ``hidden``; and their norm, where the MLP takes that."""
    _norm_and_rotate(layer, "self_attn.q_norm", q, batch.query_positions, q, backend)
    kernels.prefix_attention(
        q,
        keys,
        values,
        batch.segments,
        softmax_scale=layer.config.head_dim**-0.5,
        window=layer.window,
        out=q,
        backend=backend,
    )
    attended = layer.linear("self_attn.o_proj", q.flatten(1), work.normed[: len(hidden)])
    _add_norm(layer, "post_attention_layernorm", attended, hidden, backend)


def _mlp(layer: Layer, hidden: Tensor, work: Workspace, backend: kernels.Backend) -> None:
    """hidden [m, D] plus the MLP, in ``hidden``."""
    m, columns = len(hidden), layer.config.intermediate_size
    normed, inner = work.normed[:m], work.inner[: 2 * m * columns]
    x = hidden if layer.config.family.norm_after else normed
    if layer.is_fused:
        gate, up = layer.linear("mlp.gate_up_proj", x, inner.view(m, 2 * columns)).chunk(2, dim=1)
    else:
        gate, up = inner.view(2, m, columns)
        layer.linear("mlp.gate_proj", x, gate)
        layer.linear("mlp.up_proj", x, up)
    kernels.silu_mul(gate, up, out=gate, backend=backend)
    if layer.config.family.norm_after:
        _add_norm(layer, "post_feedforward_layernorm", layer.linear("mlp.down_proj", gate, normed), hidden, backend)
    else:
        layer.add_linear("mlp.down_proj", gate, hidden)


def _input_norm(layer: Layer, hidden: Tensor, work: Workspace, backend: kernels.Backend) -> Tensor:
    """What the projections of queries, keys and values take."""
    if layer.config.family.norm_after:
        return hidden
    weight, normed = layer.norm("input_layernorm"), work.normed[: len(hidden)]
    return kernels.add_rms_norm(hidden, None, weight, layer.config.rms_norm_eps, normed=normed, backend=backend)[0]


def _add_norm(layer: Layer, name: str, x: Tensor, hidden: Tensor, backend: kernels.Backend) -> None:
    """x [m, D] added to ``hidden``, and x becomes the norm of the sum; or x's norm is added (OLMo)."""
    norm_first = layer.config.family.norm_after
    kernels.add_rms_norm(
        x,
        hidden,
        layer.norm(name),
        layer.config.rms_norm_eps,
        norm_first=norm_first,
        normed=x,
        summed=hidden,
        backend=backend,
    )


def _norm_and_rotate(
    layer: Layer, name: str, x: Tensor, positions: Tensor, out: Tensor, backend: kernels.Backend
) -> None:
    """x [n, H, Dh] to ``out``, which may be x."""
    weight = layer.tensors.get(f"{name}.weight")
    kernels.qk_norm_rope(
        x, weight, layer.cos, layer.sin, positions, layer.config.rms_norm_eps, out=out, backend=backend
    )
