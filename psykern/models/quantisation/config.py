"""Which format a model folder's weights are in, and its settings: ``quantization_config`` of ``config.json``.

What is not handled is refused by name: other formats, bits that they have not, and activations or keys and values that
are quantised too, which makes another function of the model. Two formats whose models are known by their weights are
dequantised all the same, fine-grained FP8 and bitsandbytes' int8: their activations are rounded on the way alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from psykern.models.checkpoint import LEGACY_CONFIGS, read_config, read_object
from psykern.models.fields import Fields
from psykern.models.quantisation.awq import Awq
from psykern.models.quantisation.bitsandbytes import FourBits, Int8
from psykern.models.quantisation.compressed import Packed, Sharing, Strategy, Unpacked
from psykern.models.quantisation.fp8 import BlockFp8
from psykern.models.quantisation.gptq import Gptq
from psykern.models.quantisation.scheme import Scheme

_UNPACKED = ("int-quantized", "float-quantized", "naive-quantized")
_GPTQ_BITS, _PACKED_BITS = (2, 3, 4, 8), (2, 4, 8)


def read_scheme(folder: Path) -> tuple[Scheme | None, bool]:
    """Of a model folder; None: its weights are plain. True: its ``config.json`` says so itself, and not a file beside
    it, as early AutoGPTQ and AutoAWQ wrote, which may be left from elsewhere. Raises :class:`CheckpointError` for a
    format that is not handled."""
    config = read_config(folder)
    nested = config.get("text_config")
    for values in (config, nested if isinstance(nested, dict) else {}):
        if said := values.get("quantization_config"):
            name = f"{folder / 'config.json'}: quantization_config"
            if not isinstance(said, dict):
                raise Fields({}, name).error(f"expected an object, got {said!r:.80}")
            return _scheme(Fields(said, name), said.get("quant_method")), True
    for file, method in LEGACY_CONFIGS.items():
        if (path := folder / file).is_file():
            renamed = {
                {"w_bit": "bits", "q_group_size": "group_size"}.get(k, k): v for k, v in read_object(path).items()
            }
            return _scheme(Fields(renamed, str(path)), renamed.get("quant_method", method)), False
    return None, False


def _scheme(c: Fields, method: object) -> Scheme:
    if method is None and (c.get("load_in_4bit") or c.get("load_in_8bit")):
        method = "bitsandbytes"  # before it had a name
    match method:
        case "bitsandbytes":
            return _bitsandbytes(c)
        case "gptq":
            return _gptq(c)
        case "awq":
            return _awq(c)
        case "compressed-tensors":
            return _compressed(c)
        case "fp8":
            return _fp8(c)
    handled = "bitsandbytes, gptq, awq, compressed-tensors, fp8"
    raise c.error(
        f"quant_method: quantised weights of this format are not supported: expected {handled}, got {method!r:.80}"
    )


def _bitsandbytes(c: Fields) -> Scheme:
    if c.boolean("load_in_8bit"):
        return Int8()
    if not c.boolean("load_in_4bit"):
        raise c.error("load_in_4bit, load_in_8bit: expected one of them to be true")
    kind = c.get("bnb_4bit_quant_type", "fp4")
    return FourBits(_one_of(c, "bnb_4bit_quant_type", kind, ("nf4", "fp4")))


def _gptq(c: Fields) -> Scheme:
    form = c.get("checkpoint_format") or c.get("format") or "gptq"
    _one_of(c, "checkpoint_format", form, ("gptq", "gptq_v2"))
    if c.get("is_marlin_format"):
        raise c.error("is_marlin_format: the layout of Marlin's kernels is not supported")
    bits = _one_of(c, "bits", c.get("bits"), _GPTQ_BITS)
    for module, rule in (c.mapping("dynamic") or {}).items():
        for key in ("bits", "group_size", "format", "checkpoint_format", "method", "quant_method"):
            if isinstance(rule, dict) and rule.get(key, c.get(key)) != c.get(key):
                raise c.error(f"dynamic: {module!r:.80} has another {key} than the rest, which is not supported")
    return Gptq(bits, _group_size(c, 128), c.boolean("desc_act"), is_less_one=form == "gptq")


def _awq(c: Fields) -> Scheme:
    version = str(c.get("version") or c.get("format") or "gemm").lower()
    _one_of(c, "version", version, ("gemm",))
    _one_of(c, "bits", c.get("bits", 4), (4,))
    if not c.get("zero_point", True):
        raise c.error("zero_point: expected true, got false")
    return Awq(_group_size(c, 128))


def _fp8(c: Fields) -> Scheme:
    _one_of(c, "activation_scheme", c.get("activation_scheme", "dynamic"), ("dynamic",))
    _one_of(c, "fmt", c.get("fmt", "e4m3"), ("e4m3",))
    return BlockFp8(_block(c, "weight_block_size"))


def _compressed(c: Fields) -> Scheme:
    for key in ("kv_cache_scheme", "transform_config"):
        if c.get(key):
            raise c.error(f"{key}: expected none, as it makes another function of the model, got {c.get(key)!r:.80}")
    sparsity = c.mapping("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise c.error(f"sparsity_config: expected format 'dense', got {sparsity.get('format')!r:.80}")
    _one_of(c, "quantization_status", c.get("quantization_status", "compressed"), ("compressed",))
    groups = c.mapping("config_groups")
    if not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise c.error(f"config_groups: expected an object of objects, got {groups!r:.80}")
    schemes = [
        _group(Fields(group, f"{c.name}: config_groups: {name}"), c.get("format")) for name, group in groups.items()
    ]
    if any(other != schemes[0] for other in schemes):
        raise c.error(f"config_groups: expected one way for all weights, got {len(groups)} that differ")
    return schemes[0]


def _group(c: Fields, default: object) -> Scheme:
    """Of one of the groups of modules."""
    for key in ("input_activations", "output_activations"):
        if c.get(key):
            raise c.error(f"{key}: quantised activations are not supported: expected weights alone to be quantised")
    form: str = _one_of(c, "format", c.get("format") or default, ("pack-quantized", *_UNPACKED))
    w = Fields(c.mapping("weights") or {}, f"{c.name}: weights")
    kind = _one_of(w, "type", w.get("type", "int"), ("int", "float"))
    if w.get("dynamic"):
        raise w.error(f"dynamic: expected false, got {w.get('dynamic')!r}")
    is_symmetric, sharing = w.or_else({"symmetric": True}).boolean("symmetric"), _sharing(w)
    if form != "pack-quantized":
        _one_of(w, "num_bits", w.get("num_bits", 8), (8,))
        if w.get("actorder") == "group":
            raise w.error("actorder: expected none, as the weights are not packed, got 'group'")
        return Unpacked(form, kind, sharing, is_symmetric)
    bits = _one_of(w, "num_bits", w.get("num_bits", 8), _PACKED_BITS)
    has_order = w.get("actorder") == "group"
    if kind != "int" or sharing.strategy == "block" or (has_order and sharing.strategy != "group"):
        raise w.error(
            "type, strategy, actorder: expected int by tensor, channel or group, and an order of groups alone, got "
            f"{kind} by {sharing.strategy}, {w.get('actorder')!r}"
        )
    return Packed(bits, sharing, is_symmetric, has_order)


def _sharing(w: Fields) -> Sharing:
    size, strategy = w.get("group_size"), w.get("strategy")
    if strategy is None:  # as compressed-tensors takes it then
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = _one_of(w, "strategy", strategy, get_args(Strategy))
    if strategy == "group":
        return Sharing("group", (1, w.positive("group_size")))
    return Sharing(strategy, _block(w, "block_structure") if strategy == "block" else None)


def _group_size(c: Fields, usual: int) -> int:
    return -1 if c.get("group_size") == -1 else c.positive("group_size", usual)


def _block(c: Fields, key: str) -> tuple[int, int]:
    """Rows and columns."""
    size = c.get(key)
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise c.error(f"{key}: expected two positive integers, got {size!r:.80}")
    return size[0], size[1]


def _one_of(c: Fields, key: str, value: Any, handled: tuple[Any, ...]) -> Any:
    if value not in handled or type(value) is not type(handled[0]):  # 4.0 and True are no numbers of bits
        raise c.error(f"{key}: expected {' or '.join(map(repr, handled))}, got {value!r:.80}")
    return value
