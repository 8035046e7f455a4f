"""Quantised weights that are not as they must be, and formats that are not handled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_model
from support.quantised import quantise
from support.quantised_cases import CASES, SIZES, UP, stored
from torch import Tensor

from psykern.core.errors import CheckpointError
from psykern.models.families import read_spec
from psykern.models.quantisation.config import read_scheme
from psykern.models.weights import open_weights

NF4, GPTQ, AWQ, PACKED, FP8 = "nf4-double", "gptq-4-order", "awq", "packed-4-order", "fp8"
EXPERTS = "model.layers.0.mlp.experts."
STATE = f"{UP}weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Callable[[dict[str, Tensor]], object]:
    """Of one weight of bitsandbytes, with other JSON."""

    def edit(tensors: dict[str, Tensor]) -> None:
        said = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return edit


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def change(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: to(tensors[name]).contiguous()})


def add(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "without-scales": (GPTQ, drop(f"{UP}scales"), rf"{UP}weight: missing scales, has g_idx, qweight, qzeros"),
    "without-order": (GPTQ, drop(f"{UP}g_idx"), "missing g_idx"),
    "without-codes": (AWQ, drop(f"{UP}qweight"), "missing qweight, has qzeros, scales"),
    "without-absmax": (NF4, drop(f"{UP}weight.absmax"), r"missing weight\.absmax"),
    "without-nested": (NF4, drop(f"{UP}weight.nested_absmax"), r"missing weight\.nested_absmax"),
    "without-state": (NF4, drop(STATE), r"missing weight\.quant_state\.bitsandbytes__nf4"),
    "without-all": (NF4, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(f"{UP}weight.")],
                    rf"{UP}weight: missing weight\.quant_map"),
    "without-weight": (FP8, drop(f"{UP}weight"), "missing weight, has weight_scale_inv"),
    "without-scale": (FP8, drop(f"{UP}weight_scale_inv"), "missing weight_scale_inv, has weight"),
    "without-zeros": (PACKED, drop(f"{UP}weight_zero_point"), "missing weight_zero_point"),
    "codes-dtype": (GPTQ, change(f"{UP}qweight", Tensor.long), r"qweight: expected torch\.int32, got torch\.int64"),
    "fp8-dtype": (FP8, change(f"{UP}weight", lambda t: t.float().to(torch.float8_e5m2)), r"got torch\.float8_e5m2"),
    "not-nested": (NF4, change(f"{UP}weight.absmax", Tensor.float), r"nested_absmax: expected none beside"),
    "codes-shape": (AWQ, change(f"{UP}qweight", lambda t: t[:, 1:]), r"qweight: expected \[32, 12\], got \[32, 11\]"),
    "scales-shape": (GPTQ, change(f"{UP}scales", lambda t: t[:1]), r"scales: expected \[2, 96\], got \[1, 96\]"),
    "blocks": (FP8, change(f"{UP}weight_scale_inv", lambda t: t.T), r"scale_inv: expected \[4, 1\], got \[1, 4\]"),
    "group-out-of-range": (GPTQ, change(f"{UP}g_idx", lambda t: t + 1), "expected numbers of 2 groups, got 1 to 2"),
    "packed-group": (PACKED, change(f"{UP}weight_g_idx", lambda t: t - 3), "weight_g_idx: expected numbers of 2"),
    "packed-shape": (PACKED, change(f"{UP}weight_shape", lambda t: t + 1), r"expected \[96, 32\], got \[97, 33\]"),
    "bytes": (NF4, change(f"{UP}weight", lambda t: t[1:]), "weight: expected 1536 bytes, got 1535"),
    "json": (NF4, change(STATE, lambda t: t[:-1]), "bitsandbytes__nf4: damaged: "),
    "utf-8": (NF4, change(STATE, lambda t: t + 128), "bitsandbytes__nf4: damaged: "),
    "kind": (NF4, state(quant_type="fp4"), "expected an object with quant_type 'nf4'"),
    "block-size": (NF4, state(blocksize=0), "expected a shape, and a blocksize of 2 to 4096"),
    "nested-size": (NF4, state(nested_blocksize=1 << 30), "expected a shape, and a blocksize of 2 to 4096"),
    "offset": (NF4, state(nested_offset=float("nan")), "expected a number as nested_offset"),
    "state-shape": (NF4, state(shape=[32, 96]), r"expected the shape \[96, 32\], got \[32, 96\]"),
    "layout": ("int8", change(f"{UP}weight_format", lambda t: t + 1), "weight_format: expected 0, .* got 1"),
    "a-norm": (AWQ, add("model.norm.scales", torch.ones(2)), r"model\.norm\.weight: stored in floats and quantised"),
    "twice": (GPTQ, add(f"{UP}weight", torch.ones(96, 32)), rf"{UP}weight: stored in floats and quantised: "),
    "stacked": (FP8, add(f"{EXPERTS}gate_up_proj_scale_inv", torch.ones(2)), "experts that are quant"),
    "another-layer": (GPTQ, add("model.layers.9.mlp.up_proj.qweight", torch.ones(2, 2).int()), "unused tensors"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind that is damaged."""
    make_model(base := tmp_path_factory.mktemp("base"), **SIZES)
    folders = {}
    for name in (NF4, GPTQ, AWQ, PACKED, FP8, "int8"):
        folders[name] = Path(shutil.copytree(base, tmp_path_factory.mktemp(name) / "model"))
        quantise(folders[name], CASES[name].quantiser, CASES[name].config)
    return folders


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_parts_are_refused_by_name(damage: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name, edit, expected = DAMAGE[damage]
    folder = stored(Path(shutil.copytree(folders[name], tmp_path / "model")), edit)
    with pytest.raises(CheckpointError, match=expected):
        open_weights(folder, read_spec(folder))


def grouped(form: str = "pack-quantized", **scheme: Any) -> dict[str, Any]:
    """A config of compressed-tensors with one group."""
    whole = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}} | scheme
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": whole}}


