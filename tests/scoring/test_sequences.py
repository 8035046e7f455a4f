"""Sequences of token ids, taken as they are, against transformers' in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.asked import Reference, toy_reference
from support.exactness import TOLERANCE

SEQUENCES = [[5, 9, 4, 7, 7], [5, 9, 4, 8], [3, 1, 2], [5], [5, 9, 4, 7]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return toy_reference(tmp_path_factory.mktemp("toy") / "model")


def test_each_token_given_all_before_it(toy: Reference) -> None:
    mass = [7, 8, 7]
    got = toy.scorer.token_logprobs(SEQUENCES, [1, 3, 2, 1, 4], ranks=True, mass=mass)
    for ids, start, of in zip(SEQUENCES, [1, 3, 2, 1, 4], got, strict=True):
        table = toy.table(ids)[start - 1 : len(ids) - 1].numpy()
        own = np.array(ids[start:], np.int64)
        expected = table[np.arange(len(own)), own]
        assert of.ids.tolist() == ids[start:]
        np.testing.assert_allclose(of.logprob, expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(of.entropy, -(np.exp(table) * table).sum(1), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(of.mass, np.log(np.exp(table[:, [7, 8]]).sum(1)), rtol=0, atol=TOLERANCE)
        assert of.rank is not None and of.rank.tolist() == (1 + (table > expected[:, None]).sum(1)).tolist()
        assert of.is_greedy.tolist() == (table.argmax(1) == own).tolist()


@pytest.mark.parametrize(
    "one", [[5, 9, 4, 8], np.array([5, 9, 4, 8]), torch.tensor([5, 9, 4, 8])], ids=["list", "numpy", "torch"]
)
def test_one_sequence_is_answered_by_one(toy: Reference, one: Any) -> None:
    alone = toy.scorer.token_logprobs(one, 3)
    (among, _) = toy.scorer.token_logprobs([one, [1, 2]], [3, 1])
    assert alone.ids.tolist() == among.ids.tolist() == [8]
    assert alone.logprob == among.logprob and alone.rank is None and alone.mass is None


def test_nothing_to_score(toy: Reference) -> None:
    assert toy.scorer.token_logprobs([]) == []
    for of in toy.scorer.token_logprobs([[], [3], [3, 4]], [1, 1, 2]):
        assert of.ids.size == of.logprob.size == 0


@pytest.mark.parametrize(
    ("sequences", "keywords", "error", "said"),
    [
        ("text", {}, TypeError, "sequences: expected a list of token ids, or a list of such lists, got 'text'"),
        ([[1, 2], "ab"], {}, TypeError, r"sequences\[1\]: expected a list of token ids, got 'ab'"),
        ([[1, 2.5]], {}, TypeError, r"sequences\[0\]: expected a list of token ids, got one of float64 \[2\]"),
        ([[1, 2], [1, 512]], {}, ValueError, r"sequences\[1\]: expected 0 to 511, the model's tokens, got 512"),
        ([[1, -2]], {}, ValueError, r"sequences\[0\]: expected 0 to 511, the model's tokens, got -2"),
        ([[1, 2]], {"starts": 0}, ValueError, r"starts: expected 1 to 2 for sequences\[0\].*no probability"),
        ([1, 2], {"starts": [3]}, ValueError, "starts: expected 1 to 2 for sequences, which has 2 tokens, got 3"),
        ([[1, 2]], {"starts": [1, 1]}, ValueError, "starts: expected 1, one for each sequence, got 2"),
        ([[1, 2]], {"starts": [1.0]}, TypeError, "starts: expected whole numbers, got 1.0"),
        ([[1, 2]], {"mass": []}, ValueError, "mass: expected at least one token id, got none"),
        ([[1, 2]], {"mass": [512]}, ValueError, "mass: expected 0 to 511"),
        ([[1] * 100_000], {}, ValueError, r"sequences\[0\]: 100,000 tokens, of which all but the last are read"),
    ],
)
def test_what_cannot_be_scored(toy: Reference, sequences: Any, keywords: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        toy.scorer.token_logprobs(sequences, **keywords)


def test_as_many_tokens_as_the_context_has_are_read(toy: Reference) -> None:
    most = toy.scorer.model.spec.max_positions
    (of,) = toy.scorer.token_logprobs([[1] * (most + 1)], most)
    assert np.isfinite(of.logprob).all()
    with pytest.raises(ValueError, match="shorten it"):
        toy.scorer.token_logprobs([[1] * (most + 2)], most)
