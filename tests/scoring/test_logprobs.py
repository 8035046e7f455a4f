"""Continuations against transformers in fp64 on the tokens of the whole text."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.asked import Piece, Reference, real_reference, toy_reference
from support.exactness import INVARIANCE, TOLERANCE

from psykern.scoring.logprobs import logprobs_question
from psykern.scoring.results import Logprob

CONTEXTS = [
    "You choose between two slot machines labeled J and F.\nMachine? You press <<",
    "Rate each word from 1 to 100.\nword 0: <<",
    "<<first>> is what you say.\nYou say",
    "two  spaces  ",
    "x",
]
CONTINUATIONS = ["J", " <<J>>.", "10", "-7", "h\u00e4user, a dog", " ", "\n\n", "\u4f60\u597d \U0001f642"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return toy_reference(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return real_reference(shared, "olmo-dolma2", tmp_path_factory.mktemp("real") / "model")


def assert_equal(got: Logprob, expected: Piece, text: str) -> None:
    n = len(expected.ids)
    assert got.num_tokens == n and got.num_chars == len(text) and got.num_bytes == len(text.encode())
    assert got.logprob == pytest.approx(math.fsum(expected.logprobs), rel=0, abs=TOLERANCE * n**0.5)
    assert got.is_greedy == all(expected.greedy)
    assert got.per_token == got.logprob / n and got.per_byte == got.logprob / len(text.encode())
    assert got.per_char == got.logprob / len(text)
    straddles = expected.offsets[0][0] < 0
    assert got.flag == ("straddles" if straddles else None)


def assert_tokens(got: Logprob, expected: Piece, context: str, text: str) -> None:
    tokens = got.tokens
    assert tokens is not None
    assert tokens.ids.tolist() == expected.ids and tokens.ids.dtype == np.int32
    assert tokens.offsets.tolist() == [list(of) for of in expected.offsets] and tokens.offsets.dtype == np.int64
    whole, a = context + text, len(context)
    assert tokens.text == tuple(whole[a + start : a + end] for start, end in expected.offsets)
    np.testing.assert_allclose(tokens.logprob, expected.logprobs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(tokens.entropy, expected.entropies, rtol=0, atol=TOLERANCE)
    assert tokens.rank is None or ((tokens.rank == 1) == expected.greedy).all()


@pytest.mark.parametrize("boundary", ["joint", "split"])
def test_continuations_equal_transformers(toy: Reference, boundary: Any) -> None:
    got = toy.scorer.logprobs(CONTEXTS, [CONTINUATIONS] * len(CONTEXTS), boundary=boundary, tokens=True, ranks=True)
    straddling = 0
    for context, of in zip(CONTEXTS, got, strict=True):
        for text, one in zip(CONTINUATIONS, of, strict=True):
            expected = toy.continuation(context, text, boundary)
            assert_equal(one, expected, text)
            assert_tokens(one, expected, context, text)
            straddling += one.flag == "straddles"
    assert (straddling > 0) == (boundary == "joint")


def test_real_tokens_equal_transformers(real: Reference, shared: Path) -> None:
    with gzip.open(shared / "psych" / "frey2017mpl.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"]
    rng = np.random.default_rng(2)
    cuts = [sorted(rng.integers(1, 700, 2).tolist()) for _ in range(8)]
    contexts, continuations = [text[:a] for a, _ in cuts], [text[a : max(b, a + 1)] for a, b in cuts]
    got = real.scorer.logprobs(contexts, continuations, tokens=True)
    for context, of, one in zip(contexts, continuations, got, strict=True):
        expected = real.continuation(context, of)
        assert_equal(one, expected, of)
        assert_tokens(one, expected, context, of)


def test_ranks_are_counted_in_the_whole_vocabulary(toy: Reference) -> None:
    (got,) = toy.scorer.logprobs(CONTEXTS[:1], ["J and F, then 100"], tokens=True, ranks=True)
    ids, _ = toy.encode(CONTEXTS[0] + "J and F, then 100")
    table = toy.table(ids)[-len(got.tokens.ids) - 1 : -1]
    for row, token, rank in zip(table, got.tokens.ids.tolist(), got.tokens.rank.tolist(), strict=True):
        assert (row > row[token] + TOLERANCE).sum() < rank <= (row > row[token] - TOLERANCE).sum()


def test_answers_have_the_shape_of_what_is_asked(toy: Reference) -> None:
    ask = toy.scorer.logprobs
    one = ask("a b", " c").logprob
    assert one == pytest.approx(toy.continuation("a b", " c").logprobs.sum(), abs=TOLERANCE)
    assert [of.logprob for of in ask("a b", [" c", " d"])] == pytest.approx([one, ask("a b", " d").logprob], abs=1e-5)
    assert [of.logprob for of in ask(["a b", "x"], [" c", " d"])] == pytest.approx(
        [one, ask("x", " d").logprob], abs=1e-5
    )
    lists = ask(["a b", "x"], [[" c"], (" d", " e")])
    assert [len(of) for of in lists] == [1, 2] and lists[0][0].logprob == pytest.approx(one, abs=1e-5)
    assert ask([], []) == ask([], [], pmi_context="x") == []
    assert [of.logprob for of in ask(iter(["a b"]), iter([" c"]))] == pytest.approx([one], abs=1e-5)
    assert ask(np.array(["a b"]), np.array([" c"]))[0].logprob == pytest.approx(one, abs=1e-5)


def test_one_context_is_one_tree(toy: Reference) -> None:
    """It is not copied for each continuation."""
    question = logprobs_question(toy.scorer._reader, CONTEXTS[0], CONTINUATIONS)
    (tree,) = question.trees
    assert len(tree.branch_parent_tok) == len(CONTINUATIONS)
    assert len(tree.token_ids) == len(toy.encode(CONTEXTS[0])[0])


def test_pmi_sets_the_same_continuation_behind_another_context(toy: Reference) -> None:
    for pmi_context in ("Answer:", ""):
        got = toy.scorer.logprobs(CONTEXTS[:2], [["J", "F"], ["J", "10"]], pmi_context=pmi_context)
        for texts, of in zip([["J", "F"], ["J", "10"]], got, strict=True):
            for text, one in zip(texts, of, strict=True):
                expected = toy.continuation(pmi_context, text).logprobs.sum()
                assert one.unconditional == pytest.approx(expected, abs=TOLERANCE)
                assert one.pmi == one.logprob - one.unconditional
    assert toy.scorer.logprobs("a", "b").pmi is None


def test_the_first_token_of_all_has_no_probability(real: Reference) -> None:
    one, two, other = real.scorer.logprobs("", ["J", "J is pressed", "J"], tokens=True, ranks=True)
    assert real.scorer.logprobs("", "J").flag == one.flag == two.flag == other.flag == "no_context"
    for got, text in ((one, "J"), (two, "J is pressed")):
        expected = real.continuation("", text)
        assert math.isnan(got.logprob) and math.isnan(got.per_token) and got.num_tokens == 0 and not got.is_greedy
        assert np.isnan(got.tokens.logprob[0]) and got.tokens.rank[0] == 0
        np.testing.assert_allclose(got.tokens.logprob, expected.logprobs, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(got.tokens.entropy[1:], expected.entropies[1:], rtol=0, atol=TOLERANCE)
    merged = real.scorer.logprobs("t", "he dog")  # "the" is the first token of all
    assert math.isnan(merged.logprob) and merged.flag == "straddles;no_context"


def test_a_call_is_one_plan_whatever_the_company(toy: Reference) -> None:
    together = toy.scorer.logprobs(CONTEXTS, [CONTINUATIONS] * len(CONTEXTS))
    for context, of in zip(CONTEXTS, together, strict=True):
        for text, one in zip(CONTINUATIONS, of, strict=True):
            alone = toy.scorer.logprobs(context, text)
            assert abs(alone.logprob - one.logprob) <= INVARIANCE * one.num_tokens**0.5


@pytest.mark.parametrize(
    ("contexts", "continuations", "arguments", "error", "message"),
    [
        (None, "a", {}, TypeError, r"contexts: expected a str or a list of them, got None \(NoneType\)"),
        (b"a", "a", {}, TypeError, r"contexts: expected a str or a list of them, got b'a' \(bytes\)"),
        ({"a": 1}, ["a"], {}, TypeError, "contexts: expected a str or a list of them, got"),
        (["a", float("nan")], ["b", "c"], {}, TypeError, r"contexts\[1\]: expected a str, got nan \(float\)"),
        ("a", 7, {}, TypeError, r"continuations: expected a str or a list of them, got 7 \(int\)"),
        ("a", ["b", 7], {}, TypeError, r"continuations\[1\]: expected a str, got 7 \(int\)"),
        (["a"], "b", {}, TypeError, "continuations: expected a list with a str, or a list of them, for each context"),
        (["a"], [["b", None]], {}, TypeError, r"continuations\[0\]\[1\]: expected a str, got None"),
        (["a", "b"], ["c"], {}, ValueError, "continuations: expected 2, one for each context, got 1"),
        ("a\ud800", "b", {}, ValueError, r"contexts: lone surrogate U\+D800 at character 1, not Unicode text"),
        (["a"], ["b\ud800"], {}, ValueError, r"continuations\[0\]: lone surrogate U\+D800 at character 1"),
        ("a", [], {}, ValueError, "continuations: expected at least one continuation, got none"),
        (["a"], [[]], {}, ValueError, r"continuations\[0\]: expected at least one continuation, got none"),
        ("a", ["b", ""], {}, ValueError, r"continuations\[1\]: expected a text, got '', so it has no probability"),
        (["a"], [""], {}, ValueError, r"continuations\[0\]: expected a text, got ''"),
        ("a", "b", {"boundary": "both"}, ValueError, "boundary: expected one of 'joint', 'split', got 'both'"),
        ("a", "b", {"boundary": np.array(["joint", "split"])}, ValueError, "boundary: expected one of 'joint'"),
        ("a", "b", {"ranks": True}, ValueError, "ranks: a rank is a token's, so this needs tokens=True"),
        ("a", "b", {"pmi_context": 3}, TypeError, r"pmi_context: expected a str, got 3 \(int\)"),
        ("a", "b " * 5000, {}, ValueError, r"contexts: needs 10,00\d tokens of context, the model has 4,096"),
        (["c", "a b" * 5000], ["b", "c"], {}, ValueError, r"contexts\[1\]: needs .* the model has 4,096; shorten"),
    ],
)
def test_bad_input_is_refused_by_name(
    toy: Reference, contexts: Any, continuations: Any, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        toy.scorer.logprobs(contexts, continuations, **arguments)


def test_what_this_tokenizer_cannot_do_is_refused_by_name(real: Reference) -> None:
    with pytest.raises(ValueError, match="pmi_context: expected a text such as 'Answer:', got ''"):
        real.scorer.logprobs("a", "b", pmi_context="")
