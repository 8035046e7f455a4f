"""The engine against transformers' own forward pass: every family, shared or not, whatever the budgets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import CONFIGS, make_model, oracle_logprobs
from support.groups import encoded, random_group, wanted

from psykern.core.errors import NonFiniteError, OutOfMemoryError
from psykern.core.types import EncodedTranscript, TargetScores
from psykern.engine import engine
from psykern.engine.plan import Plan, plan
from psykern.kernels import Backend
from psykern.models.model import Model, ModelConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from shapes import model_config

TOLERANCE = 1e-4  # nats, against fp32 transformers
INVARIANCE = 1e-5  # nats, between budgets and batch mates


def score(
    group: Sequence[EncodedTranscript],
    folder: Path,
    *,
    wave_tokens: int = 4096,
    batch_tokens: int = 512,
    min_share: int = 4,
    backend: Backend = "auto",
) -> TargetScores:
    model = Model(folder, device=torch.device("cpu"), dtype=torch.float32)
    planned = plan(group, wave_tokens=wave_tokens, batch_tokens=batch_tokens, min_share=min_share)
    return engine.run(planned, model, backend=backend)


def assert_scores(scores: TargetScores, group: Sequence[EncodedTranscript], oracle: torch.nn.Module) -> None:
    """Against one forward pass per distinct context: no sharing, no batches."""
    contexts = wanted(group)
    longest: dict[tuple[int, ...], torch.Tensor] = {}
    for context, _ in sorted(contexts, key=lambda c: -len(c[0])):
        if not any(known[: len(context)] == tuple(context) for known in longest):
            longest[tuple(context)] = oracle_logprobs(oracle, np.array(context))
    for i, (context, token) in enumerate(contexts):
        table = next(t for known, t in longest.items() if known[: len(context)] == tuple(context))
        row = table[len(context) - 1]
        assert abs(scores.logprob[i] - row[token]) <= TOLERANCE
        assert abs(scores.entropy[i] + (row.exp() * row).sum()) <= TOLERANCE
        top = row.topk(2).values
        if top[0] - top[1] > TOLERANCE:
            assert scores.is_argmax[i] == (int(row.argmax()) == token)


@pytest.fixture(scope="module")
def group() -> list[EncodedTranscript]:
    """Transcripts of up to 120 tokens that share prefixes, with responses and options of several tokens."""
    return random_group(np.random.default_rng(5), 10, 320, 3)


each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


@each_backend
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_equals_transformers(
    name: str, backend: Backend, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    oracle = make_model(tmp_path, **CONFIGS[name])
    assert_scores(score(group, tmp_path, backend=backend), group, oracle)


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_layers_that_are_streamed_equal_transformers(
    name: str, num_slots: int, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    """As on a device: weights in slots, 2 of 3 or 4 layers or all 3, one product for all that take the same input."""
    oracle = make_model(tmp_path, **CONFIGS[name])
    model = Model(tmp_path, device=torch.device("cpu"), dtype=torch.float32, num_slots=num_slots)
    assert model.is_fused
    scores = engine.run(plan(group, wave_tokens=200, batch_tokens=64, min_share=4), model)
    assert_scores(scores, group, oracle)


def test_a_stream_of_plans_gives_the_scores_of_each(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    """Between them one without a target; the work arrays grow from plan to plan."""
    make_model(tmp_path, **CONFIGS["qwen3"])
    model = Model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    groups = [group[:3], [encoded([], [])], group, group[5:6]]
    plans = [plan(g, wave_tokens=200, batch_tokens=64, min_share=4) for g in groups]
    shares: list[list[float]] = [[] for _ in plans]
    got = list(engine.stream(zip(plans, (s.append for s in shares), strict=True), model))
    assert len(got) == len(plans)
    for scores, planned, share in zip(got, plans, shares, strict=True):
        alone = engine.run(planned, model)
        for field in ("logprob", "entropy", "is_argmax"):
            assert getattr(scores, field).tobytes() == getattr(alone, field).tobytes()
        assert share == sorted(share) and (not share or share[-1] == pytest.approx(1.0))


def test_an_error_of_the_plans_comes_after_the_scores_before_it(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    model = Model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)

    def plans() -> Iterator[tuple[Plan, Callable[[float], None]]]:
        yield plan(group[:2], wave_tokens=64, batch_tokens=64), lambda share: None
        raise ValueError("no more")

    stream = engine.stream(plans(), model)
    assert len(next(stream).logprob)
    with pytest.raises(ValueError, match="no more"):
        next(stream)


@each_backend
@pytest.mark.parametrize("name", ["qwen3", "olmo3-yarn"])
def test_budgets_sharing_and_company_do_not_change_scores(
    name: str, backend: Backend, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    make_model(tmp_path, **CONFIGS[name])
    expected = score(group, tmp_path, backend=backend)
    for budgets in (
        {"wave_tokens": 64, "batch_tokens": 64},
        {"wave_tokens": 64, "batch_tokens": 7},
        {"wave_tokens": 33, "batch_tokens": 1},
        {"min_share": 1},
        {"min_share": 10**6},
        {"min_share": 1, "wave_tokens": 50, "batch_tokens": 20},
    ):
        got = score(group, tmp_path, backend=backend, **budgets)
        assert np.abs(got.logprob - expected.logprob).max() <= INVARIANCE, budgets
        assert np.abs(got.entropy - expected.entropy).max() <= INVARIANCE, budgets
    alone = [score([t], tmp_path, backend=backend) for t in group]
    spans = np.cumsum([0] + [int((t.spans_tok[:, 1] - t.spans_tok[:, 0]).sum()) for t in group])
    for i, (t, scores) in enumerate(zip(group, alone, strict=True)):
        count = int((t.spans_tok[:, 1] - t.spans_tok[:, 0]).sum())
        got, want = scores.logprob[:count], expected.logprob[spans[i] : spans[i + 1]]
        assert np.abs(got - want).max(initial=0) <= INVARIANCE


@each_backend
def test_two_equal_runs_give_equal_bytes(backend: Backend, tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["qwen3"])
    one, two = (score(group, tmp_path, wave_tokens=64, batch_tokens=16, backend=backend) for _ in range(2))
    for field in ("logprob", "entropy", "is_argmax"):
        assert getattr(one, field).tobytes() == getattr(two, field).tobytes()


def test_one_thread_and_two_give_the_same_scores(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    """Not to the bit: torch's matrix products may round otherwise on other threads. psykern's own kernels do not, see
    ``test_cpu_kernels.py``."""
    make_model(tmp_path, **CONFIGS["qwen3"])
    before, scores = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scores.append(score(group, tmp_path, wave_tokens=512, batch_tokens=256, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    one, two = scores
    assert np.abs(one.logprob - two.logprob).max() <= INVARIANCE
    assert np.abs(one.entropy - two.entropy).max() <= INVARIANCE


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_checkpoints_are_widened(
    backend: Backend, dtype: torch.dtype, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    oracle = make_model(tmp_path, dtype=dtype, **CONFIGS["qwen3"])
    assert_scores(score(group, tmp_path, backend=backend), group, oracle)


@each_backend
def test_the_study_vocabulary(backend: Backend, tmp_path: Path) -> None:
    """151,936 = 128 x 1187 tokens, which no tile divides; the last id is asked for."""
    oracle = make_model(tmp_path, model_type="qwen3", vocab_size=151_936, head_dim=16, tie_word_embeddings=True)
    tokens = np.random.default_rng(0).integers(151_936, size=40)
    tokens[[7, 20, 39]] = 151_935, 0, 8192
    group = [encoded(tokens.tolist(), [(7, 8), (20, 22), (39, 40)], [(0, 7, [i], 0) for i in (0, 8191, 151_935)])]
    assert_scores(score(group, tmp_path, backend=backend), group, oracle)


def test_no_targets(tmp_path: Path) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    assert len(score([encoded([], [])], tmp_path).logprob) == 0


def poison(folder: Path, name: str, value: float = float("nan")) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "value", "place"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan"), "layer 1 "),
        ("model.layers.0.self_attn.k_proj.weight", float("inf"), "layer 0 "),
        ("model.layers.2.mlp.down_proj.weight", float("nan"), "layer 2 "),
        ("model.norm.weight", float("nan"), "the final norm and head"),
        ("lm_head.weight", float("inf"), "the final norm and head"),
    ],
)
def test_weights_that_are_not_finite_stop_the_run_and_are_named(
    tensor: str, value: float, place: str, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    poison(tmp_path, tensor, value)
    with pytest.raises(NonFiniteError) as error:
        score(group, tmp_path)
    assert place in str(error.value)
    assert tensor in str(error.value)


def test_a_poisoned_embedding_row_is_named(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    poison(tmp_path, "model.embed_tokens.weight")
    only_token_0 = [encoded([0, 0, 0], [(2, 3)])]
    with pytest.raises(NonFiniteError, match=r"the embedding.*model\.embed_tokens\.weight"):
        score(only_token_0, tmp_path)


def test_a_wave_that_cannot_fit_is_refused_before_it_starts(
    tmp_path: Path, group: list[EncodedTranscript], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    monkeypatch.setattr(engine, "free_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemoryError, match=r"lower --wave-tokens .* or --batch-tokens"):
        score(group, tmp_path)


def test_running_out_of_memory_says_which_budget_to_lower(
    tmp_path: Path, group: list[EncodedTranscript], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path, **CONFIGS["llama"])

    def fail(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(engine, "decoder_layer", fail)
    with pytest.raises(OutOfMemoryError, match=r"out of memory: .*lower --wave-tokens"):
        score(group, tmp_path)


def test_progress_ends_at_one(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    model = Model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    shares: list[float] = []
    engine.run(plan(group, wave_tokens=64, batch_tokens=64), model, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_memory_of_a_wave_counts_everything_that_grows_with_it(tmp_path: Path) -> None:
    """By hand for one transcript of 999 rows in waves of 100: 900 carried rows, in fp32."""
    make_model(tmp_path, **CONFIGS["llama"])  # hidden 64, inner 96, 3 layers, 4 query heads and 2 key heads of 16
    config = ModelConfig.read(tmp_path)
    planned = plan([encoded(range(1000), [(500, 501), (999, 1000)])], wave_tokens=100, batch_tokens=50, min_share=1)
    hidden, store = 100 * 64, 2 * (100 + 900) * 32
    carried = 2 * (2 * 900 * 32 * 3)  # of the last wave, and what is kept for the next
    head = 2 * 1 * 64
    batch = 50 * (5 * 64 + 3 * 64 + 3 * 96)
    assert planned.max_carried_rows == 900
    expected = 4 * (hidden + store + carried + head + batch)
    assert engine.cost(planned, config, torch.float32).wave_bytes == expected + 3 * 32 * 2**20


@pytest.mark.parametrize(
    ("shape", "free_gib", "wave_tokens"),
    [
        ("Qwen3-8B", 60, 131_072),  # resident on an H100
        ("Llama-3.1-70B", 72, 131_072),  # streamed: what is free beside two layers
        ("OLMo-3-7B", 60, 16_384),  # 32 key heads: a carried transcript takes 24 GB, twice
        ("Qwen3-8B", 1, 16_384),  # at least: a wave that does not fit is refused before it starts
    ],
)
def test_waves_are_as_large_as_a_device_has_memory_for(
    shape: str, free_gib: int, wave_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "free_bytes", lambda device: free_gib * 2**30)
    got = engine.budgets(model_config(shape), torch.device("cuda"), torch.bfloat16)
    assert (got.wave_tokens, got.batch_tokens) == (wave_tokens, 16_384)
