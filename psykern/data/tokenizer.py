"""A model folder's tokenizer, and texts as its tokens with the characters that each stands for.

The rule: offsets count white space in, and nothing is cut or padded, whatever the folder's definition says. Special
tokens have no width; they stand where the tokenizer puts them by default, in front of a text and behind it.

Some tokenizers put a space in front of a text (Metaspace, Prepend, ``add_prefix_space``). A piece from the middle of a
text gets none: what is *inside* is tokenized without.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from psykern.core.errors import CheckpointError
from psykern.data.pretrained import Pretrained


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """The tokenizer of a model folder, with offsets that include white space."""

    backend: tokenizers.Tokenizer
    inside: tokenizers.Tokenizer | None  # the same, with nothing put in front of a text; None: that cannot be had
    anew: Mapping[int, str]  # added tokens behind which it puts there again what it puts in front of a text
    hash: str  # "sha256:…" of its definition
    size: int  # highest token id + 1
    front: tuple[int, ...]  # special tokens that it puts before a text by default
    back: tuple[int, ...]  # and behind
    unknown: int | None = None  # the token of all that the vocabulary has no token for; None: there is none
    longest_added: int = 0  # characters of the longest added token, which may reach over several words
    # Characters that are tokenized in one batch; the library's own records take about 100 bytes per token meanwhile.
    batch_chars: int = 4_000_000

    @classmethod
    def load(cls, folder: Path, pretrained: Pretrained | None = None) -> Tokenizer:
        """``pretrained``: what was read of the folder before. Raises CheckpointError as :meth:`.Pretrained.load`."""
        of = pretrained or Pretrained.load(folder)
        backend = _whole(of.backend)
        inside = _inside(backend)
        return cls(
            backend=backend,
            inside=inside,
            anew=_anew(backend, inside),
            hash=of.hash,
            size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
            front=of.front,
            back=of.back,
            unknown=_unknown(backend),
            longest_added=max((len(of.content) for of in backend.get_added_tokens_decoder().values()), default=0),
        )

    def encode_batch(self, texts: Sequence[str], *, inside: bool = False) -> list[tokenizers.Encoding]:
        """Encodings without special tokens, computed on all cores (or as ``TOKENIZERS_PARALLELISM`` says).

        ``inside``: the texts are pieces from the middle of others; raises ValueError where :attr:`inside` is None.
        Raises CheckpointError for a definition that the library breaks down on.
        """
        backend = self.inside if inside else self.backend
        if backend is None:
            raise ValueError("inside: this tokenizer puts something in front of every text")
        try:
            return backend.encode_batch(list(texts), add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the library's own, which is no Exception
                raise
            raise CheckpointError(
                f"tokenizer.json: the tokenizers library breaks down on one of {len(texts)} texts, of which the first "
                f"begins {texts[0][:40]!r}: {error}; look at its normalizer and added tokens"
            ) from error


def _unknown(backend: tokenizers.Tokenizer) -> int | None:
    if isinstance(backend.model, tokenizers.models.Unigram):  # which does not tell otherwise
        number: int | None = json.loads(backend.model.__getstate__())["unk_id"]
        return number
    token = backend.model.unk_token
    return None if token is None else backend.token_to_id(token)


def _whole(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """``backend``, changed so that it cuts and pads nothing and its offsets count white space in."""
    backend.no_truncation()
    backend.no_padding()
    for name in ("pre_tokenizer", "post_processor"):
        part = _part(backend, name)
        if _change(part, "trim_offsets", False):  # a trimmed token would seem to begin behind its leading space
            setattr(backend, name, _built(name, part))
    return backend


def _inside(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
    """``backend`` with nothing put in front of a text; None where something is put there or lost all the same, or where
    nobody can say where it begins anew: whether an added token stands there hangs on the characters around it."""
    normalizer, pre_tokenizer = _part(backend, "normalizer"), _part(backend, "pre_tokenizer")
    kept = _without(normalizer, "Prepend")
    if kept != normalizer or _never_prepends(pre_tokenizer):
        if any(added.single_word for added in backend.get_added_tokens_decoder().values()):
            return None
        special = backend.encode_special_tokens
        backend = tokenizers.Tokenizer.from_str(backend.to_str())
        backend.encode_special_tokens = special
        if kept != normalizer:
            backend.normalizer = _built("normalizer", kept)
        backend.pre_tokenizer = _built("pre_tokenizer", pre_tokenizer)
    alike = (_read("b" + piece + "b", backend)[1:-1] == _read(piece, backend) for piece in ("a", " a "))
    return backend if all(alike) else None


def _read(text: str, backend: tokenizers.Tokenizer) -> str:
    """The characters that the vocabulary is asked for."""
    normalized = backend.normalizer.normalize_str(text) if backend.normalizer else text
    words = backend.pre_tokenizer.pre_tokenize_str(normalized) if backend.pre_tokenizer else [(normalized, (0, 0))]
    return "".join(word for word, _ in words)


def _anew(backend: tokenizers.Tokenizer, inside: tokenizers.Tokenizer | None) -> dict[int, str]:
    found: dict[int, str] = {}
    if inside is None or inside is backend:
        return found
    for token, added in backend.get_added_tokens_decoder().items():
        text = f"{added.content}a"
        ids = backend.encode(text, add_special_tokens=False).ids
        if ids[:1] == [token] and ids != inside.encode(text, add_special_tokens=False).ids:
            found[token] = added.content
    return found


def _never_prepends(pre_tokenizer: Any) -> bool:
    """Changes the definition of a pre-tokenizer; whether there was something to change."""
    metaspace = _change(pre_tokenizer, "prepend_scheme", "never")
    return _change(pre_tokenizer, "add_prefix_space", False) or metaspace


def _part(backend: tokenizers.Tokenizer, name: str) -> Any:
    """The definition of one part of a tokenizer, as JSON; None: it has none."""
    part = getattr(backend, name)
    return None if part is None else json.loads(part.__getstate__())


def _built(name: str, definition: Any) -> Any:
    """A part from its definition: the library builds whole tokenizers only."""
    empty = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
    whole = {"version": "1.0", "added_tokens": [], "model": empty, name: definition}
    return getattr(tokenizers.Tokenizer.from_str(json.dumps(whole)), name)


def _change(part: Any, key: str, value: Any) -> bool:
    """Sets every ``key`` that is there, at any depth; whether that changed something."""
    if isinstance(part, list):
        return any([_change(child, key, value) for child in part])
    if not isinstance(part, dict):
        return False
    changed = any([_change(child, key, value) for child in part.values()])
    if part.get(key, value) == value:
        return changed
    part[key] = value
    return True


def _without(normalizer: Any, kind: str) -> Any:
    """A normalizer's definition without those parts of it that are of ``kind``."""
    if not normalizer or normalizer["type"] == kind:
        return None
    if normalizer["type"] != "Sequence":
        return normalizer
    kept = (_without(part, kind) for part in normalizer["normalizers"])
    return {**normalizer, "normalizers": [part for part in kept if part]}


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A text as tokens, special tokens included; those have no width and stand at the text's start or end."""

    ids: np.ndarray  # [T] int32
    start_char: np.ndarray  # [T] int32, never falling
    end_char: np.ndarray  # [T] int32, never falling
    word: np.ndarray  # [T] int32, number of the pre-token; -1 in front, one more than the last behind


