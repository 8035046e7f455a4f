"""Distributions of the next token against transformers' in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.asked import Reference, real_reference, toy_reference
from support.exactness import TOLERANCE

from psykern.scoring.distributions import distributions_question

CONTEXTS = ["You press <<", "x", "Rate each word from 1 to 100.\nword 0: <<", ""]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return toy_reference(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def tables(toy: Reference) -> list[np.ndarray]:
    return [toy.table(toy.encode(context)[0]).numpy() for context in CONTEXTS]


def close(got: Any, expected: Any) -> None:
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_whole_distributions(toy: Reference, tables: list[np.ndarray]) -> None:
    got = toy.scorer.distributions(CONTEXTS)
    assert got.shape == (len(CONTEXTS), 512)
    close(got, np.stack([table[-1] for table in tables]))
    np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(axis=1), 1, rtol=0, atol=1e-4)
    close(toy.scorer.distributions(CONTEXTS[0]), tables[0][-1])
    for one, table in zip(toy.scorer.distributions(CONTEXTS, at="all"), tables, strict=True):
        close(one, table)
    close(toy.scorer.distributions(CONTEXTS[0], at="all"), tables[0])
    close(toy.scorer.distributions(CONTEXTS[:3], at=[2, 1]), np.stack([table[[1, 0]] for table in tables[:3]]))
    close(toy.scorer.distributions(CONTEXTS[2], at=(3,)), tables[2][[2]])


def test_chosen_tokens(toy: Reference, tables: list[np.ndarray]) -> None:
    ids = [511, 0, 7, 7]
    close(toy.scorer.distributions(CONTEXTS, token_ids=ids), np.stack([table[-1, ids] for table in tables]))
    close(toy.scorer.distributions(CONTEXTS[0], token_ids=np.array(ids)), tables[0][-1, ids])
    for one, table in zip(toy.scorer.distributions(CONTEXTS, token_ids=ids, at="all"), tables, strict=True):
        close(one, table[:, ids])
    at = toy.scorer.distributions(CONTEXTS[:2], token_ids=ids, at=[1, 2])
    close(at, np.stack([table[:2][:, ids] for table in tables[:2]]))


def test_chosen_tokens_are_gathered_and_not_cut_out_of_all(toy: Reference) -> None:
    question = distributions_question(toy.scorer._reader, CONTEXTS, token_ids=[1, 2])
    assert not question.wanted.full and not question.wanted.top_k


def test_likeliest_tokens(toy: Reference, tables: list[np.ndarray]) -> None:
    got = toy.scorer.distributions(CONTEXTS, top_k=3)
    assert got.ids.shape == got.logprobs.shape == (len(CONTEXTS), 3)
    for ids, logprobs, table in zip(got.ids, got.logprobs, tables, strict=True):
        close(logprobs, np.sort(table[-1])[::-1][:3])
        close(logprobs, table[-1, ids])
    one = toy.scorer.distributions(CONTEXTS[0], top_k=512)
    assert sorted(one.ids.tolist()) == list(range(512))
    each = toy.scorer.distributions(CONTEXTS, top_k=2, at="all")
    assert [of.ids.shape for of in each] == [(len(table), 2) for table in tables]
    assert toy.scorer.distributions(CONTEXTS[:3], top_k=2, at=[1, 2]).ids.shape == (3, 2, 2)


@pytest.mark.parametrize("at", [np.array([2, 1]), range(2, 0, -1), iter([2, 1])], ids=["array", "range", "iterator"])
def test_places_are_any_list_of_numbers(toy: Reference, tables: list[np.ndarray], at: Any) -> None:
    for got, table in zip(toy.scorer.distributions(CONTEXTS[:2], at=at), tables, strict=False):
        close(got, table[[1, 0]])


def test_contexts_may_be_token_ids(toy: Reference, tables: list[np.ndarray]) -> None:
    ids = [toy.encode(text)[0] for text in CONTEXTS]
    np.testing.assert_array_equal(toy.scorer.distributions(ids), toy.scorer.distributions(CONTEXTS))
    close(toy.scorer.distributions([np.array(ids[1][:2])]), tables[1][[1]])


@pytest.mark.parametrize(
    ("contexts", "arguments", "error", "message"),
    [
        (1, {}, TypeError, r"contexts: expected a str or a list of them, got 1 \(int\)"),
        (["a", None], {}, TypeError, r"contexts\[1\]: expected a str, got None"),
        ("\ud800", {}, ValueError, "contexts: lone surrogate"),
        ([], {}, ValueError, "contexts: expected at least one text, got none"),
        ([[1], []], {}, ValueError, r"contexts\[1\]: expected at least one token id, got none"),
        ([[1, 512]], {}, ValueError, r"contexts\[0\]\[1\]: expected 0 to 511, the model's tokens, got 512"),
        ("a", {"token_ids": [1], "top_k": 2}, ValueError, "token_ids, top_k: expected one of them at most, got both"),
        ("a", {"token_ids": []}, ValueError, "token_ids: expected at least one token id, got none"),
        ("a", {"token_ids": 3}, TypeError, r"token_ids: expected a list of token ids, got 3 \(int\)"),
        ("a", {"token_ids": [1, "J"]}, TypeError, r"token_ids\[1\]: expected a token id, got 'J' \(str\)"),
        ("a", {"token_ids": [512]}, ValueError, r"token_ids\[0\]: expected 0 to 511, the model's tokens, got 512"),
        ("a", {"token_ids": [-1]}, ValueError, r"token_ids\[0\]: expected 0 to 511"),
        ("a", {"top_k": 0}, ValueError, "top_k: expected 1 to 512, the model's vocabulary, got 0"),
        ("a", {"top_k": 1.5}, ValueError, "top_k: expected 1 to 512, the model's vocabulary, got 1.5"),
        ("a", {"at": "start"}, ValueError, "at: expected 'end', 'all' or a list of numbers of tokens, got 'start'"),
        ("a", {"at": 3}, TypeError, r"at: expected 'end', 'all' or a list of numbers of tokens, got 3 \(int\)"),
        ("a", {"at": []}, ValueError, "at: expected at least one number of tokens, got none"),
        (["a b c", "a"], {"at": [1, 3]}, ValueError, r"at\[1\]: expected 1 to 2, the tokens of contexts\[1\], got 3"),
        ("a b " * 4000, {}, ValueError, "contexts: needs .* tokens of context, the model has 4,096"),
    ],
)
def test_bad_input_is_refused_by_name(
    toy: Reference, contexts: Any, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        toy.scorer.distributions(contexts, **arguments)


def test_nothing_is_known_behind_no_token(shared: Path, tmp_path: Path) -> None:
    real = real_reference(shared, "olmo-dolma2", tmp_path / "model")
    with pytest.raises(ValueError, match=r"contexts\[1\]: expected a text of at least one token"):
        real.scorer.distributions(["a", ""])
    close(real.scorer.distributions("a"), real.table(real.encode("a")[0])[-1].numpy())
