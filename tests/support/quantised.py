"""Quantised weights as the formats' specifications have them, made number by number: packers of the tests' own.

Each function takes a weight [out, in] float32 and gives what a file holds of it, by suffix, and the numbers that this
means, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support.model_folders import SINGLE
from torch import Tensor

Stored = tuple[dict[str, Tensor], np.ndarray]
Quantiser = Callable[[np.ndarray], Stored]

# bitsandbytes' tables, from csrc/kernels.cu (fp4: sign, exponent and mantissa, divided by 12)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * n / 12 for sign in (1, -1) for n in (0, 0.0625, 8, 12, 4, 6, 2, 3))
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantise(folder: Path, quantiser: Quantiser, config: object, also: Collection[str] = ()) -> dict[str, Tensor]:
    """Rewrites a folder that ``transformers`` saved, with the matrices of its layers and those of ``also`` quantised.
    Gives all tensors as they are meant."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": config}))
    stored, meant = load_file(folder / SINGLE), load_file(folder / SINGLE)
    for name in meant:
        if name.endswith("_proj.weight") or name in also:
            parts, numbers = quantiser(stored.pop(name).float().numpy())
            stored |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
            meant[name] = torch.from_numpy(numbers)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / SINGLE)
    return meant


def pack(codes: Sequence[int], bits: int) -> list[int]:
    """Codes one behind another in words of 32 bits, the lowest bits first, the last word filled with zeros."""
    stream = sum(int(code) << bits * place for place, code in enumerate(codes))
    words = [(stream >> 32 * i) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]  # as int32


def packed(rows: np.ndarray, bits: int) -> np.ndarray:
    return np.array([pack(row, bits) for row in rows.tolist()], dtype=np.int32)


