"""Transcripts as tokens: the tokens of each response, with the branches of its answer options (:mod:`.branches`).

Response [a, b) of a text has the tokens [s, e) with s < b, e > a and e > s; one that reaches beyond a or b *straddles*.
``boundary="joint"`` tokenizes a text as one string; ``"split"`` tokenizes the pieces between the response's boundaries
one by one, so that no token straddles. ``protocol="study"`` takes text and spans from :mod:`.protocol` instead.

Flags of a response: ``straddles``; ``empty`` (nothing between the marks); ``no_context`` (no token before the first
scored one, so no probability); ``closing_mark`` (appended to its options); ``leaks`` (study: the scored run is more
than the response). Several are joined by ``;``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, pairwise
from typing import get_args

import numpy as np

from psykern.core.errors import RowError
from psykern.core.settings import Boundary, Condition, OptionSource, OverLength, Protocol
from psykern.core.types import EncodedTranscript, Transcript
from psykern.data.branches import (
    Draft,
    Insert,
    Joint,
    Options,
    Placed,
    split_branches,
    with_branches,
)
from psykern.data.chat import ChatTemplate, Rendered
from psykern.data.context import cut, fit
from psykern.data.persona import interview
from psykern.data.protocol import (
    CLOSE_MARK,
    OPEN_MARK,
    keep_responses,
    study_marks,
    study_response,
    study_spans,
    study_text,
)
from psykern.data.tokenizer import (
    Snippets,
    Tokenizer,
    Tokens,
    tokenize,
)


class Encoder:
    """Turns transcripts into tokens to score.

    ``num_skipped`` (transcripts) and ``num_dropped`` (responses) say what the over-length policy left out in the last
    call of :meth:`encode`, ``num_without_metadata`` how many transcripts the condition *persona* did.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        protocol: Protocol = "exact",
        boundary: Boundary = "joint",
        options: OptionSource = "given",
        max_options: int = 26,
        over_length: OverLength = "error",
        max_positions: int | None = None,
        condition: Condition = "plain",
        chat: ChatTemplate | None = None,
        discrete: str | None = None,
    ) -> None:
        """More than ``max_options`` observed options are none. ``max_positions`` is the model's context in tokens.
        ``chat`` is needed for the condition of that name; ``discrete``: only responses that match it are scored.

        Raises ValueError for a value that is not one of its kind, and for ``protocol="study", boundary="split"``.
        """
        choices = (
            ("protocol", protocol, Protocol),
            ("boundary", boundary, Boundary),
            ("options", options, OptionSource),
            ("over_length", over_length, OverLength),
            ("condition", condition, Condition),
        )
        for name, value, kind in choices:
            if value not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")
        if protocol == "study" and boundary != "joint":
            raise ValueError(f'boundary: protocol "study" tokenizes a text as one string ("joint"), got {boundary!r}')
        if (condition == "chat") != (chat is not None):
            raise ValueError(f"chat: expected a template for condition chat and no other, got {condition!r}")
        # A template puts its own special tokens around a text; the study gets the tokenizer's as well.
        self.tokenizer = replace(tokenizer, front=(), back=()) if chat and protocol == "exact" else tokenizer
        self.condition = condition
        self.protocol = protocol
        self.boundary = boundary
        self.options = options
        self.max_options = max_options
        self.over_length = over_length
        self.max_positions = max_positions
        self.num_skipped = 0
        self.num_dropped = 0
        self.num_without_metadata = 0
        self._chat = chat
        self._discrete = re.compile(discrete) if discrete is not None else None
        if chat and protocol == "study":
            self._open_ids, self._close_ids = chat.marks(tokenizer.backend)
        else:
            self._open_ids = tokenizer.backend.encode(OPEN_MARK, add_special_tokens=False).ids
            self._close_ids = tokenizer.backend.encode(CLOSE_MARK, add_special_tokens=False).ids

    def encode(
        self,
        transcripts: Sequence[Transcript],
        reject: Callable[[RowError], None],
        observed: Mapping[tuple[str, str], tuple[str, ...]] | None = None,
    ) -> list[EncodedTranscript]:
        """The transcripts in order, without those that were rejected or skipped.

        ``observed`` holds the options of each (study, experiment), for ``options="observed-experiment"``. A transcript
        with an option that has no tokens goes to ``reject``; the message counts options and responses from 1.
        Raises PsykernError for a transcript longer than ``max_positions`` under ``over_length="error"``.
        """
        if self.options == "observed-experiment" and observed is None:
            raise ValueError('observed: options="observed-experiment" needs the options of each experiment, got None')
        self.num_skipped = self.num_dropped = self.num_without_metadata = 0
        transcripts, rendered = self._conditioned(transcripts, reject)
        options = [self._options(transcript, observed or {}) for transcript in transcripts]
        if self.boundary == "split":
            drafted = _split(self.tokenizer, transcripts, options)
        else:
            drafted = with_branches(self.tokenizer, list(self._joint(transcripts, options, rendered)))
        encoded = []
        for draft, placed in drafted:
            error = _blank_option(draft, placed)
            if error is not None:
                reject(error)
                continue
            assembled = _assembled(draft, placed)
            whole = cut(assembled, len(assembled.responses))
            fitting = fit(whole, self.over_length, self.max_positions)
            if fitting is None:
                self.num_skipped += 1
            else:
                self.num_dropped += fitting.num_dropped
                encoded.append(fitting)
        return encoded

    def scores(self, response: str) -> bool:
        """Whether ``discrete`` lets a response be scored."""
        return self._discrete is None or self._discrete.fullmatch(response) is not None

    def _conditioned(
        self, transcripts: Sequence[Transcript], reject: Callable[[RowError], None]
    ) -> tuple[list[Transcript], list[Rendered]]:
        """The transcripts under the condition, and how the study's chat renders them (else nothing)."""
        kept: list[Transcript] = []
        rendered: list[Rendered] = []
        for transcript in transcripts:
            if self._discrete is not None:
                transcript = keep_responses(transcript, self._discrete)
            if self.condition == "persona":
                front = interview(transcript.metadata)
                if not front:
                    self.num_without_metadata += 1
                    continue
                moved = transcript.responses_char + len(front)
                transcript = replace(transcript, text=front + transcript.text, responses_char=moved)
            try:
                if self._chat and self.protocol == "study":
                    rendered.append(self._chat.render_study(transcript))
                elif self._chat:
                    transcript = self._chat.render(transcript)
            except RowError as error:
                reject(error)
                continue
            kept.append(transcript)
        return kept, rendered

    def _options(self, transcript: Transcript, observed: Mapping[tuple[str, str], tuple[str, ...]]) -> list[Options]:
        """The options of each response; None for a response that has none."""
        count = len(transcript.responses_char)
        if self.options == "given" and transcript.options is not None:
            return [options or None for options in transcript.options]
        if self.options == "observed":
            seen = tuple(dict.fromkeys(text for text in _inside(transcript) if text.strip()))
        elif self.options == "observed-experiment":
            seen = observed.get((transcript.study, transcript.experiment), ())
        else:
            seen = ()
        return [seen if 2 <= len(seen) <= self.max_options else None] * count

    def _joint(
        self, transcripts: Sequence[Transcript], options: Sequence[list[Options]], rendered: Sequence[Rendered]
    ) -> Iterator[Joint]:
        study = self.protocol == "study"
        if study and not self._chat:
            texts = [study_text(t.text) for t in transcripts]
            rendered = [Rendered(text, study_marks(text), False) for text in texts]
        texts = [of.text for of in rendered] if study else [t.text for t in transcripts]
        tokenized = tokenize(self.tokenizer, texts)
        for i, (transcript, tokens, given) in enumerate(zip(transcripts, tokenized, options, strict=True)):
            if study:
                ids = self._open_ids, self._close_ids
                yield _study(transcript, rendered[i], tokens, given, *ids, is_chat=self._chat is not None)
            else:
                yield _exact(transcript, tokens, given, "" if self._chat else CLOSE_MARK)


