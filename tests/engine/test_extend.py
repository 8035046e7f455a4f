"""What is computed on top of pages, against transformers' forward pass of each whole context: however long it grew,
whatever pages are there, and however much of it is computed at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import CONFIGS, LAYERS, make_model, oracle_logprobs
from support.exactness import INVARIANCE, TOLERANCE, in_fp64
from support.groups import encoded, wanted
from transformers import PreTrainedModel

from psykern.core.errors import NonFiniteError, OutOfMemoryError
from psykern.core.types import EncodedTranscript, TargetScores
from psykern.engine.budgets import Budgets
from psykern.engine.engine import Engine
from psykern.engine.page_tree import PAGE_TOKENS
from psykern.engine.pages import row_bytes
from psykern.engine.plan import plan
from psykern.kernels.compute import Compute
from psykern.models.model import Model

BUDGETS = Budgets(wave_tokens=4096, batch_tokens=512)


def make_engine(folder: Path, num_pages: int | None = None) -> Engine:
    model = Model(folder, Compute.resolve("cpu"))
    size = None if num_pages is None else num_pages * PAGE_TOKENS * row_bytes(model.spec, model.dtype)
    return Engine(model, session_bytes=size)


class Growing:
    """Sequences that grow, part and come back, as sessions do, with branches behind their ends."""

    def __init__(self, seed: int, vocabulary: int = 320) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocabulary = vocabulary
        self._known: list[list[int]] = [self._tokens(150)]

    def trees(self) -> list[EncodedTranscript]:
        """Of one call."""
        return [self._tree() for _ in range(self._rng.integers(1, 6))]

    def _tree(self) -> EncodedTranscript:
        rng = self._rng
        base = self._known[rng.integers(len(self._known))]
        cut = len(base) if rng.random() < 0.6 else int(rng.integers(len(base) + 1))
        tokens = base[:cut] + self._tokens(int(rng.integers(0, 25)))
        tokens = tokens or self._tokens(1)
        self._known = [*self._known[-6:], tokens]
        branches = []
        for _ in range(rng.integers(0, 5)):
            parent = len(tokens) - int(rng.integers(0, 2))
            behind = self._tokens(len(tokens) - parent + int(rng.integers(1, 6)))
            branches.append((0, parent, behind, max(len(tokens) - parent, parent == 0)))
        spans = [(len(tokens) - 1, len(tokens))] if len(tokens) > 1 and rng.random() < 0.2 else []
        return encoded(tokens, spans, [b for b in branches if b[3] < len(b[2])])

    def _tokens(self, count: int) -> list[int]:
        return self._rng.integers(self._vocabulary, size=count).tolist()


def assert_same(scores: Sequence[TargetScores], trees: Sequence[EncodedTranscript], tables: Oracle) -> None:
    for of, tree in zip(scores, trees, strict=True):
        targets = wanted([tree])
        assert len(of.logprob) == len(targets)
        for got, entropy, (context, token) in zip(of.logprob, of.entropy, targets, strict=True):
            row = tables.row(context)
            assert abs(got - row[token]) <= TOLERANCE
            assert abs(entropy + (row.exp() * row).sum()) <= TOLERANCE


class Oracle:
    def __init__(self, model: PreTrainedModel) -> None:
        self._model = in_fp64(model)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def row(self, context: list[int]) -> torch.Tensor:
        """[V] log-probabilities of what follows."""
        key = tuple(context)
        if key not in self._known:
            for k, row in enumerate(oracle_logprobs(self._model, np.array(context))):
                self._known[key[: k + 1]] = row
        return self._known[key]


@pytest.mark.parametrize("name", LAYERS)
def test_every_family_equals_transformers(name: str, tmp_path: Path) -> None:
    oracle, engine, growing = Oracle(make_model(tmp_path, **CONFIGS[name])), make_engine(tmp_path), Growing(1)
    for _ in range(6):
        trees = growing.trees()
        assert_same(engine.extend(trees, BUDGETS), trees, oracle)


@pytest.mark.parametrize("num_pages", [0, 1, 4, 8, 200])
@pytest.mark.parametrize(("wave_tokens", "carried_price"), [(9, 0.0), (60, 0.0), (60, 8.0), (4096, 0.0)])
def test_neither_pages_nor_waves_change_what_is_computed(
    num_pages: int, wave_tokens: int, carried_price: float, tmp_path: Path
) -> None:
    oracle = Oracle(make_model(tmp_path, **CONFIGS["olmo3"]))
    engine, growing = make_engine(tmp_path, num_pages), Growing(num_pages)
    for _ in range(12):
        trees = growing.trees()
        assert_same(engine.extend(trees, Budgets(wave_tokens, 16, carried_price)), trees, oracle)


def rows_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each wave from now on."""
    rows: list[int] = []
    embed = engine.model.embed

    def counted(token_ids: torch.Tensor) -> torch.Tensor:
        rows.append(len(token_ids))
        return embed(token_ids)

    monkeypatch.setattr(engine.model, "embed", counted)
    return rows


