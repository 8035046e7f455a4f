"""A transcript with its responses found among its tokens; the branches of their options are still missing.

Response [a, b) of a text has the tokens [s, e) with s < b, e > a and e > s; one that reaches beyond a or b *straddles*.
A text that was tokenized as one string gives a :class:`JointText`, from which branches are made; a text in pieces gives
them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise

import numpy as np

from psykern.core.types import Transcript
from psykern.data.branches import Insert, JointText, Options, Placed, split_branches
from psykern.data.chat import Rendered
from psykern.data.protocol import CLOSE_MARK, study_response
from psykern.data.tokenizer import Snippets, Tokenizer, Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A transcript with its responses found; the branches are still missing."""

    transcript: Transcript
    token_ids: np.ndarray  # [T] int32
    responses: tuple[str, ...]  # [R]
    spans_tok: np.ndarray  # [R, 2] int32
    flags: list[list[str]]  # [R]
    options: list[Options]  # [R]
    option_index: list[int]  # [R]


Drafted = tuple[Draft, Sequence[Placed | None]]  # with the branches of each response


def responses_of(transcript: Transcript) -> list[str]:
    return [transcript.text[a:b] for a, b in transcript.responses_char.tolist()]


def exact_draft(
    transcript: Transcript, tokens: Tokens, options: list[Options], close: str, close_chars: int
) -> tuple[Draft, JointText]:
    """``close`` is put behind an option; "" where, as in a chat, what stands there is the text's own: then so many of
    its characters tell an option from one that it begins."""
    marks = transcript.responses_char.reshape(-1, 2)
    a, b = marks.T
    first = np.searchsorted(tokens.end_char, a, side="right")
    stop = np.maximum(first, np.searchsorted(tokens.start_char, b, side="left"))
    stop[a == b] = first[a == b]  # a token can reach over both marks of an empty response
    full = np.flatnonzero(first < stop)
    beyond = (tokens.start_char[first[full]] < a[full]) | (tokens.end_char[stop[full] - 1] > b[full])
    responses = responses_of(transcript)
    inserts = [_inserts(of, close, patched=False) if of else None for of in options]
    draft = Draft(
        transcript=transcript,
        token_ids=tokens.ids,
        responses=tuple(responses),
        spans_tok=np.stack([first, stop], axis=1).astype(np.int32),
        flags=[[] for _ in responses],
        options=options,
        option_index=[_index(text, of) for text, of in zip(responses, options, strict=True)],
    )
    for r in full[beyond]:
        draft.flags[r].append("straddles")
    _flag_unscored(draft)
    return draft, JointText(transcript.text, tokens, marks, [close] * len(marks), inserts, close_chars)


def _index(response: str, options: Options) -> int:
    return options.index(response) if options and response in options else -1


def _flag_unscored(draft: Draft) -> None:
    """Flags responses without a score; a span that begins at token 0 becomes empty."""
    first, stop = draft.spans_tok.T
    for r in np.flatnonzero(first == stop):
        draft.flags[r].append("empty")
    for r in np.flatnonzero((first == 0) & (stop > 0)):
        draft.flags[r].append("no_context")
        draft.spans_tok[r] = 0


@lru_cache(maxsize=1024)
def _inserts(options: tuple[str, ...], close: str, *, patched: bool, stripped: bool = False) -> tuple[Insert, ...]:
    """What each option puts in a response's place; ``patched`` as the study's rules would write it, ``stripped`` as a
    chat template would."""
    inserts = [study_response(option) if patched else (option, close) for option in options]
    return tuple((text.strip() if stripped else text, after if close else "") for text, after in inserts)