def _inside(transcript: Transcript) -> list[str]:
    return [transcript.text[a:b] for a, b in transcript.responses_char.tolist()]


def _exact(transcript: Transcript, tokens: Tokens, options: list[Options], close: str) -> Joint:
    """``close`` is put behind an option; "" where, as in a chat, the mark behind it is the text's own."""
    marks = transcript.responses_char.reshape(-1, 2)
    a, b = marks.T
    first = np.searchsorted(tokens.end_char, a, side="right")
    stop = np.maximum(first, np.searchsorted(tokens.start_char, b, side="left"))
    stop[a == b] = first[a == b]  # a token can reach over both marks of an empty response
    full = np.flatnonzero(first < stop)
    beyond = (tokens.start_char[first[full]] < a[full]) | (tokens.end_char[stop[full] - 1] > b[full])
    responses = _inside(transcript)
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
    return Joint(draft, transcript.text, tokens, marks, [close] * len(marks), inserts)


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


def _study(
    transcript: Transcript,
    rendered: Rendered,
    tokens: Tokens,
    options: list[Options],
    open_ids: list[int],
    close_ids: list[int],
    *,
    is_chat: bool,
) -> Joint:
    """The study's scored runs, each with the options of the response whose opening mark it follows."""
    text, marks_char, stripped = rendered
    spans = study_spans(tokens.ids, open_ids, close_ids)
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
    return Joint(draft, text, tokens, marks[owners], closes, inserts)


