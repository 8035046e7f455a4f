"""What a text's tokens come to under transformers in fp64, with the tokens of the whole text: the long way round."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
import torch
from support.checkpoints import CONFIGS, make_model
from support.exactness import in_fp64
from transformers import PreTrainedModel

from psykern.scoring.loading import load
from psykern.scoring.scorer import Scorer

FRONT = ["<|begin|>"]  # what the toy tokenizer puts in front of a text


@dataclass(frozen=True)
class Piece:
    """Tokens of a part of a text."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # counted in the part
    logprobs: np.ndarray  # fp64, NaN where no token stands before
    entropies: np.ndarray
    greedy: list[bool]


class Reference:
    """A model folder and what transformers makes of it."""

    def __init__(self, folder: Path, model: PreTrainedModel, front: Sequence[str]) -> None:
        self.folder = folder
        self.model = in_fp64(model)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.front = [self.tokenizer.token_to_id(token) for token in front]
        self._tables: dict[tuple[int, ...], torch.Tensor] = {}

    @cached_property
    def scorer(self) -> Scorer:
        return load(self.folder, device="cpu")

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """With what stands in front, which has no width."""
        of = self.tokenizer.encode(text, add_special_tokens=False)
        return self.front + of.ids, [(0, 0)] * len(self.front) + of.offsets

    @torch.inference_mode()
    def table(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, V] log-probabilities of the token behind each."""
        if tuple(ids) not in self._tables:
            logits = self.model(torch.tensor([list(ids)], dtype=torch.int64), use_cache=False).logits[0]
            self._tables[tuple(ids)] = logits.log_softmax(-1)
        return self._tables[tuple(ids)]

    def piece(self, ids: Sequence[int], places: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Piece:
        """The tokens at ``places``."""
        if not ids:
            return Piece([], [], np.empty(0), np.empty(0), [])
        table = self.table(ids)
        rows = [table[place - 1] if place else torch.full((table.shape[1],), torch.nan) for place in places]
        return Piece(
            ids=[ids[place] for place in places],
            offsets=list(offsets),
            logprobs=np.array([float(row[ids[place]]) for row, place in zip(rows, places, strict=True)]),
            entropies=np.array([-float((row.exp() * row).sum()) for row in rows]),
            greedy=[int(row.argmax()) == ids[place] for row, place in zip(rows, places, strict=True)],
        )

    def continuation(self, context: str, text: str, boundary: str = "joint") -> Piece:
        """All tokens of context and text as one string that overlap the text; or the text's own, put behind."""
        if boundary == "split":
            first, own = self.encode(context)[0], self.tokenizer.encode(text, add_special_tokens=False)
            return self.piece(first + own.ids, range(len(first), len(first) + len(own.ids)), own.offsets)
        (ids, offsets), a = self.encode(context + text), len(context)
        places = [i for i, (_, end) in enumerate(offsets) if end > a]
        return self.piece(ids, places, [(offsets[i][0] - a, offsets[i][1] - a) for i in places])


def toy_reference(folder: Path) -> Reference:
    from support.toy import make_toy

    return Reference(folder, make_toy(folder), FRONT)


def real_reference(shared: Path, name: str, folder: Path) -> Reference:
    """A small random model with one of the real tokenizers."""
    shutil.copytree(shared / "tokenizers" / name, folder)
    size = max(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values()) + 1
    model = make_model(folder, vocab_size=size, hidden_size=32, num_hidden_layers=2, **CONFIGS["llama"])
    return Reference(folder, model, ["<|begin_of_text|>"] if name == "llama-3.1" else [])