def bitsandbytes_4bit(weight: np.ndarray, kind: str, *, double: bool = False, block: int = 64) -> Stored:
    table = np.array(NF4 if kind == "nf4" else FP4, dtype=np.float32)
    flat = weight.flatten()
    absmax = np.array([np.abs(flat[i : i + block]).max() for i in range(0, len(flat), block)], dtype=np.float32)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts: dict[str, np.ndarray] = {"weight.quant_map": table}
    if double:
        # The library's own map is another one: what it holds is the file's to say.
        nested_map = np.linspace(-1, 1, 256, dtype=np.float32)
        offset = float(absmax.mean())
        runs = [absmax[i : i + 16] - np.float32(offset) for i in range(0, len(absmax), 16)]
        scales = np.array([np.abs(run).max() for run in runs], dtype=np.float32)
        codes = [int(np.abs(nested_map * s - v).argmin()) for run, s in zip(runs, scales, strict=True) for v in run]
        absmax = np.array([nested_map[c] * scales[i // 16] + np.float32(offset) for i, c in enumerate(codes)])
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {
            "weight.absmax": np.array(codes, dtype=np.uint8),
            "weight.nested_absmax": scales,
            "weight.nested_quant_map": nested_map,
        }
    else:
        parts["weight.absmax"] = absmax
    scale = np.repeat(absmax.astype(np.float32), block)[: len(flat)]
    codes = np.abs(table * scale[:, None] - flat[:, None]).argmin(1).tolist()
    meant = table[codes] * scale
    codes += [0] * (len(codes) % 2)
    parts["weight"] = np.array([[a << 4 | b] for a, b in zip(codes[::2], codes[1::2], strict=True)], dtype=np.uint8)
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    return {suffix: torch.from_numpy(part) for suffix, part in parts.items()}, meant.reshape(weight.shape)


def bitsandbytes_int8(weight: np.ndarray) -> Stored:
    scales = np.abs(weight).max(1)
    codes = np.round(weight / scales[:, None] * 127).astype(np.int8)
    parts = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(scales)}
    meant = (codes * scales[:, None]).astype(np.float32) * np.float32(1 / 127)
    return parts | {"weight_format": torch.tensor(0, dtype=torch.uint8)}, meant


def affine(weight: np.ndarray, bits: int, groups: np.ndarray, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Codes [out, in], scales [out, G] in float16's precision and zeros [out, G] of each group, and what they mean.

    Column j is of group ``groups[j]``. Where zeros are free, those of the first group are 0 or the largest.
    """
    top, count = (1 << bits) - 1, groups.max() + 1
    parts = [weight[:, groups == g] for g in range(count)]
    if symmetric:
        scales = np.stack([2 * np.abs(part).max(1) / top for part in parts], 1)
        zeros = np.full(scales.shape, 1 << bits - 1)
    else:
        scales = np.stack([(part.max(1) - part.min(1)) / top for part in parts], 1)
        zeros = np.clip(np.round(np.stack([-part.min(1) for part in parts], 1) / scales), 0, top).astype(int)
        zeros[:, 0] = np.arange(len(zeros)) % 3 // 2 * top  # 0, 0, top
    scales = scales.astype(np.float16).astype(np.float32)
    codes = np.clip(np.round(weight / scales[:, groups]) + zeros[:, groups], 0, top).astype(int)
    return codes, scales, zeros, (codes - zeros[:, groups]).astype(np.float32) * scales[:, groups]


def gptq(weight: np.ndarray, bits: int, *, group: int = 16, shuffled: bool = False, symmetric: bool = True,
         version: int = 1) -> Stored:  # fmt: skip
    inputs = weight.shape[1]
    groups = np.arange(inputs) // (inputs if group == -1 else group)
    if shuffled:
        groups = np.random.default_rng(1).permutation(groups)
    codes, scales, zeros, meant = affine(weight, bits, groups, symmetric)
    if version == 1 and bits == 3:
        stored = packed((zeros.T - 1) % 8, bits)
    else:  # one less in each code, taken from whole words
        ones = np.array(pack([1] * (32 // bits), bits) if version == 1 else [0]).astype(np.int32)
        stored = packed(zeros.T, bits) - ones
    parts = {"qweight": packed(codes, bits).T, "qzeros": stored, "g_idx": groups.astype(np.int32)}
    tensors = {suffix: torch.from_numpy(np.ascontiguousarray(part)) for suffix, part in parts.items()}
    return tensors | {"scales": torch.from_numpy(scales.T.copy()).half()}, meant


def awq(weight: np.ndarray, *, group: int = 16) -> Stored:
    codes, scales, zeros, meant = affine(weight, 4, np.arange(weight.shape[1]) // group, False)

    def interleaved(rows: np.ndarray) -> Tensor:
        """[n, out] to words, 8 outputs each."""
        return torch.from_numpy(packed(rows.reshape(len(rows), -1, 8)[..., AWQ_ORDER].reshape(len(rows), -1), 4))

    parts = {"qweight": interleaved(codes.T), "qzeros": interleaved(zeros.T)}
    return parts | {"scales": torch.from_numpy(scales.T.copy()).half()}, meant


def pack_quantized(weight: np.ndarray, bits: int, *, group: int = -1, shuffled: bool = False,
                   symmetric: bool = True) -> Stored:  # fmt: skip
    outputs, inputs = weight.shape
    groups = np.arange(inputs) // (inputs if group == -1 else group)
    if shuffled:
        groups = np.random.default_rng(2).permutation(groups)
    codes, scales, zeros, meant = affine(weight, bits, groups, symmetric)
    tensors = {
        "weight_packed": torch.from_numpy(packed(codes, bits)),
        "weight_scale": torch.from_numpy(scales).half(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy(packed(zeros.T, bits).T.copy())
    if shuffled:
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return tensors, meant


def by_block(
    weight: np.ndarray, block: tuple[int, int], *, fp8: bool, zero: int = 0
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Codes, scales and what they mean, a block with its scale; ``zero`` of all of them."""
    top = 448 if fp8 else 127 - zero
    rows, columns = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    codes, meant = torch.empty(weight.shape), np.empty(weight.shape, np.float32)
    scales = np.empty((rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            at = slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
            scales[r, c] = np.abs(weight[at]).max() / top
            scaled = torch.from_numpy(weight[at] / scales[r, c])
            code = scaled.to(torch.float8_e4m3fn).float() if fp8 else scaled.round() + zero
            codes[at] = code
            meant[at] = (code.numpy() - zero) * scales[r, c]
    return codes.to(torch.float8_e4m3fn if fp8 else torch.int8), torch.from_numpy(scales), meant


def unpacked(weight: np.ndarray, block: tuple[int, int], *, fp8: bool, zero: int | None = None) -> Stored:
    block = tuple(size if each == -1 else each for size, each in zip(weight.shape, block, strict=True))  # type: ignore[assignment]
    codes, scales, meant = by_block(weight, block, fp8=fp8, zero=zero or 0)
    zeros = {} if zero is None else {"weight_zero_point": torch.full_like(scales, zero).to(codes.dtype)}
    return {"weight": codes, "weight_scale": scales, **zeros}, meant


def block_fp8(weight: np.ndarray, block: tuple[int, int]) -> Stored:
    codes, scales, meant = by_block(weight, block, fp8=True)
    return {"weight": codes, "weight_scale_inv": scales}, meant
