"""psykern's minicons scorer beside minicons' own, each with the same checkpoint: every method, its conventions, and
what is refused. The sentences are those of minicons' README and examples."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from minicons.scorer import IncrementalLMScorer, LMScorer
from support.checkpoints import CONFIGS, make_model
from support.exactness import TOLERANCE
from support.tokenizer_kinds import BOS, END, KINDS, save
from tokenizers import processors

import psykern
from psykern.integrations.minicons import PsykernScorer

PAIR = ["The keys to the cabinet are on the table.", "The keys to the cabinet is on the table."]
STIMULI = [*PAIR, "I was a matron in France.", "I was a mat in France.", "The sketch of those trucks hasn't"]
PREFIXES, QUERIES = ["a robin", "What is the capital of France?"], ["can fly", "Paris."]


@dataclass(frozen=True)
class Both:
    """One checkpoint in minicons and in psykern."""

    theirs: IncrementalLMScorer
    ours: PsykernScorer


# Words that begin with a mark of bytes or of SentencePiece, with a token in front of every text or none.
FAMILIES = {
    "like GPT-2": ("byte level", False, "qwen3"),
    "like Llama 3": ("byte level, words of Llama 3", True, "llama"),
    "like Llama 2": ("Prepend", True, "llama"),
}


def make_folder(folder: Path, kind: str, in_front: bool, config: str, **special: str) -> Path:
    tokenizer = KINDS[kind].build()[0]
    if not in_front:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    save(tokenizer, folder, **special)
    make_model(folder, vocab_size=tokenizer.get_vocab_size(), **CONFIGS[config])
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    kind, in_front, config = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("model") / "model"
    make_folder(folder, kind, in_front, config, bos_token=BOS if in_front else END, eos_token=END)
    return Both(IncrementalLMScorer(str(folder), dtype=torch.float32), PsykernScorer(folder))


def total(scores: torch.Tensor) -> torch.Tensor:
    return scores.sum(0)


def primed(lm: Any, **how: Any) -> Any:
    return lm.compute_stats(lm.prime_text(PREFIXES, QUERIES, bos_token=True), return_tensors=True, **how)


CALLS: dict[str, Callable[[Any], Any]] = {
    "mean of texts of several lengths": lambda lm: lm.sequence_score(STIMULI),
    "a text alone, in bits": lambda lm: lm.sequence_score(PAIR[0], reduction=total, base_two=True),
    "one token": lambda lm: lm.token_score(["a", "a b"]),
    "tokens made before": lambda lm: lm.sequence_score(lm.encode(STIMULI), reduction=lambda x: -x.sum(0).item()),
    "corrected": lambda lm: lm.sequence_score(STIMULI, reduction=total, bow_correction=True),
    "surprisal of tokens, corrected": lambda lm: lm.token_score(
        STIMULI, surprisal=True, base_two=True, bow_correction=True, bos_token=True, eos_token=True
    ),
    "probability of tokens, decoded": lambda lm: lm.token_score(STIMULI[0], prob=True, decode=True),
    "conditional": lambda lm: lm.conditional_score(PREFIXES, QUERIES),
    "conditional, corrected, separators": lambda lm: lm.conditional_score(
        PREFIXES, QUERIES, separator=[": ", "\n"], reduction=total, bow_correction=True, bos_token=True
    ),
    "conditional, no prefix": lambda lm: lm.conditional_score("", "can fly", separator="", prob=True, bos_token=True),
    "behind prefixes": primed,
    "behind prefixes, probability, corrected": lambda lm: primed(lm, prob=True, bow_correction=True),
    "words": lambda lm: lm.word_score(STIMULI, surprisal=True),
    "words cut by the caller": lambda lm: lm.word_score_tokenized(
        STIMULI, str.split, bow_correction=True, bos_token=True, surprisal=True, base_two=True
    ),
    "words behind prefixes": lambda lm: lm.conditional_word_score_tokenized(PREFIXES, QUERIES, str.split, prob=True),
    "next token": lambda lm: lm.next_word_distribution([*PREFIXES, PAIR[0]], bos_token=True, surprisal=True),
}


def assert_same(got: Any, expected: Any) -> None:
    """Types, lengths and texts alike, and numbers within the tolerance."""
    assert type(got) is type(expected)
    if isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, str):
        assert got == expected
    else:
        if isinstance(expected, torch.Tensor):
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:Failed to aggregate")  # what minicons says where its words are not the tokens
@pytest.mark.parametrize("call", CALLS)
def test_methods_equal_minicons(both: Both, call: str) -> None:
    assert_same(CALLS[call](both.ours), CALLS[call](both.theirs))


def test_ranks_equal_minicons(both: Both) -> None:
    """But for tokens that are as likely within the tolerance, of which either may come first."""
    encoded, offsets = both.ours.prime_text(PREFIXES, QUERIES)
    scores, ranks = both.ours.compute_stats((encoded, offsets), rank=True, bow_correction=True)
    own, theirs = both.theirs.compute_stats((encoded, offsets), rank=True, bow_correction=True)
    assert_same(scores, own)
    with torch.inference_mode():
        logprobs = both.theirs.model(**encoded).logits.log_softmax(-1)
    for i, offset in enumerate(offsets):
        ids = encoded["input_ids"][i][encoded["attention_mask"][i] != 0]
        table = logprobs[i, offset : len(ids) - 1]  # [n, V]
        chosen = table.gather(1, ids[offset + 1 :, None])
        first, last = (1 + (table > chosen + d).sum(1) for d in (TOLERANCE, -TOLERANCE))
        for of in (ranks, theirs):
            assert len(of[i]) == len(table) and all(map(between, of[i], first.tolist(), last.tolist()))
    tokens = both.ours.token_score(PAIR, rank=True, bos_token=True)
    assert [[triple[2] > 0 for triple in text][:2] for text in tokens] == [[False, True]] * 2  # the first: none, so 0


def between(value: int, first: int, last: int) -> bool:
    return first <= value <= last


@pytest.mark.filterwarnings("ignore:logprobs is deprecated")
def test_it_is_an_incremental_scorer_without_a_second_model(both: Both) -> None:
    assert isinstance(both.ours, IncrementalLMScorer) and isinstance(both.ours, LMScorer)
    assert list(both.ours.model.parameters()) == []
    assert both.ours.is_bow_tokenizer and set(both.ours.bow_subword_idx) == set(both.theirs.bow_subword_idx)
    for method in ("distribution", "logprobs"):
        with pytest.raises(NotImplementedError, match="gives minicons no logits, which its methods distribution, log"):
            getattr(both.ours, method)(both.ours.prepare_text(PAIR))
    with pytest.raises(NotImplementedError, match="fixed_label_score"):
        both.ours.fixed_label_score(PREFIXES, ["yes", "no"])


def test_a_call_is_one_trie_of_a_loaded_model(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[list[int]]] = []
    token_logprobs = psykern.Scorer.token_logprobs

    def spy(self: psykern.Scorer, sequences: Any, *others: Any, **more: Any) -> Any:
        calls.append(sequences)
        return token_logprobs(self, sequences, *others, **more)

    monkeypatch.setattr(psykern.Scorer, "token_logprobs", spy)
    lm = PsykernScorer(both.ours.scorer)
    assert_same(lm.sequence_score(STIMULI), both.ours.sequence_score(STIMULI))
    assert len(calls) == 2 and calls[0] == calls[1] and len(calls[0]) == len(STIMULI)
    with pytest.raises(TypeError, match=r"device, dtype: .* is loaded; say that to psykern\.load"):
        PsykernScorer(both.ours.scorer, device="cpu", dtype="float32")


def test_the_scorers_own_tokenizer_is_not_changed(both: Both) -> None:
    """minicons pads, and whoever asks the scorer itself must not get tokens to pad with."""
    scorer = both.ours.scorer
    before = scorer.surprisal("a").tokens.ids.tolist()
    both.ours.encode(STIMULI)
    assert scorer.surprisal("a").tokens.ids.tolist() == before
    assert scorer.tokenizer_folder == scorer.folder == Path(both.theirs.tokenizer.name_or_path)


def test_what_is_refused(both: Both) -> None:
    with pytest.raises(ValueError, match="prob, base_two: expected one of them at most"):
        both.ours.conditional_score(PREFIXES, QUERIES, prob=True, base_two=True)
    merged = both.ours.encode(["ab"]), [9]
    with pytest.raises(ValueError, match=r"prefix 0: it has 10 tokens alone, and . together with its stimulus"):
        both.ours.compute_stats(merged)


def test_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = (of for of in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "integrations.minicons" in of)
    exec(code, {})
    sums, tokens, conditional = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert sums[0] < sums[1] and len(conditional) == 2
    assert [len(of) for of in tokens] == [14, 14] and tokens[0][0] == ("The", 0.0)


def test_a_tokenizer_without_an_end_of_text(tmp_path: Path) -> None:
    """minicons would enlarge the model's vocabulary by a token to pad with; the probabilities are the model's own. An
    empty prefix has no token then, and what has none in front no probability."""
    folder = make_folder(tmp_path / "model", "byte level", False, "qwen3")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    lm = PsykernScorer(folder)
    loaded = psykern.load(folder, device="cpu")
    expected = [loaded.surprisal(text).tokens.logprob[1:].sum() for text in STIMULI]
    np.testing.assert_allclose(lm.sequence_score(STIMULI, reduction=total), expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match=r"prefix 1: it has no token, .* use bos_token=True"):
        lm.conditional_score(["a", ""], ["b", "b"])
