"""Walks the machine code of a kernel for sm_90 and finds registers that are overwritten while a wgmma may read them.

A wgmma (``HGMMA``) runs on while its warps go on; what it reads from registers must stay until the wait
(``WARPGROUP.DEPBAR``) for the group that it is in. The ptxas of some versions of CUDA gets that wrong.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?P<predicate>@!?U?P\S+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;")
_PREDICATE = re.compile(r"!?U?P[T\d]")
_REGISTER = re.compile(r"R(\d+)")
_WIDTHS = ((r"HGMMA\.64x(\d+)", 0), (r"\.128|\.M88\.4", 4), (r"\.64|\.WIDE|\.M88\.2|^CS2R$", 2))  # 0: by its columns
_MOST_GROUPS = 8  # that are followed: a loop without a wait would have no end

Groups = tuple[frozenset[int], ...]  # registers that wgmma groups in flight read; the last one is still open


@dataclass(frozen=True, slots=True)
class Instruction:
    text: str
    name: str
    operands: tuple[str, ...]
    is_conditional: bool

    def writes(self) -> range:
        """The registers it overwrites: of its first operand that is no predicate."""
        if "SETP" in self.name:
            return range(0)
        first = next((o for o in self.operands if not _PREDICATE.match(o)), "")
        return _registers(first, self._width())

    def _width(self) -> int:
        for pattern, width in _WIDTHS:
            if found := re.search(pattern, self.name):
                return width or int(found[1]) // 2
        return 1

    def reads_for_later(self) -> range:
        """The registers of a wgmma's first factor: 64 x 16 numbers of 16 bits over 128 threads."""
        return _registers(self.operands[1], 4) if self.name.startswith("HGMMA") else range(0)


def disassembled(nvdisasm: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout


def overwritten_early(sass: str) -> tuple[set[str], int]:
    """Instructions that overwrite a register which a wgmma in flight may read, by any path through the code; and how
    many wgmma read registers."""
    code, labels = _parsed(sass)
    found: set[str] = set()
    start: Groups = (frozenset(),)
    seen, todo = {(0, start)}, [(0, start)]
    while todo:
        at, groups = todo.pop()
        if at >= len(code):
            continue
        one = code[at]
        if any(not group.isdisjoint(one.writes()) for group in groups):
            found.add(one.text)
        after = _groups_after(one, groups)
        for state in ((place, after) for place in _next_of(one, at, labels)):
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return found, sum(len(one.reads_for_later()) > 0 for one in code)


def _groups_after(one: Instruction, groups: Groups) -> Groups:
    if one.name.startswith("HGMMA"):
        groups = (*groups[:-1], groups[-1].union(one.reads_for_later()))
        return (*groups, frozenset())[-_MOST_GROUPS:] if "gsb0" in one.operands else groups
    if one.name.startswith("WARPGROUP.DEPBAR"):
        remaining = int(one.operands[-1], 16)
        return groups[-1 - remaining :]
    return groups


def _next_of(one: Instruction, at: int, labels: dict[str, int]) -> list[int]:
    """Where it may go on. A BSYNC goes to the end of its region, which stands right behind the last of them."""
    targets = [labels[t] for t in re.findall(r"`\((\.L_x_\d+)\)", one.text)] if not one.name.startswith("BSSY") else []
    is_end = one.name.split(".")[0] in ("BRA", "EXIT") and not one.is_conditional
    return targets if is_end else [*targets, at + 1]


def _parsed(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := _LINE.match(line):
            operands = tuple(o.strip() for o in found["operands"].split(","))
            is_conditional = found["predicate"] is not None or bool(_PREDICATE.match(operands[0]))
            code.append(Instruction(line.strip(), found["name"], operands, is_conditional))
    return code, labels


def _registers(operand: str, count: int) -> range:
    found = _REGISTER.match(operand)
    return range(int(found[1]), int(found[1]) + count) if found else range(0)
