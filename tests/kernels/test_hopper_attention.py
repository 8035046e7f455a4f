"""hopper_attention's kernel, run on the CPU (``gluon_on_cpu``), against a dense mask in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.attention import LAYOUTS, LONG, SCALE, TOLERANCES, Layout, fp64, problem

pytest.importorskip("triton")

import triton
from support.gluon_on_cpu import on_cpu
from support.machine_code import hazards, in_flight, instructions
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psykern.kernels.triton import hopper_attention
from psykern.kernels.triton.hopper_kernel import attention_kernel

RAGGED = Layout(tuple((range(n), [(a, a + n)]) for n, a in ((1, 0), (127, 2), (128, 130), (129, 260), (300, 391))))
WAYS: dict[str, dict[str, bool]] = {
    "apart": {},
    "overlap": {"overlap": True},
    "turns": {"overlap": True, "turns": True},
}
ALL = LAYOUTS | LONG | {"ragged": RAGGED}
CASES = [(name, window, "turns") for name in ALL for window in (None, 2, 200)]
CASES += [
    (name, window, way) for name in ("ragged", "branches") for window in (None, 200) for way in ("apart", "overlap")
]


def check(name: str, window: int | None, way: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """On stores whose other rows are not numbers."""
    layout = ALL[name]
    q, k, v, segments = problem(layout, heads, 64, dtype)
    truth = fp64(layout, q, k, v, window)
    for x in (k, v):
        named = torch.zeros(len(x), dtype=torch.bool)
        for s in range(len(layout.segments)):
            named[layout.path(s)] = True
        x[~named] = math.nan
    out = torch.full_like(q, math.nan)
    with on_cpu(processors=3):
        got = hopper_attention.prefix_attention(q, k, v, segments, SCALE, window, out, **WAYS[way])
    torch.testing.assert_close(got.double(), truth, atol=2 * TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize(("name", "window", "way"), CASES)
def test_equals_fp64(name: str, window: int | None, way: str) -> None:
    check(name, window, way, (8, 2), torch.float16)


@pytest.mark.parametrize("heads", [(7, 1), (2, 2), (40, 1)], ids=lambda h: f"heads-{h[0]}-{h[1]}")
@pytest.mark.parametrize("name", ["ragged", "branches"])
def test_groups_of_heads(name: str, heads: tuple[int, int]) -> None:
    check(name, None, "turns", heads, torch.bfloat16)


def compiled(way: dict[str, bool], size: int, window: int | None) -> list[str]:
    """The machine code for an H100."""
    q, k, v, segments = problem(LAYOUTS["causal"], (8, 2), size, torch.bfloat16)
    launches: list[tuple[dict[str, Any], int]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> Any:
            names = attention_kernel.arg_names
            return lambda *a, num_warps, **b: launches.append((dict(zip(names, a, strict=False)) | b, num_warps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_attention, "attention_kernel", Recorder())
        patch.setattr(hopper_attention, "_num_processors", lambda device: 132)
        hopper_attention.prefix_attention(q, k, v, segments, SCALE, window, torch.empty_like(q), **way)
    ((values, num_warps),) = launches
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(values.items()):
        if name in ("q_ptr", "v_ptr", "out_ptr", "stride_qn", "stride_vm", "stride_on"):
            attributes[(i,)] = [["tt.divisibility", 16]]
        if attention_kernel.params[attention_kernel.arg_names.index(name)].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*i32" if value.dtype == torch.int32 else "*bf16"
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<bf16{value.block_shape},{value.layout!r}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = GluonASTSource(attention_kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    return instructions(built.asm["cubin"])


@pytest.mark.slow
@pytest.mark.parametrize(("way", "size", "window"), [("turns", 128, None), ("turns", 64, None), ("apart", 128, 200)])
def test_products_run_beside_exponentials_and_nothing_touches_them(way: str, size: int, window: int | None) -> None:
    code = compiled(WAYS[way], size, window)
    assert hazards(code) == []
    beside = [i for i, products in in_flight(code) if i.startswith("MUFU.EX2") and products]
    assert len(beside) == (2 * 66 if way == "turns" else 0)  # of 64 weights and 2 rows of a thread, in both halves
    inner = code[next(n for n, i in enumerate(code) if i.startswith("HGMMA")) :]
    assert sum(i.startswith("HGMMA") for i in code) == (16 + size // 8) * (2 if way == "turns" else 1)
    assert not any(i.startswith(("LDL", "STL")) for i, products in in_flight(inner) if products)  # spilled


@pytest.mark.slow
@pytest.mark.parametrize(("way", "window"), [("turns", None), ("turns", 200), ("apart", None)])
def test_warps_of_a_partition_meet_and_take_registers_once(way: str, window: int | None) -> None:
    """What hung on an H200: registers given back twice without a barrier between. And a warp that still waits while
    another goes on to say that a block is used would find its barrier two phases on."""
    code = compiled(WAYS[way], 128, window)
    assert sum(i.startswith("USETMAXREG") for i in code) == 5  # begin: both kinds of warps; then each partition
    waits = False
    for instruction in code:
        if instruction.startswith(("BAR.SYNC", "EXIT")):
            waits = False
        elif "TRYWAIT" in instruction:
            waits = True
        assert not (waits and instruction.startswith(("SYNCS.ARRIVE", "UTMALDG"))), instruction


def test_a_product_that_is_touched_is_seen() -> None:
    code = ["HGMMA.64x128x16.F32.BF16 R88, R24, gdesc[UR12].tnspB, R88, gsb0", "", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    for touch in ("F2FP.BF16.F32.PACK_AB R27, R1, R2", "FADD R1, R2, R151", "LDS.128 R21, [R1]"):
        code[1] = touch
        assert hazards(code) == [touch]
    for other in ("FADD R28, R24, R2", "MUFU.EX2 R1, R1", "LDS.128 R20, [R1]"):
        code[1] = other
        assert hazards(code) == []
