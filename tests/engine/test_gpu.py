"""The whole engine on a device, against ``transformers`` in fp32 on the same one.

Each test runs on a CPU too, where the code is the same, so that it is known to run before a GPU is at hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.backends import Place, missing, short
from support.checkpoints import CONFIGS, make_model, oracle_logprobs
from support.groups import random_group, wanted

from psykern.core.errors import OutOfMemoryError
from psykern.core.settings import Backend
from psykern.core.types import EncodedTranscript, TargetScores
from psykern.engine import engine
from psykern.engine.budgets import Budgets
from psykern.engine.engine import Engine
from psykern.engine.page_tree import PAGE_TOKENS
from psykern.engine.pages import row_bytes
from psykern.engine.plan import plan
from psykern.kernels import resolve
from psykern.kernels.compute import Compute
from psykern.models.model import Model

RMS = {torch.float32: 0.003, torch.bfloat16: 0.035, torch.float16: 0.01}  # nats; fp16 has 8 times bf16's resolution
SHAPE = {  # of the kind of Qwen3; a vocabulary that no tile divides
    "model_type": "qwen3",
    "vocab_size": 4099,
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 128,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def group() -> list[EncodedTranscript]:
    """Transcripts of up to 120 tokens that share prefixes, with responses and options of several tokens."""
    return random_group(np.random.default_rng(5), 10, 320, 3)


def score(
    folder: Path,
    group: Sequence[EncodedTranscript],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    wave_tokens: int = 4096,
    num_slots: int | None = None,
) -> TargetScores:
    model = Model(folder, Compute(device, dtype, resolve("auto", device)), num_slots=num_slots)
    planned = plan(group, wave_tokens=wave_tokens, batch_tokens=512, min_share=4)
    return Engine(model).run(planned)


def rms_from_transformers(
    scores: TargetScores, group: Sequence[EncodedTranscript], oracle: torch.nn.Module, device: torch.device
) -> float:
    """Root of the mean squared difference of log-probabilities; one pass of the oracle for each context."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    oracle = oracle.to(device)
    tables: dict[tuple[int, ...], torch.Tensor] = {}
    expected = []
    for context, token in wanted(group):
        if (known := tuple(context)) not in tables:
            tables[known] = oracle_logprobs(oracle, np.array(context))[-1].cpu()
        expected.append(float(tables[known][token]))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return float(np.sqrt(np.mean((scores.logprob - np.array(expected)) ** 2)))


def assert_same_bytes(one: TargetScores, two: TargetScores) -> None:
    for field in ("logprob", "entropy", "is_argmax"):
        assert getattr(one, field).tobytes() == getattr(two, field).tobytes()


