"""minicons' scorer of autoregressive models, computed by psykern: its methods, arguments and numbers.

>>> from psykern.integrations.minicons import PsykernScorer
>>> lm = PsykernScorer("path/to/model")  # where minicons has scorer.IncrementalLMScorer("path/to/model")
>>> lm.sequence_score(["The keys are here.", "The keys is here."], reduction=lambda x: x.sum(0).item())

The rule: whatever minicons does with texts, token ids and scores is its own code, inherited, so that its conventions
hold: a text has no beginning-of-text token but what the tokenizer puts there or ``bos_token=True`` asks for, its first
token has no probability (``token_score`` says 0.0), logs are natural unless ``base_two``. What its methods ask of the
model goes through ``compute_stats`` and ``next_word_distribution``, and these two are psykern's. A call is one trie:
give it all sentences at once, as no batch size needs to be found, and what they begin with alike is computed once.

The correction for beginnings of words (``bow_correction``) is that of Pimentel and Meister (2024) and Oh and Schuler
(2024), as minicons reads it: with B(c) = P(the next token begins a word | c), a scored token t_i behind the context c_i

    s'(t_i) = s(t_i) + log B(c_i t_i), where t_{i+1} begins a word or there is none
                     - log B(c_i),     where t_i begins a word and is not the first that is scored
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from psykern import Scorer, TokenLogprobs, load

try:
    from minicons.scorer import IncrementalLMScorer
except ModuleNotFoundError as error:
    if error.name != "minicons":
        raise
    raise ModuleNotFoundError("no minicons here: pip install 'psykern[minicons]'", name="minicons") from error


class PsykernScorer(IncrementalLMScorer):
    """An ``IncrementalLMScorer`` whose model is a :class:`psykern.Scorer`.

    model: a folder or a hub id, or what :func:`psykern.load` gave. device: ``cpu`` where nothing is said, as in
    minicons. tokenizer: another one than the model's, or a name; the model's is read as minicons reads it, by
    ``AutoTokenizer``. settings: further arguments of :func:`psykern.load`, such as ``dtype`` (float32 on a CPU, where
    minicons takes the checkpoint's). :attr:`scorer` is the loaded model. Tensors of scores are on the CPU.

    Raises TypeError for a loaded model with a device or settings, and what :func:`psykern.load` raises.
    """

    def __init__(
        self, model: str | Path | Scorer, device: str | None = None, tokenizer: Any = None, **settings: Any
    ) -> None:
        if isinstance(model, Scorer) and (device is not None or settings):
            named = ", ".join([*(["device"] if device is not None else []), *settings])
            raise TypeError(f"{named}: {model.name} is loaded; say that to psykern.load")
        self.scorer = model if isinstance(model, Scorer) else load(model, device=device or "cpu", **settings)
        of = self.scorer.tokenizer_folder if tokenizer is None else tokenizer
        own = AutoTokenizer.from_pretrained(of, trust_remote_code=False) if isinstance(of, str | Path) else of
        super().__init__(_NoModule(), device="cpu", tokenizer=_with_padding(own))

    def compute_stats(
        self,
        batch: Iterable[Any],
        rank: bool = False,
        prob: bool = False,
        base_two: bool = False,
        return_tensors: bool = False,
        bow_correction: bool = False,
    ) -> Any:
        """log P of each scored token, in nats, of what ``prepare_text`` or ``prime_text`` gave.

        A list with a list of floats for each text, or with ``return_tensors`` a tensor [n] float32. ``rank``: a pair of
        that and as many lists of ranks, 1: no token is likelier. ``prob``: probabilities. ``base_two``: in bits.
        ``bow_correction``: see the module; without effect where a tokenizer's words begin with no mark.

        Raises ValueError for ``prob`` with ``base_two``, a prefix without a token or with more than the whole text has,
        token ids that the model does not have, and a text that is longer than its context.
        """
        if prob and base_two:
            raise ValueError("prob, base_two: expected one of them at most, as a probability has no base; got both")
        encoded, offsets = batch
        texts = _unpadded(encoded)
        starts = _starts(texts, offsets)
        if bow_correction and self.is_bow_tokenizer:
            # The last correction is of what would follow the text, so one token more is asked for, whichever it is.
            extended = [[*ids, 0] for ids in texts]
            # Sorted, as minicons has them in the order of a hash table, and sums round by their order.
            answers = self.scorer.token_logprobs(extended, starts, ranks=rank, mass=sorted(self.bow_subword_idx))
            scores = [self._corrected(answer) for answer in answers]
        else:
            answers = self.scorer.token_logprobs(texts, starts, ranks=rank)
            scores = [answer.logprob for answer in answers]
        tensors = [_converted(of, prob, base_two) for of in scores]
        told = tensors if return_tensors else [of.tolist() for of in tensors]
        return (told, [_ranks(a)[: len(of)] for a, of in zip(answers, scores, strict=True)]) if rank else told

    def next_word_distribution(
        self,
        queries: str | Sequence[str],
        bos_token: bool = False,
        eos_token: bool = False,
        surprisal: bool = False,
        chat: bool = False,
    ) -> torch.Tensor:
        """log P of every token of the vocabulary behind each text, in nats: [n, V] float32.

        ``surprisal``: of the other sign. Raises ValueError for a text without a token.
        """
        texts = _unpadded(self.encode(queries, bos_token, eos_token, chat=chat))
        logprobs = torch.from_numpy(self.scorer.distributions(texts))
        return -logprobs if surprisal else logprobs

    def _corrected(self, answer: TokenLogprobs) -> np.ndarray:
        """[n] float32: the scored tokens of a text with the correction; ``answer`` has one token more."""
        assert answer.mass is not None
        if len(answer.ids) == 0:
            return answer.logprob
        begins = np.array([self.bow_subwords[token] for token in answer.ids[:-1].tolist()] + [True])  # behind it: none
        ends = np.where(begins[1:], answer.mass[1:], 0)
        begins[0] = False
        return answer.logprob[:-1] + ends - np.where(begins, answer.mass, 0)[:-1]


class _NoModule(torch.nn.Module):
    """In the place of the model that minicons holds: a second one would take the memory once more."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            "psykern gives minicons no logits, which its methods distribution, logprobs and fixed_label_score ask for; "
            "use compute_stats, token_score, conditional_score or next_word_distribution"
        )

    generate = forward


