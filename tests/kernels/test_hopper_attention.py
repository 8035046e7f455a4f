"""hopper_attention's kernel, run on the CPU (``gluon_on_cpu``), against a dense mask in fp64."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from support.attention import LAYOUTS, LONG, SCALE, Layout, fp64, problem
from support.gluon_on_cpu import on_cpu

from psykern.kernels.triton import hopper_attention

RAGGED = Layout(tuple((range(n), [(a, a + n)]) for n, a in ((1, 0), (127, 2), (128, 130), (129, 260), (300, 391))))
WAYS = {"apart": {}, "overlap": {"overlap": True}, "turns": {"overlap": True, "turns": True}}
ALL = LAYOUTS | LONG | {"ragged": RAGGED}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("window", [None, 2, 200], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("layout", ALL.values(), ids=ALL)
def test_equals_fp64(layout: Layout, window: int | None, way: dict[str, bool]) -> None:
    q, k, v, segments = problem(layout, (8, 2), 64, torch.float16)
    truth = fp64(layout, q, k, v, window)
    for x in (k, v):
        named = torch.zeros(len(x), dtype=torch.bool)
        for s in range(len(layout.segments)):
            named[layout.path(s)] = True
        x[~named] = math.nan
    out = torch.full_like(q, math.nan)
    with on_cpu(processors=3):
        got = hopper_attention.prefix_attention(q, k, v, segments, SCALE, window, out, **way)
    torch.testing.assert_close(got.double(), truth, atol=4e-3, rtol=0)
