"""overlap_attention's kernel, run on the CPU (``gluon_on_cpu``), against a dense mask in fp64; and its machine code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.attention import LAYOUTS, LONG, SCALE, TOLERANCES, Layout, fp64, problem

pytest.importorskip("triton")

from support.gluon_on_cpu import on_cpu
from support.machine_code import gluon_code, hazards, in_flight

from psykern.kernels.triton import overlap_attention
from psykern.kernels.triton.overlap_kernel import attention_kernel

# Lengths about a block's, a tile's and the ring's; some behind a common beginning.
RAGGED = Layout(
    tuple(
        (range(n), [(a, a + n)])
        for n, a in ((1, 0), (127, 2), (128, 130), (129, 260), (300, 391), (384, 700), (385, 1090), (513, 1480))
    )
)
ALL = LAYOUTS | LONG | {"ragged": RAGGED}


def check(
    name: str, window: int | None, heads: tuple[int, int], dtype: torch.dtype, size: int = 64, persistent: bool = True
) -> None:
    """On stores whose other rows are not numbers."""
    layout = ALL[name]
    q, k, v, segments = problem(layout, heads, size, dtype)
    truth = fp64(layout, q, k, v, window)
    for x in (k, v):
        named = torch.zeros(len(x), dtype=torch.bool)
        for s in range(len(layout.segments)):
            named[layout.path(s)] = True
        x[~named] = math.nan
    out = torch.full_like(q, math.nan)
    with on_cpu(processors=3):
        got = overlap_attention.prefix_attention(q, k, v, segments, SCALE, window, out, persistent=persistent)
    torch.testing.assert_close(got.double(), truth, atol=2 * TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("window", [None, 2, 200])
@pytest.mark.parametrize("name", ALL)
def test_equals_fp64(name: str, window: int | None) -> None:
    check(name, window, (8, 2), torch.float16)


@pytest.mark.parametrize("heads", [(7, 1), (2, 2), (40, 1)], ids=lambda h: f"heads-{h[0]}-{h[1]}")
@pytest.mark.parametrize("name", ["ragged", "branches"])
def test_groups_of_heads(name: str, heads: tuple[int, int]) -> None:
    check(name, None, heads, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 200])
def test_a_program_a_tile_and_heads_of_128(window: int | None) -> None:
    check("ragged", window, (8, 2), torch.float16, size=128, persistent=False)


def compiled(size: int, window: int | None) -> list[str]:
    q, k, v, segments = problem(LAYOUTS["causal"], (8, 2), size, torch.bfloat16)
    launches: list[tuple[dict[str, Any], int]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> Any:
            names = attention_kernel.arg_names
            return lambda *a, num_warps, **b: launches.append((dict(zip(names, a, strict=False)) | b, num_warps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap_attention, "attention_kernel", Recorder())
        patch.setattr(overlap_attention, "_num_processors", lambda device: 132)
        overlap_attention.prefix_attention(q, k, v, segments, SCALE, window, torch.empty_like(q))
    ((values, num_warps),) = launches
    return gluon_code(attention_kernel, values, num_warps)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "window"), [(128, None), (128, 200), (64, None)])
def test_products_run_beside_exponentials_and_nothing_touches_them(size: int, window: int | None) -> None:
    code = compiled(size, window)
    assert hazards(code) == []
    beside = [i for i, products in in_flight(code) if i.startswith("MUFU.EX2") and products]
    assert len(beside) == 66  # of 64 weights and 2 rows of a thread
    assert sum(i.startswith("HGMMA") for i in code) == 2 * 8 + size // 16
    assert not any(i.startswith(("LDL", "STL")) for i, products in in_flight(code) if products)  # spilled