def test_only_what_is_new_is_computed_in_one_wave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    engine = make_engine(tmp_path)
    rows = rows_computed(engine, monkeypatch)
    start = list(range(100))
    engine.extend([encoded(start, [])], BUDGETS)
    assert rows.pop() == 100
    engine.extend([encoded(start, [])], BUDGETS)
    assert not rows, "nothing is new and nothing is asked"
    engine.extend([encoded(start, [], [(0, 100, [7], 0), (0, 100, [8], 0)])], BUDGETS)
    assert rows.pop() == 1, "the row that predicts the options"
    parted = [encoded([*start, 200 + i, 5, 6], [], [(0, 103, [7, 8], 0)]) for i in range(9)]
    engine.extend(parted, BUDGETS)
    assert rows.pop() == 9 * (3 + 1)
    engine.extend([encoded([*t.token_ids.tolist(), 9], [], [(0, 104, [7], 0)]) for t in parted], BUDGETS)
    assert rows.pop() == 9 * 1
    engine.extend([encoded(range(100, 300), [], [(0, 200, [i], 0)]) for i in range(5)], BUDGETS)
    assert rows.pop() == 200, "new sequences that are alike are computed once"
    assert not rows


def test_sequences_longer_than_a_wave_are_held_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    engine = make_engine(tmp_path)
    rows = rows_computed(engine, monkeypatch)
    tree = encoded([i % 300 for i in range(250)], [], [(0, 250, [i, i], 0) for i in range(30)])
    small = Budgets(wave_tokens=40, batch_tokens=16)
    (first,) = engine.extend([tree], small)
    assert max(rows) <= 40 and sum(rows) <= 250 + 30 + 3
    rows.clear()
    (again,) = engine.extend([tree], small)
    assert sum(rows) <= 30 + 3
    alone = Engine(engine.model).run(plan([tree], wave_tokens=4096, batch_tokens=512))
    for got in (first, again):
        np.testing.assert_allclose(got.logprob, alone.logprob, rtol=0, atol=INVARIANCE)


def test_threads_take_turns(tmp_path: Path) -> None:
    oracle = Oracle(make_model(tmp_path, **CONFIGS["qwen3"]))
    engine = make_engine(tmp_path, 12)
    barrier = threading.Barrier(4)

    def use(seed: int) -> list[tuple[list[EncodedTranscript], list[TargetScores]]]:
        growing = Growing(seed)
        barrier.wait()
        calls = [growing.trees() for _ in range(5)]
        return [(trees, engine.extend(trees, BUDGETS)) for trees in calls]

    with ThreadPoolExecutor(4) as pool:
        for calls in pool.map(use, range(4)):
            for trees, scores in calls:
                assert_same(scores, trees, oracle)


def test_what_failed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(make_model(tmp_path, **CONFIGS["llama"]))
    engine, tree = make_engine(tmp_path), encoded(range(90), [(89, 90)])
    embed = engine.model.embed
    monkeypatch.setattr(engine.model, "embed", lambda token_ids: embed(token_ids) * torch.nan)
    with pytest.raises(NonFiniteError, match="the embedding"):
        engine.extend([tree], BUDGETS)
    monkeypatch.undo()
    assert_same(engine.extend([tree], BUDGETS), [tree], oracle)


def test_pages_that_no_memory_has_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    engine = make_engine(tmp_path, 2**40)
    with pytest.raises(
        OutOfMemoryError, match=r"session_bytes: .* MiB for the keys and values of sessions.*; lower it"
    ):
        engine.extend([encoded(range(90), [(89, 90)])], BUDGETS)


def test_a_bf16_checkpoint_is_computed_as_it_is(tmp_path: Path) -> None:
    oracle = Oracle(make_model(tmp_path, dtype=torch.bfloat16, **CONFIGS["llama"]))
    engine, tree = make_engine(tmp_path), encoded(range(90), [(89, 90)])
    assert_same(engine.extend([tree], BUDGETS), [tree], oracle)
    longer = encoded(range(120), [(110, 120)])
    assert_same(engine.extend([longer], BUDGETS), [longer], oracle)
