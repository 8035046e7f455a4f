"""What the compiler says of the Triton kernels, without a GPU: no spilled registers, and tiles that fit.

Some configurations of the tables, those nearest to the limits; benchmarks/triton_resources.py compiles all of them.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
from support.sass import disassembled, overwritten_early

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import triton
import triton_resources as resources

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

CASES = {case.config: case for case in resources.cases()}
HARDEST = [  # configuration, architecture, the tensor core instruction of its product
    ("R64-V50281-D2045-bf16", 90, "wgmma"),  # masked loads
    ("R1024-V151936-D2048-bf16", 80, "mma"),
    ("R1024-V151936-D2048-bf16", 90, "wgmma"),  # TMA's tiles, 255 registers
    ("N16384-D2048-F768-bf16", 80, "mma"),
    ("N16384-D2048-F768-bf16", 90, "wgmma"),
    ("Dh64-full-bf16", 90, "wgmma"),
    ("Dh80-full-bf16", 80, "mma"),
    ("Dh128-full-bf16", 80, "mma"),
    ("Dh128-full-bf16", 90, "wgmma"),
    ("Dh128-window-bf16", 90, "wgmma"),
    ("Dh128-window-fp32", 80, ""),
    ("Dh256-window-bf16", 80, "mma"),
    ("D5120-norm-first-bf16", 90, ""),
    ("H40-Dh128-projection-bf16", 90, ""),
    ("F4864-bf16", 90, ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "arch", "mma"), HARDEST, ids=[f"{c}-sm_{a}" for c, a, _ in HARDEST])
def test_nothing_spills_and_tiles_fit(config: str, arch: int, mma: str) -> None:
    launches = list(resources.compiled(CASES[config], arch))
    assert launches
    for launch, took in launches:
        assert took.stack_bytes == 0, launch.kernel.__name__
        assert took.shared_bytes <= resources.SHARED_BYTES[arch], launch.kernel.__name__
    assert max(took.mma for _, took in launches) == mma  # of one that only prepares or sums: ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    ["R64-V151936-D2048-bf16", "R1024-V151936-D2048-bf16", "Dh128-full-bf16", "Dh256-full-bf16", "Dh256-window-fp32"],
)
def test_tiles_of_an_older_gpu_fit_a_later_one_for_desktops(config: str) -> None:
    """Which takes them, as it has 99 KiB of shared memory (CUDA programming guide, compute capability 12.0)."""
    with resources.recording(hopper=False) as launches:
        CASES[config].call()
    for launch in launches:
        assert resources.resources(launch, 120).shared_bytes <= 99 * 1024


def test_a_spill_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: one warp cannot hold 64 x 128 sums."""
    module = importlib.import_module("psykern.kernels.triton.option_logprobs")
    monkeypatch.setattr(module, "tiles_of", lambda *_: module.Tiles(64, 128, 32, 1, 1))
    launch, took = next(resources.compiled(CASES["R64-V151936-D2048-bf16"], 80))
    assert launch.options == {"num_warps": 1, "num_stages": 1}
    assert took.stack_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        *("Dh64-full-bf16", "Dh80-full-bf16", "Dh128-full-bf16", "Dh128-window-bf16", "Dh256-full-bf16"),
        *("R64-V151936-D2048-bf16", "R1024-V151936-D2048-bf16"),
    ],
)
def test_registers_that_a_wgmma_reads_stay_until_it_is_done(config: str) -> None:
    with resources.recording(hopper=True) as launches:
        CASES[config].call()
    found, num_reading = overwritten_early(
        disassembled(triton.knobs.nvidia.nvdisasm.path, resources.build(launches[0], 90).asm["cubin"])
    )
    assert not found
    assert (num_reading > 0) == config.startswith("Dh")  # of attention the weights; else both factors are in memory


@pytest.mark.slow
@pytest.mark.parametrize("config", ["Dh64-full-bf16", "Dh80-full-bf16", "Dh128-window-bf16", "Dh256-window-bf16"])
def test_nothing_that_wgmma_reads_comes_by_cp_async(config: str) -> None:
    """Triton 3.6 sets no fence between them. ``cp.async.bulk`` is TMA, which needs none."""
    with resources.recording(hopper=True) as launches:
        CASES[config].call()
    ptx = resources.build(launches[0], 90).asm["ptx"]
    assert "wgmma" in ptx
    assert not re.findall(r"cp\.async\.c[ag]\b.*", ptx)


@pytest.mark.slow
@pytest.mark.parametrize("has_fence", [True, False], ids=["cp.async", "registers"])
def test_gathered_rows_reach_wgmma_behind_a_fence(has_fence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come by cp.async where Triton sets a fence behind that, else by registers."""
    module = importlib.import_module("psykern.kernels.triton.experts")
    if has_fence and not module._HAS_FENCE:
        pytest.skip(f"Triton {triton.__version__} sets none")
    monkeypatch.setattr(module, "_HAS_FENCE", has_fence)
    with resources.recording(hopper=True) as launches:
        CASES["N16384-D2048-F768-bf16"].call()
    (product,) = (launch for launch in launches if launch.kernel.__name__ == "expert_swiglu_kernel")
    compiled = resources.build(product, 90)
    loop = re.findall(r"cp\.async\.c[ag]|cp\.async\.wait_group|st\.shared|fence\.proxy|wgmma\.mma", compiled.asm["ptx"])
    assert ("cp.async.cg" in loop) == has_fence
    first = loop.index("wgmma.mma")
    assert loop[first - 2 : first] == ["cp.async.wait_group" if has_fence else "st.shared", "fence.proxy"]
    assert not overwritten_early(disassembled(triton.knobs.nvidia.nvdisasm.path, compiled.asm["cubin"]))[0]
    assert resources.resources(product, 90).stack_bytes == 0


LOOP = """
.L_x_0:
        /*0000*/                   HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR16].tnspB, R24 ;
        /*0010*/                   HGMMA.64x32x16.F32.BF16 R24, R44, gdesc[UR20].tnspB, R24, gsb0 ;
        /*0020*/                   STS [R40], R47 ;
        /*0030*/                   ISETP.GT.AND P0, PT, R40, R44, PT ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
"""
BAD = "        /*0100*/                   {} ;\n"
WAIT = BAD.format("WARPGROUP.DEPBAR.LE gsb0, 0x0")


@pytest.mark.parametrize(
    ("write", "is_early"),
    [
        ("FMUL R47, R0, R1", True),
        ("@P1 LDS.128 R36, [R2]", False),
        ("LDS.128 R40, [R2]", True),
        ("SHFL.BFLY PT, R41, R0, 0x1, 0x1f", True),
        ("FMUL R48, R40, R41", False),
    ],
)
def test_a_register_overwritten_early_is_seen(write: str, is_early: bool) -> None:
    """The check above can fail: behind the wgmma and, round the loop, before it; not behind the wait."""
    bad = BAD.format(write)
    behind = LOOP.replace("        /*0020*/", bad + "        /*0020*/")
    around = LOOP.replace(".L_x_0:\n", ".L_x_0:\n" + bad)
    waited = LOOP.replace("        /*0020*/", WAIT + bad + "        /*0020*/")
    waited_for_another = waited.replace("gsb0, 0x0", "gsb0, 0x1")
    assert [bool(overwritten_early(code)[0]) for code in (behind, around, waited, waited_for_another)] == [
        *(is_early, is_early, False, is_early)
    ]
    assert overwritten_early(LOOP) == (set(), 2)
