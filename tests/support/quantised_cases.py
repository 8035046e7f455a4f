"""Each way in which a weight may be quantised, with its config and its packer, and folders of them to be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from support import quantised
from support.model_folders import SINGLE
from support.quantised import Quantiser
from torch import Tensor

UP, DOWN = "model.layers.0.mlp.up_proj.", "model.layers.1.mlp.down_proj."
SIZES = {"model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "num_hidden_layers": 2}


class Case(NamedTuple):
    config: dict[str, Any]  # quantization_config
    quantiser: Quantiser
    label: str  # in the manifest
    also: tuple[str, ...] = ()  # quantised beside the layers' matrices


def bnb(kind: str, label: str, **how: Any) -> Case:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Case(config, partial(quantised.bitsandbytes_4bit, kind=kind, **how), f"bitsandbytes {label}")


def gptq(bits: int, **how: Any) -> Case:
    form = "gptq_v2" if how.get("version") == 2 else "gptq"
    config = {"quant_method": "gptq", "bits": bits, "group_size": how.get("group", 16), "checkpoint_format": form}
    config["desc_act"] = how.get("shuffled", False)
    return Case(config, partial(quantised.gptq, bits=bits, **how), f"gptq {bits} bits")


def compressed(form: str, weights: dict[str, Any], quantiser: Quantiser, label: str, also: Sequence[str] = ()) -> Case:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme}}
    config |= {"quantization_status": "compressed", "kv_cache_scheme": None, "ignore": ["lm_head"]}
    return Case(config, quantiser, f"compressed-tensors {form}, {label}", tuple(also))


def packed(bits: int, strategy: str, **how: Any) -> Case:
    weights = {"num_bits": bits, "type": "int", "symmetric": how.get("symmetric", True), "strategy": strategy}
    weights |= {"group_size": how.get("group"), "actorder": "group" if how.get("shuffled") else None}
    quantiser = partial(quantised.pack_quantized, bits=bits, **how)
    return compressed("pack-quantized", weights, quantiser, f"{bits} bits, {strategy}", ["lm_head.weight"])


def unpacked(form: str, strategy: str, block: tuple[int, int], **how: Any) -> Case:
    is_float = how["fp8"]
    weights = {"num_bits": 8, "type": "float" if is_float else "int", "strategy": strategy}
    weights |= {"symmetric": how.get("zero") is None, "group_size": block[1], "block_structure": list(block)}
    quantiser = partial(quantised.unpacked, block=block, **how)
    return compressed(form, weights, quantiser, f"{'fp8' if is_float else 'int8'}, {strategy}")


CASES = {
    "nf4": bnb("nf4", "nf4", block=128),
    "nf4-double": bnb("nf4", "nf4, double quantised", double=True),
    "fp4": bnb("fp4", "fp4"),
    "int8": Case(
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        quantised.bitsandbytes_int8,
        "bitsandbytes int8, activations not quantised",
    ),
    "gptq-4": gptq(4),
    "gptq-4-order": gptq(4, shuffled=True, symmetric=False),
    "gptq-2-v2": gptq(2, symmetric=False, version=2),
    "gptq-3-one-group": gptq(3, group=-1, symmetric=False),
    "gptq-8": gptq(8, symmetric=False),
    "awq": Case({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, quantised.awq, "awq 4 bits"),
    "packed-4-group": packed(4, "group", group=16),
    "packed-4-order": packed(4, "group", group=16, shuffled=True, symmetric=False),
    "packed-8-channel": packed(8, "channel", symmetric=False),
    "int-group": unpacked("int-quantized", "group", (1, 16), fp8=False, zero=5),
    "float-channel": unpacked("float-quantized", "channel", (1, -1), fp8=True),
    "naive-tensor": unpacked("naive-quantized", "tensor", (-1, -1), fp8=True),
    "float-block": unpacked("float-quantized", "block", (24, 40), fp8=True),
    "fp8": Case(
        {"quant_method": "fp8", "weight_block_size": [24, 40], "activation_scheme": "dynamic", "fmt": "e4m3"},
        partial(quantised.block_fp8, block=(24, 40)),  # cut at the edges of 32 and of 96
        "fp8 in blocks of 24 x 40, activations not quantised",
    ),
}


def stored(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """The folder with its tensors edited."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)
    return folder


def config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    said = json.loads((folder / "config.json").read_text())
    edit(said)
    (folder / "config.json").write_text(json.dumps(said))
    return folder
