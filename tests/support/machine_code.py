"""Reads the machine code of a Hopper kernel: what happens between the begin of a product and the wait for it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_WIDTH = {"128": 4, "64": 2, "WIDE": 2}  # registers, by the instruction's suffix


@dataclass(frozen=True, slots=True)
class Product:
    """One HGMMA with the registers it writes (sums) and reads (a left side that is not in shared memory)."""

    sums: frozenset[int]
    reads: frozenset[int]


def instructions(cubin: bytes) -> list[str]:
    """In order, without predicates."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+ )?(.*?) ;", text)
    return [" ".join(instruction.split()) for instruction in found]


def in_flight(code: Sequence[str]) -> Iterator[tuple[str, list[Product]]]:
    """Each instruction with the products that it cannot know to be done."""
    groups: list[list[Product]] = []
    open_group: list[Product] = []
    for instruction in code:
        yield instruction, [product for group in groups for product in group] + open_group
        if wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", instruction):
            groups = groups[len(groups) - int(wait[1]) :] if int(wait[1]) else []
        elif product := re.match(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+)|gdesc)", instruction):
            columns, sums, left = (int(x or -1) for x in product.groups())
            reads = range(left, left + 4) if left >= 0 else range(0)
            open_group.append(Product(frozenset(range(sums, sums + columns // 2)), frozenset(reads)))
            if "gsb0" in instruction:
                groups, open_group = [*groups, open_group], []


def hazards(code: Sequence[str]) -> list[str]:
    """Instructions that touch the sums, or overwrite a left side, of a product that may not be done."""
    found = []
    for instruction, products in in_flight(code):
        name = instruction.split()[0]
        if name.startswith(("HGMMA", "WARPGROUP")) or not products:
            continue
        numbers = [int(n) for n in re.findall(r"\bR(\d+)", instruction)]
        target = re.match(r"\S+ (?:P\d+, )?R(\d+)", instruction)
        stores = name.startswith(("ST", "SYNCS", "RED"))
        width = next((w for part, w in _WIDTH.items() if part in name.split(".")), 1)
        written = set(range(int(target[1]), int(target[1]) + width)) if target and not stores else set()
        if any(product.sums & (written | set(numbers)) or product.reads & written for product in products):
            found.append(instruction)
    return found


def gluon_code(kernel: Any, values: dict[str, Any], num_warps: int) -> list[str]:
    """The machine code for an H100 of a Gluon kernel on bf16, launched with ``values`` for its parameters. Pointers but
    those of the tiles' tables, and strides of rows, are multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*i32" if value.dtype == torch.int32 else "*bf16"
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<bf16{value.block_shape},{value.layout!r}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if signature[name] == "*bf16" or name.startswith("stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    return instructions(built.asm["cubin"])
