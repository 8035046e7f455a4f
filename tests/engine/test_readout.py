"""Ranks, likeliest tokens, mass and whole distributions against transformers' logits in fp64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import CONFIGS, make_model, oracle_logprobs
from support.exactness import TOLERANCE, in_fp64
from support.groups import encoded, random_group, wanted
from transformers import PreTrainedModel

from psykern.core.types import EncodedTranscript, TargetScores, Wanted
from psykern.engine import readout
from psykern.engine.engine import Engine
from psykern.engine.plan import plan, scores_of_each
from psykern.kernels.compute import Compute
from psykern.models import head
from psykern.models.model import Model

V = 320
MASS = (0, 7, 8, 300, 319)
EVERYTHING = Wanted(rank=True, top_k=5, full=True, mass=MASS)


@pytest.fixture(scope="module")
def group() -> list[EncodedTranscript]:
    return random_group(np.random.default_rng(8), 6, V, 3)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at a time, and a head of four tiles."""
    monkeypatch.setattr(readout, "_TABLE", 3 * V)
    monkeypatch.setattr(head, "_TILE", 90)


def run(folder: Path, group: list[EncodedTranscript], wanted: Wanted) -> TargetScores:
    return Engine(Model(folder, Compute.resolve("cpu"))).run(
        plan(group, wave_tokens=60, batch_tokens=32, min_share=4, wanted=wanted)
    )


def tables(group: list[EncodedTranscript], oracle: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """[targets, V] log-probabilities in fp64, and the targets."""
    oracle = in_fp64(oracle)
    rows = [oracle_logprobs(oracle, np.array(context))[-1] for context, _ in wanted(group)]
    return torch.stack(rows), torch.tensor([token for _, token in wanted(group)])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_everything_equals_transformers(
    name: str, dtype: torch.dtype, tmp_path: Path, group: list[EncodedTranscript]
) -> None:
    oracle = make_model(tmp_path, dtype=dtype, **CONFIGS[name])
    scores = run(tmp_path, group, EVERYTHING)
    table, tokens = tables(group, oracle)
    assert scores.full is not None and scores.full.dtype == np.float32
    np.testing.assert_allclose(scores.full, table, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.exp(scores.full.astype(np.float64)).sum(axis=1), 1, rtol=0, atol=TOLERANCE)
    assert scores.mass is not None
    np.testing.assert_allclose(scores.mass, table[:, list(MASS)].logsumexp(dim=1), rtol=0, atol=TOLERANCE)

    own = table.gather(1, tokens[:, None])
    least = 1 + (table > own + TOLERANCE).sum(dim=1).numpy()
    most = (table > own - TOLERANCE).sum(dim=1).numpy()  # itself included
    assert scores.rank is not None and scores.rank.dtype == np.int64
    assert (least <= scores.rank).all() and (scores.rank <= most).all() and (least == most).mean() > 0.9
    assert ((scores.rank == 1) == scores.is_argmax).all() and scores.rank.max() > 200

    assert scores.top_ids is not None and scores.top_logprobs is not None and scores.top_ids.shape == (len(own), 5)
    best = table.topk(5).values.numpy()
    np.testing.assert_allclose(scores.top_logprobs, best, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.take_along_axis(table.numpy(), scores.top_ids, 1), best, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("small_tiles")
def test_what_is_not_wanted_is_not_there_and_changes_nothing(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["qwen3"])
    plain, all_of_it = run(tmp_path, group, Wanted()), run(tmp_path, group, EVERYTHING)
    assert plain.rank is plain.top_ids is plain.top_logprobs is plain.full is plain.mass is None
    for name in ("logprob", "entropy", "is_argmax"):
        assert getattr(plain, name).tobytes() == getattr(all_of_it, name).tobytes()
    only_rank = run(tmp_path, group, Wanted(rank=True))
    assert only_rank.rank is not None and only_rank.full is None
    assert only_rank.rank.tolist() == ([] if all_of_it.rank is None else all_of_it.rank.tolist())


def test_of_equal_tokens_the_lower_id_ranks_first(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    """Two rows of the head are equal; whoever asks for either is told ranks that follow each other."""
    model = make_model(tmp_path, **CONFIGS["llama"])
    with torch.no_grad():
        model.lm_head.weight[9] = model.lm_head.weight[5]
    model.save_pretrained(tmp_path)
    scores = run(tmp_path, [ending_in(group[0], token) for token in (5, 9)], Wanted(rank=True, full=True))
    assert scores.rank is not None and scores.full is not None
    lower, higher = scores.rank.reshape(2, -1)
    assert (higher == lower + 1).all()
    assert (lower - 1 == (scores.full > scores.full[:, 5:6]).sum(axis=1)[: len(lower)]).all()


def ending_in(of: EncodedTranscript, token: int) -> EncodedTranscript:
    """At each place of a transcript an option of one token."""
    places = range(1, len(of.token_ids) + 1)
    return encoded(of.token_ids.tolist(), [(1, 1)], [(0, place, [token], 0) for place in places])


def test_a_rank_is_1_where_the_scores_say_so_however_products_round() -> None:
    table = torch.tensor([[0.3, 0.5, 0.4], [0.3, 0.5, 0.4]])
    ranks = readout._ranks(table, np.array([0, 0, 1]), torch.tensor([1, 2, 0]), torch.tensor([False, True, False]))
    assert ranks.tolist() == [2, 1, 3]


def test_each_item_is_given_its_own(tmp_path: Path, group: list[EncodedTranscript]) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    whole = run(tmp_path, group, EVERYTHING)
    for item, own in zip(group, scores_of_each(group, whole), strict=True):
        alone = run(tmp_path, [item], EVERYTHING)
        assert own.full is not None and alone.full is not None and own.full.shape == alone.full.shape
        np.testing.assert_allclose(own.full, alone.full, rtol=0, atol=TOLERANCE)
