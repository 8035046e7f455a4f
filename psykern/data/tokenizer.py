"""A model folder's tokenizer, and texts as its tokens with the characters that each stands for.

The rule: offsets count white space in, and nothing is cut or padded, whatever the folder's definition says. Special
tokens have no width; they stand where the tokenizer puts them by default, in front of a text and behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from psykern.core.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """The tokenizer of a model folder, with offsets that include white space."""

    backend: tokenizers.Tokenizer
    hash: str  # "sha256:…" of its definition (the bytes of tokenizer.json)
    size: int  # highest token id + 1
    front: tuple[int, ...]  # special tokens that it puts before a text by default
    back: tuple[int, ...]  # and behind
    # Characters that are tokenized in one batch; the library's own records take about 100 bytes per token meanwhile.
    batch_chars: int = 4_000_000

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads ``tokenizer.json``, or what ``transformers`` can turn into one. Executes nothing of the folder.

        Raises CheckpointError where there is none or it cannot be used.
        """
        path = folder / "tokenizer.json"
        definition = path.read_bytes() if path.is_file() else _converted(folder)
        try:
            backend = _build(json.loads(definition))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error
        sample = backend.encode("a", add_special_tokens=True)
        ids = sample.ids
        own = [i for i, special in enumerate(sample.special_tokens_mask) if not special]
        if not own:
            origin = path if path.is_file() else f"{folder}: no tokenizer.json, and what transformers makes instead"
            raise CheckpointError(f"{origin}: the tokenizer has no token for the text 'a'")
        return cls(
            backend=backend,
            hash=f"sha256:{hashlib.sha256(definition).hexdigest()}",
            size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
            front=tuple(ids[: own[0]]),
            back=tuple(ids[own[-1] + 1 :]),
        )

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
        """Encodings of the texts, computed on all cores (or as ``TOKENIZERS_PARALLELISM`` says)."""
        return self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)


def _converted(folder: Path) -> bytes:
    """The definition of a tokenizer that comes in another form than ``tokenizer.json``."""
    looked_for = f"{folder}: no tokenizer.json, and no other tokenizer that transformers can read"
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a broken folder makes it raise
        raise CheckpointError(f"{looked_for}: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{looked_for}: {type(loaded).__name__} has no definition in the form of the tokenizers library"
        )
    return str(backend.to_str()).encode()


def _build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    for part in ("pre_tokenizer", "post_processor"):
        _keep_white_space(definition.get(part))
    definition["truncation"] = definition["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def _keep_white_space(part: Any) -> None:
    """Sets every ``trim_offsets`` to false: a trimmed token would seem to begin behind its leading space."""
    if isinstance(part, dict):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
        for child in part.values():
            _keep_white_space(child)
    elif isinstance(part, list):
        for child in part:
            _keep_white_space(child)


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A text as tokens, special tokens included; those have no width and stand at the text's start or end."""

    ids: np.ndarray  # [T] int32
    start_char: np.ndarray  # [T] int32, never falling
    end_char: np.ndarray  # [T] int32, never falling
    word: np.ndarray  # [T] int32, number of the pre-token; -1 in front, one more than the last behind


class Snippets:
    """Short texts and their tokens without special tokens, each tokenized once."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        distinct = list(dict.fromkeys(texts))
        self._known: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
        for batch in _batches(distinct, tokenizer.batch_chars):
            for text, encoding in zip(batch, tokenizer.encode_batch(batch, False), strict=True):
                self._known[text] = encoding.ids, encoding.offsets

    def __getitem__(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self._known[text]


def _batches(texts: Sequence[str], most_chars: int) -> Iterator[list[str]]:
    """The texts in order, as many at a time as have no more than so many characters; a longer one alone."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        if batch and chars + len(text) > most_chars:
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
    if batch:
        yield batch


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Tokens]:
    for batch in _batches(texts, tokenizer.batch_chars):
        for text, encoding in zip(batch, tokenizer.encode_batch(batch, False), strict=True):
            yield _tokens(tokenizer, encoding, len(text))


def _tokens(tokenizer: Tokenizer, encoding: tokenizers.Encoding, num_chars: int) -> Tokens:
    """Arrays of an encoding without special tokens, with the special tokens put around it."""
    front, back = len(tokenizer.front), len(tokenizer.back)
    ids = encoding.ids
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids)).reshape(-1, 2)
    words = np.array(encoding.word_ids, dtype=np.int32)

    def around(before: int, middle: np.ndarray, after: int) -> np.ndarray:
        return np.pad(middle, (front, back), constant_values=(before, after))

    return Tokens(
        ids=np.array([*tokenizer.front, *ids, *tokenizer.back], dtype=np.int32),
        start_char=around(0, offsets[:, 0], num_chars),
        end_char=around(0, offsets[:, 1], num_chars),
        word=around(-1, words, int(words[-1]) + 1 if len(words) else 0),
    )