def study_draft(
    transcript: Transcript,
    rendered: Rendered,
    tokens: Tokens,
    spans: np.ndarray,
    options: list[Options],
    *,
    is_chat: bool,
) -> tuple[Draft, JointText]:
    """The study's scored runs ``spans``, each with the options of the response whose opening mark it follows."""
    text, marks_char, stripped = rendered
    begins, ends = tokens.start_char[spans[:, 0]], tokens.end_char[spans[:, 1] - 1]
    # A combining character that was composed with the one before it is in no token: read up to the next token.
    reads = np.maximum(ends, np.append(tokens.start_char, len(text))[spans[:, 1]])
    marks = np.concatenate([[[0, -1]], marks_char])  # row 0: before any mark
    owners = np.searchsorted(marks[1:, 0], begins, side="right")
    a, b = marks[owners].T
    inside = [text[i : max(i, j)] for i, j in zip(a.tolist(), b.tolist(), strict=True)]
    own = [options[owner - 1] if closed else None for owner, closed in zip(owners.tolist(), b >= 0, strict=True)]
    close = "" if is_chat else CLOSE_MARK
    inserts = [_inserts(of, close, patched=True, stripped=stripped) if of else None for of in own]
    draft = Draft(
        transcript=transcript,
        token_ids=tokens.ids,
        responses=tuple(text[i:j] for i, j in zip(begins.tolist(), reads.tolist(), strict=True)),
        spans_tok=spans,
        flags=[["leaks"] if leaks else [] for leaks in (begins < a) | (ends > b)],
        options=own,
        option_index=[_patched_index(text, of) for text, of in zip(inside, inserts, strict=True)],
    )
    closes = ["" if is_chat else study_response(response)[1] for response in inside]
    return draft, JointText(text, tokens, marks[owners], closes, inserts)


def _patched_index(inside: str, inserts: tuple[Insert, ...] | None) -> int:
    """The option that the characters between the marks are, but for white space around them; -1: none."""
    return _index(inside.strip(), tuple(insert.strip() for insert, _ in inserts or ()))


def split_drafts(
    tokenizer: Tokenizer, transcripts: Sequence[Transcript], options: Sequence[list[Options]], close_chars: int
) -> Iterator[Drafted]:
    """Each transcript from the tokens of its pieces, with the branches of its responses. Equal pieces are tokenized
    once. What a tokenizer puts in front of a text stands before the first piece alone. ``close_chars``: behind an
    option, which tell it from one that it begins."""
    pieces = [_pieces(transcript) for transcript in transcripts]
    given = dict.fromkeys(chain.from_iterable(options))
    starts = Snippets(tokenizer, (own[0] for own in pieces))
    later = chain.from_iterable(own[1:] for own in pieces)
    snippets = Snippets(tokenizer, chain(later, *(of for of in given if of)), inside=True)
    for transcript, own, of in zip(transcripts, pieces, options, strict=True):
        ids = [starts[own[0]][0], *(snippets[piece][0] for piece in own[1:])]
        draft = _split_draft(tokenizer, transcript, ids, of)
        first = draft.spans_tok[:, 0].tolist()
        placed: list[Placed | None] = [
            (first[r], split_branches(texts, _next(own, 2 * r + 2), snippets, close_chars)) if texts else None
            for r, texts in enumerate(of)
        ]
        _flag_unscored(draft)
        yield draft, placed


def _next(pieces: list[str], place: int) -> str:
    """The piece there or, where it is empty, the first one behind that is not: without marks responses may touch."""
    return next(filter(None, pieces[place:]), "")


def _pieces(transcript: Transcript) -> list[str]:
    """2 R + 1 pieces: the text up to a response, with its opening mark; the response; what follows, with its closing
    mark."""
    bounds = [0, *transcript.responses_char.ravel().tolist(), len(transcript.text)]
    return [transcript.text[i:j] for i, j in pairwise(bounds)]


def _split_draft(tokenizer: Tokenizer, transcript: Transcript, ids: list[list[int]], options: list[Options]) -> Draft:
    """``ids``: of each piece."""
    bounds = np.cumsum([len(tokenizer.front), *map(len, ids)])  # piece i is bounds[i] to bounds[i + 1]
    responses = tuple(responses_of(transcript))
    return Draft(
        transcript=transcript,
        token_ids=np.fromiter(chain(tokenizer.front, *ids), dtype=np.int32),
        responses=responses,
        spans_tok=bounds[1:-1].reshape(-1, 2).astype(np.int32),
        flags=[[] for _ in responses],
        options=options,
        option_index=[_index(text, of) for text, of in zip(responses, options, strict=True)],
    )