@pytest.mark.parametrize("dtype", RMS, ids=short)
def test_scores_are_those_of_transformers_in_fp32(
    dtype: torch.dtype, device: torch.device, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    oracle = make_model(tmp_path, dtype=dtype, **SHAPE)
    scores = score(tmp_path, group, device, dtype)
    assert rms_from_transformers(scores, group, oracle, device) <= RMS[dtype]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_in_fp32(name: str, device: torch.device, tmp_path: Path, group: list[EncodedTranscript]) -> None:
    oracle = make_model(tmp_path, **CONFIGS[name])
    scores = score(tmp_path, group[:4], device)
    assert rms_from_transformers(scores, group[:4], oracle, device) <= RMS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_equal_runs_give_equal_bytes_streamed_or_resident(
    dtype: torch.dtype, device: torch.device, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    """Waves of 64 rows carry prefixes; 2 slots stream the 3 layers, as many slots as layers keep them."""
    make_model(tmp_path, dtype=dtype, **CONFIGS["qwen3"])
    one, two, streamed = (score(tmp_path, group, device, dtype, wave_tokens=64, num_slots=slots) for slots in (3, 3, 2))
    assert_same_bytes(one, two)
    assert_same_bytes(one, streamed)


def test_carried_prefixes_give_the_scores_of_one_wave(
    device: torch.device, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    make_model(tmp_path, **CONFIGS["olmo3"])
    planned = plan(group, wave_tokens=50, batch_tokens=512, min_share=4)
    assert planned.num_waves > 5 and planned.max_carried_rows > 0
    one, carried = (score(tmp_path, group, device, wave_tokens=tokens) for tokens in (4096, 50))
    assert np.abs(one.logprob - carried.logprob).max() <= 1e-5


@pytest.mark.parametrize("dtype", RMS, ids=short)
def test_what_is_kept_gives_the_scores_of_transformers(
    dtype: torch.dtype, device: torch.device, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    """One transcript after the other, which begin alike, and again, when all of it is kept; in few pages and many."""
    oracle = make_model(tmp_path, dtype=dtype, **SHAPE)
    model = Model(tmp_path, Compute(device, dtype, resolve("auto", device)))
    for num_pages in (6, 300):
        engine = Engine(model, session_bytes=num_pages * PAGE_TOKENS * row_bytes(model.spec, dtype))
        for _ in range(2):
            scores = [engine.extend([of], Budgets(wave_tokens=100, batch_tokens=64))[0] for of in group[:4]]
            for of, transcript in zip(scores, group[:4], strict=True):
                if of.logprob.size:
                    assert rms_from_transformers(of, [transcript], oracle, device) <= 2 * RMS[dtype]


def test_the_idle_share_is_told(device: torch.device, tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["qwen3"])
    runner = Engine(Model(tmp_path, Compute(device, torch.float32, resolve("auto", device))))
    for _ in range(2):
        runner.run(plan(group, wave_tokens=64, batch_tokens=512, min_share=4))
        if device.type == "cpu":
            assert runner.idle_share is None
        else:
            assert runner.idle_share is not None and 0.0 <= runner.idle_share < 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_that_is_full_says_which_budget_to_lower(
    tmp_path: Path, group: list[EncodedTranscript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check before the first wave is told that all is well; then the allocator fails."""
    make_model(tmp_path, **CONFIGS["qwen3"])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(engine, "free_bytes", lambda device: None)
    taken = torch.empty(64 * 2**20, dtype=torch.int8, device="cuda")
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 8 * 2**20) / total)
        longer = random_group(np.random.default_rng(6), 400, 320, 3)
        with pytest.raises(OutOfMemoryError, match="lower --wave-tokens"):
            score(tmp_path, longer, torch.device("cuda"), wave_tokens=2**20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del taken


SANITIZED = """
import sys
import torch
from psykern import kernels
from support import attention
from support.calls import OPS, call
from support.backends import Place
backend = sys.argv[1]
place = Place(backend, torch.device("cuda"))
vendors, tritons = ("linear", "swiglu"), ("prefix_attention", "expert_swiglu", "expert_linear", "add_weighted")
for op in OPS:
    if op not in vendors + tritons:
        call(op, backend, place)
if backend == "triton":
    for layout in attention.LONG.values():
        for window in (None, 40):
            for size in (64, 80, 128):
                attention.run(place, *attention.problem(layout, (8, 2), size, torch.bfloat16), window=window)
    for rows, size, inner in ((1, 72, 40), (50, 88, 72), (300, 75, 70)):  # no tile divides these; TMA, and loads
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            routes = kernels.Routes.of(torch.rand(rows, 5, device="cuda").topk(2).indices, 5)
            x, up = (torch.randn(*s, device="cuda").to(dtype) for s in ((rows, size), (5, inner, size)))
            gated = kernels.expert_swiglu(x, up, up, routes, backend=backend)
            each = kernels.expert_linear(gated, up.transpose(1, 2).contiguous(), routes, backend=backend)
            kernels.add_weighted(each, torch.rand(rows, 2, device="cuda"), x, backend=backend)
for rows in (1, 7, 130):  # no tile divides these
    hidden, weight = torch.randn(rows, 72, device="cuda"), torch.randn(517, 72, device="cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        offsets = torch.arange(rows + 1, device="cuda")
        ids = torch.full((rows,), 516, dtype=torch.int32, device="cuda")
        kernels.option_logprobs(hidden.to(dtype), weight.to(dtype), offsets, ids, backend=backend)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "tool"), [("cuda", "memcheck"), ("cuda", "racecheck"), ("triton", "memcheck")])
def test_the_sanitizer_finds_nothing_in_the_kernels(backend: Backend, tool: str) -> None:
    if (reason := missing(Place(backend, torch.device("cuda")))) is not None:
        pytest.skip(reason)
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        pytest.skip("compute-sanitizer: not on PATH")
    tests = Path(__file__).resolve().parents[1]
    # Triton's kernels have no name in common, and beside them little runs.
    own = ["--kernel-name=kns=psykern"] if backend == "cuda" else []
    options = [f"--tool={tool}", *own, "--report-api-errors=no", "--error-exitcode=9"]
    found = subprocess.run(
        [sanitizer, *options, sys.executable, "-c", SANITIZED, backend],
        cwd=tests,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that a tensor's end is an allocation's end
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    told = found.stdout + found.stderr
    if "Device not supported" in told:
        pytest.skip("compute-sanitizer: does not know this device")
    assert found.returncode == 0, told[-3000:]
