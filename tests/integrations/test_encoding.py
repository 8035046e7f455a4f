"""Texts that begin alike, against the tokenizer on each text as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from support.tokenizer_kinds import BOS, CORPUS, END, KINDS
from transformers import PreTrainedTokenizerFast

from psykern.integrations import encoding
from psykern.integrations.encoding import token_ids

PIECES = [
    *["<<J>>", " press", "press", "You", " 1", "23", "4567", ".", ",", "'s", "'", "\u2581", "<|", "end", "|>", "<bo"],
    *[" ", "  ", "\n", "\n\n", "\t \n", "\r\n", "\u00e9", "e", "\u0301", "\ufb01", "\u0130", "\u4f60", "\U0001f642"],
    *[END, BOS],
]
WITH_WORDS = (
    "byte level",
    "byte level, words of Llama 3",
    "byte level, NFC",
    "Metaspace first",
    "Unigram",
    "WordLevel",
)


def texts_of(seed: int) -> list[str]:
    """Prompts behind one of two fronts, each alone and with what may follow; some end inside a word or an added token,
    or in white space."""
    rng = np.random.default_rng(seed)

    def some(most: int) -> str:
        return "".join(rng.choice(PIECES, rng.integers(0, most)))

    fronts = [rng.choice(CORPUS) + some(30), some(60)]
    prompts = [rng.choice(fronts) + some(12) for _ in range(12)]
    return [prompt + after for prompt in prompts for after in ("", some(4), some(4), " J", "s", f"{END}x", " ")]


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each text that could be continued: whether it was."""
    seen: list[bool] = []
    own: Callable[..., Any] = encoding._continued

    def continued(*args: Any) -> Any:
        result = own(*args)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(encoding, "_continued", continued)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_text(kind: str, outcomes: list[bool]) -> None:
    definition, _ = KINDS[kind].build()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=definition)
    for seed in range(4):
        texts = texts_of(seed)
        for special in ({}, {"add_special_tokens": False}):
            expected = tokenizer(texts, **special)["input_ids"]
            assert token_ids(tokenizer, texts, special) == dict(zip(texts, expected, strict=True))
    if kind in WITH_WORDS:
        assert np.mean(outcomes) > 0.5


def test_a_token_behind_a_text_is_kept(outcomes: list[bool]) -> None:
    definition, _ = KINDS["byte level"].build()
    bos = definition.token_to_id(BOS)
    definition.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {BOS}", special_tokens=[(BOS, bos)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=definition)
    texts = texts_of(0)
    assert token_ids(tokenizer, texts, {}) == dict(zip(texts, tokenizer(texts)["input_ids"], strict=True))
    assert token_ids(tokenizer, [], {}) == {} and not outcomes


def test_an_added_token_may_reach_over_many_words(outcomes: list[bool]) -> None:
    definition, _ = KINDS["byte level, words of Llama 3"].build()
    definition.add_special_tokens(["<one two three four five six seven>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=definition)
    front = CORPUS[0] * 2 + "<one two three four five six seven"
    texts = [front, front + ">", front + "> and more", front + "!"]
    assert token_ids(tokenizer, texts, {}) == dict(zip(texts, tokenizer(texts)["input_ids"], strict=True))
    assert all(outcomes)


def test_many_texts_come_in_batches(outcomes: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH_CHARS", 300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS["byte level"].build()[0])
    texts = [text for seed in range(5) for text in texts_of(seed)]
    assert token_ids(tokenizer, texts, {}) == dict(zip(texts, tokenizer(texts)["input_ids"], strict=True))
    assert sum(outcomes) > 50