def _with_padding(tokenizer: Any) -> Any:
    """With a token to pad with, where there is none: minicons would enlarge the model's vocabulary for it. What is
    padded is never read."""
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token or "<pad>"})
    return tokenizer


def _unpadded(encoded: Any) -> list[list[int]]:
    """The tokens of each text."""
    rows = zip(encoded["input_ids"].tolist(), encoded["attention_mask"].tolist(), strict=True)
    return [[token for token, is_there in zip(ids, mask, strict=True) if is_there] for ids, mask in rows]


def _starts(texts: Sequence[Sequence[int]], offsets: Sequence[int]) -> list[int]:
    """The first scored token of each text. ``offsets``: tokens in front of it, but for the first of all."""
    for i, (ids, offset) in enumerate(zip(texts, offsets, strict=True)):
        if offset < 0:
            raise ValueError(
                f"prefix {i}: it has no token, so the first token behind it has no probability; use bos_token=True"
            )
        if offset > max(0, len(ids) - 1):
            raise ValueError(
                f"prefix {i}: it has {offset + 1} tokens alone, and {len(ids)} together with its stimulus, as their "
                "tokens merge; put a separator between them"
            )
    return [offset + 1 for offset in offsets]


def _converted(logprob: np.ndarray, prob: bool, base_two: bool) -> torch.Tensor:
    """[n] float32."""
    scores = torch.tensor(logprob)
    return scores.exp() if prob else scores / math.log(2) if base_two else scores


def _ranks(answer: TokenLogprobs) -> list[int]:
    assert answer.rank is not None
    ranks: list[int] = answer.rank.tolist()
    return ranks
