"""Texts to token ids where many begin alike, as a harness's prompts do, with a tokenizer of ``transformers``.

In order, a text begins as the one before it. Its tokens up to a few words before the place where the two part are that
one's, and only what follows is tokenized. The rule, of a fast tokenizer that cuts texts into words: which word comes
next hangs on no more than the two words behind it, or on an added token, whose length is known. The words at the seam
are tokenized with both texts; where they have other tokens the whole text is tokenized, as it is where the tokenizer
knows no words, puts something behind a text, or is not a fast one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SEAM_WORDS = 2
_SAMPLE_CHARS = 1_000
_BATCH_CHARS = 4_000_000  # tokenized at once, on all cores; the library's records take 100 bytes a token meanwhile


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """A text that is tokens."""

    text: str
    ids: list[int]
    ends: list[int]  # characters up to a token's end; 0 of special tokens in front
    words: list[int | None]  # never falling; None of special tokens

    @classmethod
    def of(cls, text: str, encoding: Any) -> _Known:
        return cls(text, encoding.ids, [end for _, end in encoding.offsets], encoding.word_ids)


def token_ids(tokenizer: Any, texts: Iterable[str], special: Mapping[str, bool]) -> dict[str, list[int]]:
    """What ``tokenizer(texts, **special)`` gives as ``input_ids``, of each distinct text."""
    found: dict[str, list[int]] = {}
    ordered = sorted(set(texts))
    known = _Known("", [], [], [])
    if not ordered:
        return found
    if not _can_continue(tokenizer, ordered, special):
        return dict(zip(ordered, tokenizer(ordered, verbose=False, **special)["input_ids"], strict=True))
    for batch in _batches(list(zip(ordered, _shared(ordered), strict=True))):
        encodings = iter(tokenizer([text for text, shared in batch if not shared], verbose=False, **special).encodings)
        reach = max((len(added.content) for added in tokenizer.added_tokens_decoder.values()), default=0)
        for text, shared in batch:
            continued = _continued(tokenizer.backend_tokenizer, known, text, shared - reach) if shared else None
            if continued is None:
                own = tokenizer([text], verbose=False, **special).encodings[0] if shared else next(encodings)
                continued = _Known.of(text, own)
            known, found[text] = continued, continued.ids
    return found


def _can_continue(tokenizer: Any, texts: Sequence[str], special: Mapping[str, bool]) -> bool:
    """Whether it is a fast tokenizer that knows words and puts nothing behind a text, to judge by the longest one."""
    if not tokenizer.is_fast:
        return False
    words = tokenizer([max(texts, key=len)[:_SAMPLE_CHARS]], verbose=False, **special).encodings[0].word_ids
    return bool(words) and words[-1] is not None and len(set(words)) > 2 * _SEAM_WORDS


def _shared(ordered: Sequence[str]) -> Iterator[int]:
    """Characters that each text has in common with the one before it; 0: less than half of it."""
    before = ""
    for text in ordered:
        low, high = len(text) // 2, min(len(text), len(before))
        if low == 0 or not before.startswith(text[:low]):
            yield 0
        else:
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if before.startswith(text[:middle]) else (low, middle - 1)
            yield low
        before = text


def _batches(texts: Sequence[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """In order; each begins with a text that shares nothing."""
    batch: list[tuple[str, int]] = []
    chars = 0
    for text, shared in texts:
        if batch and chars > _BATCH_CHARS and not shared:
            yield batch
            batch, chars = [], 0
        batch.append((text, shared))
        chars += len(text) if not shared else 0
    if batch:
        yield batch


def _continued(backend: Any, known: _Known, text: str, certain: int) -> _Known | None:
    """``text``, whose first ``certain`` characters are those of ``known``, and no added token begins in them that ends
    behind them. None: to be tokenized whole."""
    ends, words = known.ends, known.words
    stop = _word_start(words, bisect_right(ends, certain)) if words and words[-1] is not None else 0
    begin = stop
    for _ in range(_SEAM_WORDS):
        begin = _word_start(words, begin - 1)
    while begin > 0 and known.text[max(ends[begin - 1] - 1, 0)].isspace():  # an offset may leave white space out
        begin = _word_start(words, begin - 1)
    if begin <= 0 or words[begin - 1] is None or ends[begin - 1] == 0:
        return None
    left, seam = ends[begin - 1], stop - begin
    rest = _Known.of(text, backend.encode(text[left:], add_special_tokens=False))
    is_same = known.ids[begin:stop] == rest.ids[:seam] and known.ends[begin:stop] == [
        left + e for e in rest.ends[:seam]
    ]
    if not is_same or len(rest.ids) == seam or rest.words[seam] == rest.words[seam - 1] or None in rest.words:
        return None
    first = words[begin] or 0
    return _Known(
        text,
        known.ids[:begin] + rest.ids,
        ends[:begin] + [left + end for end in rest.ends],
        words[:begin] + [first + (word or 0) for word in rest.words],
    )


def _word_start(words: Sequence[int | None], token: int) -> int:
    """The first token of the word that ``token`` is in; below 0 there is none."""
    token = min(token, len(words) - 1)
    while token > 0 and words[token - 1] == words[token]:
        token -= 1
    return token