W8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
REFUSED: dict[str, tuple[object, str]] = {
    "hqq": ({"quant_method": "hqq"}, "quant_method: quantised weights of this format are not supported: "),
    "mxfp4": ({"quant_method": "mxfp4"}, "got 'mxfp4'"),
    "no-method": ({"bits": 4}, "got None"),
    "no-object": ("awq", "quantization_config: expected an object, got 'awq'"),
    "bnb-neither": ({"quant_method": "bitsandbytes"}, "load_in_4bit, load_in_8bit: expected one of them"),
    "bnb-kind": ({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "expected 'nf4' or 'fp4', got 'af4'"),
    "gptq-bits": ({"quant_method": "gptq", "bits": 5}, "bits: expected 2 or 3 or 4 or 8, got 5"),
    "gptq-float": ({"quant_method": "gptq", "bits": 4.0}, "bits: expected 2 or 3 or 4 or 8, got 4.0"),
    "gptq-marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'gptq_v2', got 'marlin'"),
    "gptq-group": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size: expected a positive integer"),
    "gptq-dynamic": ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*up": {"bits": 8}}}, "dynamic: .* another"),
    "awq-gemv": ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "version: expected 'gemm', got 'gemv'"),
    "awq-bits": ({"quant_method": "awq", "bits": 8}, "bits: expected 4, got 8"),
    "awq-symmetric": ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point: expected true"),
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme: expected 'dynamic'"),
    "fp8-tensor": ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size: expected two positive"),
    "activations": (grouped("int-quantized", weights=W8, input_activations=W8), "quantised activations"),
    "nvfp4": (grouped("nvfp4-pack-quantized"), "format: expected 'pack-quantized' or .*, got 'nvfp4-pack-quantized'"),
    "packed-bits": (grouped(weights={"num_bits": 3, "type": "int"}), "num_bits: expected 2 or 4 or 8, got 3"),
    "packed-float": (grouped(weights={"num_bits": 8, "type": "float"}), "expected int by tensor, channel or group"),
    "keys": (grouped() | {"kv_cache_scheme": W8}, "kv_cache_scheme: expected none, as it makes another function"),
    "sparse": (grouped() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: "),
    "frozen": (grouped() | {"quantization_status": "frozen"}, "quantization_status: expected 'compressed'"),
    "mixed": (grouped() | {"config_groups": {k: {"weights": {"num_bits": b}} for k, b in (("a", 4), ("b", 8))}},
              "config_groups: expected one way for all weights, got 2 that differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_handled_is_refused_by_name(name: str, tmp_path: Path) -> None:
    said, expected = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": said}))
    with pytest.raises(
        CheckpointError, match=f"config.json: quantization_config: .*{expected}" if said != "awq" else expected
    ):
        read_scheme(tmp_path)