class Snippets:
    """Short texts and their tokens without special tokens, each tokenized once."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str], *, inside: bool = False) -> None:
        """``inside``: as :meth:`Tokenizer.encode_batch` has it."""
        distinct = list(dict.fromkeys(texts))
        self._known: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
        for batch in _batches(distinct, tokenizer.batch_chars):
            for text, encoding in zip(batch, tokenizer.encode_batch(batch, inside=inside), strict=True):
                self._known[text] = _piece(tokenizer, text, encoding) if inside else (encoding.ids, encoding.offsets)

    def __getitem__(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self._known[text]


def _piece(tokenizer: Tokenizer, text: str, encoding: tokenizers.Encoding) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a piece from the middle of a text: behind an added token in it the tokenizer may begin anew."""
    ids, offsets = encoding.ids, encoding.offsets
    places = (i + 1 for i, token in enumerate(ids) if token in tokenizer.anew)
    # What the vocabulary does not have can have the id of such a token, too.
    spelled = (place for place in places if tokenizer.anew[ids[place - 1]] in text[slice(*offsets[place - 1])])
    place = next(spelled, len(ids))
    if place == len(ids):
        return ids, offsets
    start = offsets[place - 1][1]
    rest = tokenizer.backend.encode(text[start:], add_special_tokens=False)
    moved = [(start + begin, start + end) for begin, end in rest.offsets]
    return ids[:place] + rest.ids, offsets[:place] + moved


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
        for text, encoding in zip(batch, tokenizer.encode_batch(batch), strict=True):
            yield _tokens(tokenizer, encoding, len(text))


def _tokens(tokenizer: Tokenizer, encoding: tokenizers.Encoding, num_chars: int) -> Tokens:
    """Arrays of an encoding without special tokens, with the special tokens put around it."""
    front, back = len(tokenizer.front), len(tokenizer.back)
    ids = encoding.ids
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids)).reshape(-1, 2)
    words = np.array(encoding.word_ids, dtype=np.int32)

    def around(before: int, middle: np.ndarray, after: int) -> np.ndarray:
        if not front and not back:
            return np.ascontiguousarray(middle)
        return np.pad(middle, (front, back), constant_values=(before, after))

    return Tokens(
        ids=np.array([*tokenizer.front, *ids, *tokenizer.back], dtype=np.int32),
        start_char=around(0, offsets[:, 0], num_chars),
        end_char=around(0, offsets[:, 1], num_chars),
        word=around(-1, words, int(words[-1]) + 1 if len(words) else 0),
    )
