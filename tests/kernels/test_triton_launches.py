"""The engine's Triton launches as on an H100, without one: Triton specialises, compiles and launches with a driver that
checks what it is given and runs nothing (``cuda_driver_stub.c``). What the kernels compute is not shown here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.checkpoints import CONFIGS, make_model

triton = pytest.importorskip("triton")

SUPPORT = Path(__file__).resolve().parents[1] / "support"
BEGIN = """
import importlib, sys
import numpy as np
import torch
import triton
from pathlib import Path
from triton.backends.nvidia.driver import CudaDriver
from psykern import kernels
from psykern.kernels import dispatch

class Driver(CudaDriver):
    def __init__(self):
        super().__init__()
        self.get_device_capability = lambda device=None: (9, 0)
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0

triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.jit_cache_hook = lambda *, fn, **_: print("compile", fn.name, flush=True) or False
dispatch.resolve = lambda backend, device: backend  # Triton's on tensors of the CPU
for name in ("option_logprobs", "prefix_attention", "experts"):
    importlib.import_module(f"psykern.kernels.triton.{name}").is_hopper = lambda device: True
"""
ENGINE = """
from psykern.kernels.compute import Compute
from psykern.models.model import Model
from psykern.engine.plan import plan
from psykern.engine.store import OneLayer
from psykern.engine.watch import Watch
from psykern.engine.wave import run_wave
from support.groups import random_group

mapped = Model._on_device
Model._on_device = lambda model, name: mapped(model, name).clone()  # aligned, as a device's memory is
model = Model(Path(sys.argv[1]), Compute(torch.device("cpu"), torch.bfloat16, "triton"), num_slots=2)
group = random_group(np.random.default_rng(5), 10, 320, 3)
for wave_tokens, batch_tokens in ((4096, 512), (64, 512), (50, 17), (50, 31), (300, 100)):
    print("run", flush=True)
    planned = plan(group, wave_tokens=wave_tokens, batch_tokens=batch_tokens, min_share=4)
    store, scratch = OneLayer(model), model.scratch(batch_tokens)
    for wave in planned.waves():
        with torch.inference_mode():
            run_wave(model, wave, store, scratch, Watch(model.device, lambda share: None))
"""
EXPERTS = """
from psykern.kernels import Routes

gates, ups, downs = (torch.zeros(4, m, k, dtype=torch.bfloat16) for m, k in ((96, 256), (96, 256), (256, 96)))
for rows in (100, 101, 126):
    print("run", flush=True)
    x, weights = torch.zeros(rows, 256, dtype=torch.bfloat16), torch.zeros(rows, 2)
    routes = Routes.of(torch.arange(2 * rows).view(rows, 2) % 3, 4)
    inner = kernels.expert_swiglu(x, gates, ups, routes, backend="triton")
    each = kernels.expert_linear(inner, downs, routes, backend="triton")
    kernels.add_weighted(each, weights, x, backend="triton")
"""
ILLEGAL = {
    "grid": """
kernel = importlib.import_module("psykern.kernels.triton.elementwise").silu_mul_kernel
x = torch.zeros(1, 8)
kernel[(1, 65_536)](x, x, x, 8, 8, 8, 8, BLOCK_F=1024)
""",
    "tensor-map": """
attention = importlib.import_module("psykern.kernels.triton.prefix_attention")
attention.descriptor = lambda x, rows, columns: importlib.import_module(
    "triton.tools.tensor_descriptor").TensorDescriptor(x, [len(x), 1024], [x.stride(0), 1], [rows, columns])
q = torch.zeros(4, 2, 64, dtype=torch.bfloat16)  # rows of 128 numbers, said to have 1,024
ends = torch.tensor([0, 4], dtype=torch.int32)
segments = kernels.Segments(torch.arange(4).int(), ends, torch.tensor([0, 1]).int(), ends[None])
kernels.prefix_attention(q, q, q, segments, softmax_scale=1.0, backend="triton")
""",
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1."""
    if (compiler := shutil.which("gcc") or shutil.which("cc")) is None:
        pytest.skip("no C compiler on PATH")
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, target = SUPPORT / "cuda_driver_stub.c", folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", f"-I{headers}", str(source), "-o", str(target)]
    subprocess.run(command, check=True, timeout=60)
    return folder


def launch(driver: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {"TRITON_LIBCUDA_PATH": str(driver), "TRITON_CACHE_DIR": str(driver / "cache"), "TRITON_INTERPRET": "0"}
    paths = os.pathsep.join(filter(None, (str(driver), os.environ.get("LD_LIBRARY_PATH"))))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + script, *arguments],
        cwd=SUPPORT.parent,
        env=os.environ | own | {"LD_LIBRARY_PATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head_dim"), [("qwen2-window", 64), ("qwen3", 128), ("olmo3", 80)])
def test_every_launch_is_legal_and_only_the_first_run_compiles(
    driver: Path, family: str, head_dim: int, tmp_path: Path
) -> None:
    """Later runs have waves that carry prefixes, and batches of other sizes, ragged ends included."""
    sizes = {"hidden_size": 512, "head_dim": head_dim}
    make_model(tmp_path, dtype=torch.bfloat16, **CONFIGS[family] | sizes)  # here: transformers takes long to import
    found = launch(driver, ENGINE, str(tmp_path))
    assert found.returncode == 0, found.stderr[-3000:]
    first, *later = (Counter(text.splitlines()) for text in found.stdout.split("run\n")[1:])
    launched = {line.split()[1] for line in first if line.startswith("launch")}
    assert launched == {
        *("logits_kernel", "combine_kernel", "attention_kernel"),
        *("add_rms_norm_kernel", "qk_norm_rope_kernel", "silu_mul_kernel"),
    }
    # TMA fetches rows and weights of the head, and where heads are a power of 2 long keys and values, in whole blocks
    # and in those at the edges.
    num_maps = 2 * first["launch logits_kernel"] + 4 * (head_dim != 80) * first["launch attention_kernel"]
    assert sum(n for line, n in first.items() if line.startswith("map")) == num_maps
    for run in later:
        assert sum(n for line, n in run.items() if line.startswith("launch")) > 50
        assert {line for line in run if line.startswith("compile")} <= {"compile logits_kernel"}
    # It has three tiles: for up to 16 rows, for up to 64, and for more.
    assert sum(run["compile logits_kernel"] for run in (first, *later)) == 3


@pytest.mark.slow
def test_launches_of_experts_are_legal_and_only_the_first_run_compiles(driver: Path) -> None:
    found = launch(driver, EXPERTS)
    assert found.returncode == 0, found.stderr[-3000:]
    first, *later = (Counter(line.split()[0] for line in text.splitlines()) for text in found.stdout.split("run\n")[1:])
    assert (first["launch"], first["map"]) == (5, 4)  # twice the table of tiles; two weights, then rows and weight
    assert [run["launch"] for run in later] == [5, 5]
    assert first["compile"] == 4 and not any(run["compile"] for run in later)


@pytest.mark.parametrize("what", ILLEGAL)
def test_an_illegal_launch_is_seen(driver: Path, what: str) -> None:
    found = launch(driver, ILLEGAL[what])
    assert found.returncode != 0
    assert "refused by the stub" in found.stderr