def _patched_index(inside: str, inserts: tuple[Insert, ...] | None) -> int:
    """The option that the characters between the marks are, but for white space around them; -1: none."""
    return _index(inside.strip(), tuple(insert.strip() for insert, _ in inserts or ()))


def _split(
    tokenizer: Tokenizer, transcripts: Sequence[Transcript], options: Sequence[list[Options]]
) -> Iterator[tuple[Draft, list[Placed | None]]]:
    """Each transcript from the tokens of its pieces, with the branches of its responses. Equal pieces are tokenized
    once."""
    pieces = [_pieces(transcript) for transcript in transcripts]
    given = dict.fromkeys(chain.from_iterable(options))
    snippets = Snippets(tokenizer, chain(chain.from_iterable(pieces), *(of for of in given if of)))
    for transcript, own, of in zip(transcripts, pieces, options, strict=True):
        draft = _split_draft(tokenizer, transcript, own, of, snippets)
        starts = draft.spans_tok[:, 0].tolist()
        placed: list[Placed | None] = [
            (start, split_branches(texts, after, snippets)) if texts else None
            for start, texts, after in zip(starts, of, own[2::2], strict=True)
        ]
        _flag_unscored(draft)
        yield draft, placed


def _pieces(transcript: Transcript) -> list[str]:
    """2 R + 1 pieces: the text up to a response's opening mark, the response, the text from its closing mark on."""
    bounds = [0, *transcript.responses_char.ravel().tolist(), len(transcript.text)]
    return [transcript.text[i:j] for i, j in pairwise(bounds)]


def _split_draft(
    tokenizer: Tokenizer, transcript: Transcript, pieces: list[str], options: list[Options], snippets: Snippets
) -> Draft:
    ids = [snippets[piece][0] for piece in pieces]
    bounds = np.cumsum([len(tokenizer.front), *map(len, ids)])  # piece i is bounds[i] to bounds[i + 1]
    responses = tuple(pieces[1::2])
    return Draft(
        transcript=transcript,
        token_ids=np.fromiter(chain(tokenizer.front, *ids), dtype=np.int32),
        responses=responses,
        spans_tok=bounds[1:-1].reshape(-1, 2).astype(np.int32),
        flags=[[] for _ in responses],
        options=options,
        option_index=[_index(text, of) for text, of in zip(responses, options, strict=True)],
    )


def _blank_option(draft: Draft, placed: list[Placed | None]) -> RowError | None:
    for r, entry in enumerate(placed):
        if entry is not None and entry[1].blank is not None:
            option = (draft.options[r] or ())[entry[1].blank]
            number = entry[1].blank + 1
            reason = f'option {number} ("{option}") of response {r + 1} encodes to no token'
            return RowError(draft.transcript.source, reason)
    return None


def _assembled(draft: Draft, placed: list[Placed | None]) -> EncodedTranscript:
    """The draft with its branches, all tokens and all responses."""
    options: list[Options] = [None] * len(placed)
    of: list[int] = []
    parents: list[int] = []
    scored: list[int] = []
    lengths: list[int] = []
    token_ids: list[int] = []
    for r, entry in enumerate(placed):
        if entry is None:
            continue
        base, branches = entry
        if base + min(branches.parents) < 1:
            draft.flags[r].append("no_context")
            continue
        options[r] = draft.options[r]
        if branches.closing_mark:
            draft.flags[r].append("closing_mark")
        of.extend([r] * len(branches.parents))
        parents.extend([base + parent for parent in branches.parents])
        scored.extend(branches.scored)
        lengths.extend(branches.lengths)
        token_ids.extend(branches.token_ids)
    transcript = draft.transcript
    return EncodedTranscript(
        study=transcript.study,
        experiment=transcript.experiment,
        participant=transcript.participant,
        source=transcript.source,
        token_ids=draft.token_ids,
        responses=draft.responses,
        spans_tok=draft.spans_tok,
        flags=tuple(";".join(dict.fromkeys(flags)) or None for flags in draft.flags),
        options=tuple(options),
        option_index=np.array(
            [i if of else -1 for i, of in zip(draft.option_index, options, strict=True)], dtype=np.int32
        ),
        branch_response=np.array(of, dtype=np.int32),
        branch_parent_tok=np.array(parents, dtype=np.int32),
        branch_scored_tok=np.array(scored, dtype=np.int32),
        branch_offsets=np.cumsum([0, *lengths], dtype=np.int64),
        branch_token_ids=np.array(token_ids, dtype=np.int32),
        num_dropped=0,
    )
