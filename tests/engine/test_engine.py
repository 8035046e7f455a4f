"""The engine against transformers' own forward pass: every family, shared or not, whatever the budgets."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import CONFIGS, LAYERS, make_model, oracle_logprobs
from support.exactness import INVARIANCE, TOLERANCE, in_fp64, token_logprobs, worst_sum
from support.groups import encoded, random_group, wanted
from transformers import PreTrainedModel

from psykern.core.errors import NonFiniteError, OutOfMemoryError
from psykern.core.types import EncodedTranscript, TargetScores
from psykern.engine import engine
from psykern.engine.engine import Engine
from psykern.engine.plan import Plan, plan
from psykern.engine.wave import run_wave
from psykern.kernels import Backend
from psykern.kernels.compute import Compute
from psykern.models.layer import Layer
from psykern.models.model import Model


def score(
    group: Sequence[EncodedTranscript],
    folder: Path,
    *,
    wave_tokens: int = 4096,
    batch_tokens: int = 512,
    min_share: int = 4,
    backend: Backend = "auto",
) -> TargetScores:
    model = Model(folder, Compute.resolve("cpu", backend=backend))
    planned = plan(group, wave_tokens=wave_tokens, batch_tokens=batch_tokens, min_share=min_share)
    return Engine(model).run(planned)


def assert_scores(scores: TargetScores, group: Sequence[EncodedTranscript], oracle: PreTrainedModel) -> None:
    """Against one forward pass in fp64 per distinct context: no sharing, no batches."""
    oracle, contexts = in_fp64(oracle), wanted(group)
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


def assert_same_bytes(one: TargetScores, two: TargetScores) -> None:
    for field in ("logprob", "entropy", "is_argmax"):
        assert getattr(one, field).tobytes() == getattr(two, field).tobytes(), field


@pytest.fixture(scope="module")
def group() -> list[EncodedTranscript]:
    """Transcripts of up to 120 tokens that share prefixes, with responses and options of several tokens."""
    return random_group(np.random.default_rng(5), 10, 320, 3)


each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "cpu") for name in CONFIGS), *((name, "reference") for name in LAYERS)]
)
def test_every_family_equals_transformers(
    name: str, backend: Backend, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    oracle = make_model(tmp_path, **CONFIGS[name])
    assert_scores(score(group, tmp_path, backend=backend), group, oracle)


@pytest.mark.parametrize(("name", "num_slots"), [*((name, 2) for name in CONFIGS), *((name, 3) for name in LAYERS)])
def test_fused_layers_that_are_streamed_equal_transformers(
    name: str, num_slots: int, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    """As on a device: weights in slots, 2 of 3 or 4 layers or all 3, one product for all that take the same input."""
    oracle = make_model(tmp_path, **CONFIGS[name])
    model = Model(tmp_path, Compute.resolve("cpu"), num_slots=num_slots)
    assert model.layer(0, 1).mixer.fused is not None
    scores = Engine(model).run(plan(group, wave_tokens=200, batch_tokens=64, min_share=4))
    assert_scores(scores, group, oracle)


@dataclass(frozen=True)
class Item:
    """What an engine takes, and says which it is."""

    name: str
    plan: Plan
    progress: Callable[[float], None] = lambda share: None


def test_pairs_are_the_scores_of_each_plan_with_its_item(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    """Between them one without a target; the scratch arrays grow from plan to plan."""
    make_model(tmp_path, **CONFIGS["qwen3"])
    runner = Engine(Model(tmp_path, Compute.resolve("cpu")))
    groups = [group[:3], [encoded([], [])], group, group[5:6]]
    shares: list[list[float]] = [[] for _ in groups]
    items = [
        Item(str(i), plan(g, wave_tokens=200, batch_tokens=64, min_share=4), share.append)
        for i, (g, share) in enumerate(zip(groups, shares, strict=True))
    ]
    pairs = list(runner.pairs(items))
    assert [item for item, _ in pairs] == items
    for (item, scores), share in zip(pairs, shares, strict=True):
        assert_same_bytes(scores, runner.run(item.plan))
        assert share == sorted(share) and (not share or share[-1] == pytest.approx(1.0))


def test_an_error_of_the_items_comes_after_the_scores_before_it(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["llama"])

    def items() -> Iterator[Item]:
        yield Item("one", plan(group[:2], wave_tokens=64, batch_tokens=64))
        yield Item("without a target", plan([encoded([], [])], wave_tokens=64, batch_tokens=64))
        raise ValueError("no more")

    pairs = Engine(Model(tmp_path, Compute.resolve("cpu"))).pairs(items())
    assert [next(pairs)[0].name for _ in range(2)] == ["one", "without a target"]
    with pytest.raises(ValueError, match="no more"):
        next(pairs)


@pytest.mark.parametrize("most_in_flight", [0, 1, 2])
def test_a_stop_takes_effect_between_waves(
    most_in_flight: int, tmp_path: Path, group: list[EncodedTranscript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in flight: as on a CPU, and as on a device. What is whole is given, what was begun is not."""
    make_model(tmp_path, **CONFIGS["llama"])
    runner = Engine(Model(tmp_path, Compute.resolve("cpu")))
    runner.most_in_flight = most_in_flight
    planned = plan(group, wave_tokens=64, batch_tokens=64)
    assert planned.num_waves > 3
    expected = runner.run(planned)
    computed: list[int] = []
    monkeypatch.setattr(
        "psykern.engine.engine.run_wave", lambda model, wave, *of: computed.append(1) or run_wave(model, wave, *of)
    )
    for waves in (0, 1, planned.num_waves, planned.num_waves + 2):
        computed.clear()
        items = [Item(name, planned) for name in "abcd"]
        pairs = list(runner.pairs(items, stop=lambda waves=waves: len(computed) >= waves))
        assert len(computed) == waves
        assert [item.name for item, _ in pairs] == list("abcd")[: waves // planned.num_waves]
        for _, scores in pairs:
            assert_same_bytes(scores, expected)


def test_leaving_early_ends_the_thread(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    runner = Engine(Model(tmp_path, Compute.resolve("cpu")))
    planned = plan(group, wave_tokens=64, batch_tokens=64)
    runner.run(planned)  # the model has a thread of its own from its first wave on
    before = threading.active_count()
    pairs = runner.pairs(Item(str(i), planned) for i in itertools.count())
    next(pairs)
    assert threading.active_count() == before + 1
    pairs.close()
    assert threading.active_count() == before
    assert_same_bytes(runner.run(planned), runner.run(planned))


def test_threads_that_share_an_engine_get_their_own_scores(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    """Their waves are interleaved: of other sizes, other prefixes to carry, the same scratch and weight slots."""
    make_model(tmp_path, dtype=torch.bfloat16, **CONFIGS["qwen3"])
    model = Model(tmp_path, Compute.resolve("cpu"), num_slots=1)
    runner = Engine(model)
    plans = [plan(group[i:], wave_tokens=40 + 7 * i, batch_tokens=16 + 5 * i, min_share=4) for i in range(3)]
    expected = [Engine(model).run(planned) for planned in plans]
    with ThreadPoolExecutor(len(plans)) as threads:
        for _ in range(3):
            for scores, want in zip(threads.map(runner.run, plans), expected, strict=True):
                assert_same_bytes(scores, want)


@each_backend
@pytest.mark.parametrize("name", ["olmo3-yarn"])  # test_company.py has others, to the bit
def test_budgets_sharing_and_company_do_not_change_scores(
    name: str, backend: Backend, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    make_model(tmp_path, **CONFIGS[name])
    expected = score(group, tmp_path, backend=backend)
    for sizes in (
        {"wave_tokens": 64, "batch_tokens": 64},
        {"wave_tokens": 64, "batch_tokens": 7},
        {"wave_tokens": 33, "batch_tokens": 1},
        {"min_share": 1},
        {"min_share": 10**6},
        {"min_share": 1, "wave_tokens": 50, "batch_tokens": 20},
    ):
        got = score(group, tmp_path, backend=backend, **sizes)
        assert np.abs(got.logprob - expected.logprob).max() <= INVARIANCE, sizes
        assert np.abs(got.entropy - expected.entropy).max() <= INVARIANCE, sizes
    alone = [score([t], tmp_path, backend=backend) for t in group]
    spans = np.cumsum([0] + [int((t.spans_tok[:, 1] - t.spans_tok[:, 0]).sum()) for t in group])
    for i, (t, scores) in enumerate(zip(group, alone, strict=True)):
        count = int((t.spans_tok[:, 1] - t.spans_tok[:, 0]).sum())
        got, want = scores.logprob[:count], expected.logprob[spans[i] : spans[i + 1]]
        assert np.abs(got - want).max(initial=0) <= INVARIANCE


@each_backend
@pytest.mark.parametrize("name", ["llama-rope3-bias", "qwen2-window", "qwen3-moe", "olmo3-yarn"])
def test_errors_of_long_responses_grow_as_the_root_of_their_tokens(name: str, backend: Backend, tmp_path: Path) -> None:
    """As README says: of a token, of 30 and of 300 that follow each other, from fp64 and between budgets."""
    oracle = make_model(tmp_path, **CONFIGS[name])
    tokens = np.random.default_rng(7).integers(320, size=700)
    response = [encoded(tokens.tolist(), [(1, len(tokens))])]
    first, *others = (
        score(response, tmp_path, backend=backend, wave_tokens=wave, batch_tokens=batch).logprob.astype(np.float64)
        for wave, batch in ((4096, 512), (300, 100), (1000, 17))
    )
    errors = first - token_logprobs(in_fp64(oracle), tokens)
    for number in (1, 30, 300):
        assert worst_sum(errors, number) <= TOLERANCE * number**0.5
        assert all(worst_sum(other - first, number) <= INVARIANCE * number**0.5 for other in others)


@each_backend
def test_two_equal_runs_give_equal_bytes(backend: Backend, tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["qwen3"])
    one, two = (score(group, tmp_path, wave_tokens=64, batch_tokens=16, backend=backend) for _ in range(2))
    assert_same_bytes(one, two)


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


@pytest.mark.parametrize(
    "said",
    [None, "Triton Error [CUDA]: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"],
    ids=["torch", "triton", "cublas"],
)
def test_running_out_of_memory_says_which_budget_to_lower(
    said: str | None, tmp_path: Path, group: list[EncodedTranscript], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path, **CONFIGS["llama"])

    def fail(*_: object) -> None:
        if said is not None:
            raise RuntimeError(said)
        torch.empty(2**60)

    monkeypatch.setattr(Layer, "__call__", fail)
    with pytest.raises(OutOfMemoryError, match=r"out of memory: .*lower --wave-tokens"):
        score(group, tmp_path)


def test_progress_ends_at_one(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    model = Model(tmp_path, Compute.resolve("cpu"))
    shares: list[float] = []
    Engine(model).run(plan(group, wave_tokens=64, batch_tokens=64), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
