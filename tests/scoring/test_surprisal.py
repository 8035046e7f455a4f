"""Surprisal against transformers in fp64, words by hand, and the correction for trailing white space by its sums."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.asked import Reference, real_reference, toy_reference
from support.checkpoints import CONFIGS, make_model
from support.exactness import INVARIANCE, TOLERANCE
from support.tiny import build_tiny
from support.tokenizer_kinds import KINDS, save
from tokenizers import pre_tokenizers, processors

from psykern.data.tokenizer import Tokenizer
from psykern.scoring.results import Surprisal
from psykern.scoring.surprisal import surprisal_question

TEXTS = [
    "You choose between two slot machines labeled J and F.",
    " Rate  each\nword from 1 to 100.\n\n",
    "h\u00e4user \u4f60\u597d \U0001f642 \u201cquoted\u201d e\u0301",
    "x",
    "",
    " \n ",
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return toy_reference(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return real_reference(shared, "qwen3", tmp_path_factory.mktemp("real") / "model")


def owner(text: str, start: int, end: int) -> int | None:
    """The word that a token counts to, one character at a time."""
    words = [range(*found.span()) for found in re.finditer(r"\S+", text)]
    for place in range(end - 1, max(0, start) - 1, -1):
        for number, word in enumerate(words):
            if place in word:
                return number
    return next((number for number, word in enumerate(words) if word.start >= start), None)


def assert_text(of: Reference, got: Surprisal, text: str, front: list[int]) -> None:
    ids, offsets = of.encode(text)
    ids, offsets = front + ids[len(of.front) :], offsets[len(of.front) :]
    expected = of.piece(ids, range(len(front), len(ids)), offsets)
    assert got.text == text and got.tokens.ids.tolist() == expected.ids
    assert got.tokens.offsets.tolist() == [list(of) for of in offsets]
    assert got.tokens.text == tuple(text[a:b] for a, b in offsets)
    np.testing.assert_allclose(got.tokens.logprob, expected.logprobs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got.token_surprisal, -expected.logprobs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got.token_bits * math.log(2), got.token_surprisal, rtol=1e-12)
    words = [found.span() for found in re.finditer(r"\S+", text)]
    assert got.word_offsets.tolist() == [list(word) for word in words] and got.word_offsets.shape == (len(words), 2)
    assert got.words == tuple(text.split())
    owners = [owner(text, *offset) for offset in offsets]
    for w in range(len(words)):
        own = [-expected.logprobs[i] for i, number in enumerate(owners) if number == w]
        assert got.word_num_tokens[w] == len(own)
        assert got.word_surprisal[w] == pytest.approx(sum(own), abs=TOLERANCE * len(own), nan_ok=True)
    np.testing.assert_allclose(got.word_bits * math.log(2), got.word_surprisal, rtol=1e-12)


def test_texts_equal_transformers(toy: Reference, real: Reference) -> None:
    for of in (toy, real):
        got = of.scorer.surprisal(TEXTS)
        for text, one in zip(TEXTS, got, strict=True):
            assert_text(of, one, text, of.front)
    one = real.scorer.surprisal(TEXTS[0], ranks=True)
    assert np.isnan(one.tokens.logprob[0]) and np.isnan(one.word_surprisal[0]) and one.tokens.rank[0] == 0
    assert not np.isnan(one.word_surprisal[1:]).any() and (one.tokens.rank[1:] > 0).all()


def test_the_first_token_follows_the_policy(toy: Reference, real: Reference) -> None:
    end = real.tokenizer.token_to_id("<|im_end|>")  # its eos_token; it has no bos_token and puts nothing in front
    assert_text(real, real.scorer.surprisal(TEXTS[0], first="bos"), TEXTS[0], [end])
    assert_text(toy, toy.scorer.surprisal(TEXTS[0], first="bos"), TEXTS[0], toy.front)
    assert_text(toy, toy.scorer.surprisal(TEXTS[0], first="null"), TEXTS[0], [])
    assert_text(toy, toy.scorer.surprisal("", first="null"), "", [])


@pytest.mark.parametrize("start", ["Read this:", "You see ", "x\n", "re"])
def test_a_start_is_read_and_not_reported(toy: Reference, start: str) -> None:
    for text in (" You press J.", "press J", "J"):
        got = toy.scorer.surprisal(text, start=start)
        expected = toy.continuation(start, text)
        assert got.text == text and got.tokens.ids.tolist() == expected.ids
        assert got.tokens.offsets.tolist() == [list(of) for of in expected.offsets]
        np.testing.assert_allclose(got.tokens.logprob, expected.logprobs, rtol=0, atol=TOLERANCE)
        assert got.words == tuple(text.split()) and np.isfinite(got.word_surprisal).all()
        assert got.word_surprisal.sum() == pytest.approx(-expected.logprobs.sum(), abs=TOLERANCE * len(expected.ids))


def test_a_token_of_two_words_counts_to_the_later(tmp_path: Path) -> None:
    backend = build_tiny(merges=("a \u0120", "a\u0120 b"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    of = Reference(tmp_path, make_model(tmp_path, vocab_size=300, **CONFIGS["llama"]), [])
    got = of.scorer.surprisal("x a bc a")
    assert got.tokens.text == ("x", " ", "a b", "c", " ", "a")
    assert got.word_num_tokens.tolist() == [1, 1, 2, 2]  # of the second word the space before it alone
    assert_text(of, got, "x a bc a", [])
    got = of.scorer.surprisal("xa bc")
    assert got.tokens.text == ("x", "a b", "c") and got.word_num_tokens.tolist() == [1, 2]
    got = of.scorer.surprisal("a b", first="null")
    assert got.word_num_tokens.tolist() == [0, 1] and np.isnan(got.word_surprisal).all()


def begins_word(of: Reference) -> np.ndarray:
    """[V] by how the vocabulary spells its tokens."""
    size = of.model.config.vocab_size
    begins = np.zeros(size, np.bool_)
    for token, number in of.tokenizer.get_vocab().items():
        begins[number] = token[0] in "\u0120\u010a\u0109\u010d\u010b\u010c\u011c\u011d\u011e\u011f"
    for number, added in of.tokenizer.get_added_tokens_decoder().items():
        begins[number] |= added.special
    return begins


@pytest.mark.parametrize("text", ["You press J and win 10 points.", " You  press\nJ ", "x", "Oh yes.\n\nNo, of course"])
def test_the_correction_equals_its_formula(toy: Reference, real: Reference, text: str) -> None:
    for of in (toy, real):
        plain, got = of.scorer.surprisal(text), of.scorer.surprisal(text, trailing_space=True)
        ids, offsets = of.encode(text)
        mass = np.log(of.table(ids).exp().numpy()[:, begins_word(of)[: of.table(ids).shape[1]]].sum(axis=1))
        owners = [None] * len(of.front) + [owner(text, *offset) for offset in offsets[len(of.front) :]]
        for w, (_, end) in enumerate(got.word_offsets.tolist()):
            own = [i for i, number in enumerate(owners) if number == w]
            expected = plain.word_surprisal[w]
            if text[offsets[own[0]][0]].isspace():
                expected += mass[own[0] - 1] if own[0] else math.nan
            if offsets[own[-1]][1] == end:
                expected -= mass[own[-1]]
            assert got.word_surprisal[w] == pytest.approx(expected, abs=2 * TOLERANCE, nan_ok=True)
        np.testing.assert_allclose(plain.tokens.logprob, got.tokens.logprob, rtol=0, atol=INVARIANCE)
    assert (got.word_surprisal != plain.word_surprisal).all()


def test_white_space_in_front_of_a_text_is_corrected_for(toy: Reference, tmp_path: Path) -> None:
    """That of ``start``, and that which a tokenizer puts there itself; not a part of a character."""
    ask = toy.scorer.surprisal
    expected = ask(" press J", start="You", trailing_space=True)
    got = ask("press J", start="You ", trailing_space=True)
    assert got.tokens.offsets[0, 0] == -1
    np.testing.assert_allclose(got.word_surprisal, expected.word_surprisal, rtol=0, atol=INVARIANCE)
    (plain,), (got,) = (ask(["x\u3000y"], trailing_space=on) for on in (False, True))
    mass = np.log(toy.table(toy.encode("x\u3000y")[0]).exp().numpy()[:, begins_word(toy)].sum(axis=1))
    assert got.word_surprisal[1] == pytest.approx(plain.word_surprisal[1] - mass[-1], abs=2 * TOLERANCE)
    folder = save(KINDS["Metaspace always"].build()[0], tmp_path)
    of = Reference(folder, make_model(folder, vocab_size=600, **CONFIGS["llama"]), ["<bos>"])
    one, two = (of.scorer.surprisal(text, trailing_space=True) for text in ("You see", " You see"))
    assert one.tokens.ids.tolist() == two.tokens.ids.tolist()
    np.testing.assert_allclose(one.word_surprisal, two.word_surprisal, rtol=0, atol=INVARIANCE)


def test_corrected_probabilities_of_words_sum_to_one_at_most(toy: Reference) -> None:
    """All words of one token, and those of two of a random first one: as a word of the corrected sums is whole, none
    holds another. Uncorrected, each of the first holds all that begin with it."""
    context = "Rate each word"
    begins = begins_word(toy)
    ids = toy.encode(context)[0]
    words = [i for t, i in toy.tokenizer.get_vocab().items() if t[0] == "\u0120" and len(t) > 1 and t.isalpha()]
    inner = [i for t, i in toy.tokenizer.get_vocab().items() if t.isalpha() and not begins[i] and i < 500]
    table = toy.table(ids)[-1].exp()
    before = float(table[torch.from_numpy(begins)].sum())
    total = holds = 0.0
    for word in words:
        behind = toy.table([*ids, word])[-1].exp()
        ends = float(behind[torch.from_numpy(begins)].sum())
        own = float(table[word]) / before
        total += own * ends + own * float(behind[inner].sum())  # two tokens, ending or not
        holds += own + own * float(behind[inner].sum())
        text = context + toy.tokenizer.decode([word])
        if toy.encode(text)[0] == [*ids, word]:
            corrected = toy.scorer.surprisal(text, trailing_space=True).word_surprisal[-1]
            assert math.exp(-corrected) == pytest.approx(own * ends, rel=1e-3)
    assert total <= 1 < holds


@pytest.mark.parametrize(
    ("texts", "arguments", "error", "message"),
    [
        (None, {}, TypeError, "texts: expected a str or a list of them, got None"),
        (["a", 2.5], {}, TypeError, r"texts\[1\]: expected a str, got 2.5 \(float\)"),
        ("\ud800", {}, ValueError, "texts: lone surrogate"),
        ("a", {"start": None}, TypeError, "start: expected a str, got None"),
        ("a", {"first": "eos"}, ValueError, "first: expected one of 'auto', 'bos', 'null', got 'eos'"),
        ("a " * 5000, {}, ValueError, "texts: needs .* tokens of context, the model has 4,096"),
    ],
)
def test_bad_input_is_refused_by_name(
    toy: Reference, texts: Any, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        toy.scorer.surprisal(texts, **arguments)


def test_what_a_tokenizer_cannot_do_is_refused_by_name(real: Reference, tmp_path: Path) -> None:
    reader = replace(real.scorer._reader, bos=None)
    with pytest.raises(
        ValueError, match="first: 'bos' needs a bos_token or an eos_token, and this tokenizer has neither"
    ):
        surprisal_question(reader, "a", first="bos")
    word_level = Tokenizer.load(save(KINDS["WordLevel"].build()[0], tmp_path))
    with pytest.raises(ValueError, match="trailing_space: this tokenizer has no tokens that begin with the space"):
        surprisal_question(replace(reader, tokenizer=word_level), "a", trailing_space=True)
