"""Transcripts as tokens: the tokens of each response, with the branches of its answer options (:mod:`.branches`).

Which tokens are a response's, says :mod:`.draft`. ``boundary="joint"`` tokenizes a text as one string; ``"split"``
tokenizes the pieces between the response's boundaries one by one, so that no token straddles. ``protocol="study"``
takes text and spans from :mod:`.protocol` instead. With ``marks="drop"`` the text has no marks, and the responses their
places in it; behind an option that begins another one then stands, as in a chat, the text's own next token.

Flags of a response: ``straddles``; ``empty`` (nothing between the marks); ``no_context`` (no token before the first
scored one of the response, or of one of its options, so no probability of it, or of them); ``closing_mark`` (appended
to its options); ``leaks`` (study: the scored run is more than the response); ``unknown`` (a scored token of the
response, or of one of its options, stands for all that the vocabulary lacks). Several are joined by ``;``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import NamedTuple

import numpy as np
import tokenizers

from psykern.core.errors import CheckpointError, RowError
from psykern.core.settings import Settings
from psykern.core.types import EncodedTranscript, Transcript
from psykern.data.branches import JointText, Options, Placed, joint_branches
from psykern.data.chat import ChatTemplate, Rendered
from psykern.data.context import cut
from psykern.data.draft import Draft, Drafted, exact_draft, responses_of, split_drafts, study_draft
from psykern.data.persona import interview
from psykern.data.protocol import (
    CLOSE_MARK,
    OPEN_MARK,
    distinct_responses,
    keep_responses,
    study_marks,
    study_response,
    study_spans,
    study_text,
    without_marks,
)
from psykern.data.tokenizer import Tokenizer, tokenize


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Transcripts as tokens. Filled by :meth:`Encoder.encode`."""

    transcripts: tuple[EncodedTranscript, ...]  # in order and whole, without those refused or left out
    rejects: tuple[RowError, ...]  # first those that the condition refuses, then those with an unusable option
    without_metadata: int  # transcripts that the condition persona left out


class _Prepared(NamedTuple):
    """A transcript under its condition."""

    transcript: Transcript
    study: Rendered | None  # the text that the study tokenizes; None: the transcript's own
    options: list[Options]  # of each response; None for one that has none


class Encoder:
    """Turns transcripts into tokens to score, by those settings whose role is "tokens"."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: Settings,
        chat: ChatTemplate | None = None,
        *,
        beyond: int | None = None,
    ) -> None:
        """``chat`` is needed for the condition of that name; a transcript with a token id of ``beyond`` or more is
        refused.

        Raises ValueError for a template with another condition, or none, CheckpointError for a tokenizer that cannot do
        what the settings ask.
        """
        if (settings.condition == "chat") != (chat is not None):
            raise ValueError(f"chat: expected a template for condition chat and no other, got {settings.condition!r}")
        if settings.boundary == "split" and tokenizer.inside is None:
            raise CheckpointError(
                "boundary split: this tokenizer puts something in front of each piece of a text, or strips it, and "
                "psykern cannot turn that off; use boundary joint"
            )
        study = settings.protocol == "study"
        # A template puts its own special tokens around a text; the study gets the tokenizer's as well.
        self._tokenizer = replace(tokenizer, front=(), back=()) if chat and not study else tokenizer
        self.settings = settings
        self._chat = chat
        self._beyond = beyond
        # Without marks an option ends where the text's next token does, whatever that is: its first character is in it.
        self._close_chars = 1 if settings.marks == "drop" and not chat else len(CLOSE_MARK)
        self._discrete = re.compile(settings.discrete) if settings.discrete is not None else None
        marks = chat.marks if chat and study else _plain_marks
        self._open_ids, self._close_ids = marks(tokenizer.backend)
        if not self._open_ids or not self._close_ids:
            raise CheckpointError(f"the tokenizer has no token for the marks {OPEN_MARK!r} and {CLOSE_MARK!r}")

    def encode(
        self, transcripts: Sequence[Transcript], observed: Mapping[tuple[str, str], tuple[str, ...]] | None = None
    ) -> Encoded:
        """``observed`` holds the options of each (study, experiment), for ``options="observed-experiment"``.

        A transcript with an option that has no tokens, or those of another option, is refused, as is one with a token
        that the model has no row for; the message counts options and responses from 1.
        """
        if self.settings.options == "observed-experiment" and observed is None:
            raise ValueError('observed: options="observed-experiment" needs the options of each experiment, got None')
        prepared: list[_Prepared] = []
        rejects: list[RowError] = []
        without_metadata = 0
        for transcript in transcripts:
            try:
                conditioned = self._conditioned(transcript, observed or {})
            except RowError as error:
                rejects.append(error)
                continue
            if conditioned is None:
                without_metadata += 1
            else:
                prepared.append(conditioned)
        encoded = []
        for draft, placed in self._drafted(prepared):
            unusable = _unusable_option(draft, placed)
            if unusable is not None:
                rejects.append(unusable)
                continue
            assembled = _with_unknown(_assembled(draft, placed), self._tokenizer.unknown)
            whole = cut(assembled, len(assembled.responses))
            unknown = self._unknown(whole)
            if unknown is None:
                encoded.append(whole)
            else:
                rejects.append(unknown)
        return Encoded(tuple(encoded), tuple(rejects), without_metadata)

    def _unknown(self, transcript: EncodedTranscript) -> RowError | None:
        """The error of a transcript with a token beyond the model's embedding."""
        if self._beyond is None:
            return None
        ids = np.concatenate([transcript.token_ids, transcript.branch_token_ids])
        token = int(ids.max(initial=-1))
        if token < self._beyond:
            return None
        text = self._tokenizer.backend.id_to_token(token)
        reason = f"token {token:,} ({text!r}) is not among the {self._beyond:,} rows of the model's embedding"
        return RowError(transcript.source, reason)

    def scores(self, response: str) -> bool:
        """Whether ``discrete`` lets a response be scored."""
        return self._discrete is None or self._discrete.fullmatch(response) is not None

    def _conditioned(
        self, transcript: Transcript, observed: Mapping[tuple[str, str], tuple[str, ...]]
    ) -> _Prepared | None:
        """The transcript under condition and protocol; None: its participant's interview would be empty.

        Raises RowError where the chat's template refuses it, or changes one of its options, and where the study's rules
        would find more marks than there are responses.
        """
        if self._discrete is not None:
            transcript = keep_responses(transcript, self._discrete)
        options = self._options(transcript, observed)
        if self.settings.condition == "persona":
            front = interview(transcript.metadata)
            if not front:
                return None
            moved = transcript.responses_char + len(front)
            transcript = replace(transcript, text=front + transcript.text, responses_char=moved)
        if self.settings.protocol == "exact":
            if self._chat:
                transcript = self._chat.render(transcript)
            elif self.settings.marks == "drop":
                transcript = without_marks(transcript)
            return _Prepared(transcript, None, options)
        if transcript.text.count("<<") != len(options):
            raise RowError(
                transcript.source,
                "the study's rules would take '<<' for a mark where no response is, in what is told of the participant "
                "or where discrete took marks away; use protocol exact",
            )
        if self._chat:
            return _Prepared(transcript, self._chat.render_study(transcript), options)
        text = study_text(transcript.text)
        return _Prepared(transcript, Rendered(text, study_marks(text), False), options)

    def _options(self, transcript: Transcript, observed: Mapping[tuple[str, str], tuple[str, ...]]) -> list[Options]:
        if self.settings.options == "given" and transcript.options is not None:
            self._check_said(transcript, transcript.options)
            return [options or None for options in transcript.options]
        if self.settings.options == "observed":
            seen = tuple(dict.fromkeys(text for text in responses_of(transcript) if text.strip()))
        elif self.settings.options == "observed-experiment":
            seen = observed.get((transcript.study, transcript.experiment), ())
        else:
            seen = ()
        if self.settings.protocol == "study":
            seen = distinct_responses(seen, stripped=self._chat is not None)
        # Another row's response, which the template does not let stand: that row is refused, not all with its options.
        return self._distinct(tuple(filter(self._is_said, seen)), responses_of(transcript))

    def _distinct(self, seen: tuple[str, ...], responses: Sequence[str]) -> list[Options]:
        """``seen`` as options of each response. Those that the tokenizer's normalizer makes equal (a character composed
        and not) are one, which each response has in its own spelling."""
        normalizer = self._tokenizer.backend.normalizer
        firsts: dict[str, str] = {}
        for option in seen:
            firsts.setdefault(normalizer.normalize_str(option) if normalizer else option, option)
        if not 2 <= len(firsts) <= self.settings.max_options:
            return [None] * len(responses)
        if len(firsts) == len(seen):
            return [seen] * len(responses)
        keys = map(normalizer.normalize_str, responses)
        own = (firsts | {key: text} if key in firsts else firsts for key, text in zip(keys, responses, strict=True))
        return [tuple(of.values()) for of in own]

    def _is_said(self, option: str) -> bool:
        """Whether an option can be a response of the chat, as the protocol writes it."""
        if self._chat is None:
            return True
        if self.settings.protocol == "study":  # which lets a template strip responses
            return self._chat.as_response(study_response(option)[0]) is not None
        return self._chat.as_response(option) == option

    def _check_said(self, transcript: Transcript, options: Sequence[tuple[str, ...]]) -> None:
        if self._chat is None:
            return
        for of in dict.fromkeys(options):
            changed = next((i for i, option in enumerate(of) if not self._is_said(option)), None)
            if changed is not None:
                which = f'option {changed + 1} ("{of[changed]}") of response {options.index(of) + 1}'
                reason = f"the chat template {self._chat.name} strips or changes {which}"
                raise RowError(transcript.source, reason)

    def _drafted(self, prepared: Sequence[_Prepared]) -> Iterator[Drafted]:
        if self.settings.boundary == "split":
            transcripts = [transcript for transcript, _, _ in prepared]
            every = [options for _, _, options in prepared]
            return split_drafts(self._tokenizer, transcripts, every, self._close_chars)
        joint = list(self._joint(prepared))
        placed = joint_branches(self._tokenizer, [text for _, text in joint])
        return zip((draft for draft, _ in joint), placed, strict=True)

    def _joint(self, prepared: Sequence[_Prepared]) -> Iterator[tuple[Draft, JointText]]:
        texts = [transcript.text if study is None else study.text for transcript, study, _ in prepared]
        for (transcript, study, options), tokens in zip(prepared, tokenize(self._tokenizer, texts), strict=True):
            if study is None:
                close = "" if self._chat or self.settings.marks == "drop" else CLOSE_MARK
                yield exact_draft(transcript, tokens, options, close, self._close_chars)
            else:
                spans = study_spans(tokens.ids, self._open_ids, self._close_ids)
                yield study_draft(transcript, study, tokens, spans, options, is_chat=self._chat is not None)


def _plain_marks(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the marks alone."""
    opening, closing = (tokenizer.encode(mark, add_special_tokens=False) for mark in (OPEN_MARK, CLOSE_MARK))
    return opening.ids, closing.ids


def _unusable_option(draft: Draft, placed: Sequence[Placed | None]) -> RowError | None:
    for r, entry in enumerate(placed):
        reason = entry[1].unusable(draft.options[r] or (), r + 1) if entry is not None else None
        if reason is not None:
            return RowError(draft.transcript.source, reason)
    return None


def _assembled(draft: Draft, placed: Sequence[Placed | None]) -> EncodedTranscript:
    """The draft with its branches, all tokens and all responses."""
    own = _with_context(draft, placed)
    every = [branches for _, branches in own.values()]
    parents = [base + parent for base, branches in own.values() for parent in branches.parents]
    option_index = [i if r in own else -1 for r, i in enumerate(draft.option_index)]
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
        options=tuple(options if r in own else None for r, options in enumerate(draft.options)),
        option_index=np.array(option_index, dtype=np.int32),
        branch_response=np.array([r for r, (_, of) in own.items() for _ in of.parents], dtype=np.int32),
        branch_parent_tok=np.array(parents, dtype=np.int32),
        branch_scored_tok=np.array([first for of in every for first in of.scored], dtype=np.int32),
        branch_offsets=np.cumsum([0, *(length for of in every for length in of.lengths)], dtype=np.int64),
        branch_token_ids=np.array([token for of in every for token in of.token_ids], dtype=np.int32),
        num_dropped=0,
        place=transcript.place,
    )


def _with_unknown(encoded: EncodedTranscript, unknown: int | None) -> EncodedTranscript:
    """Flags the responses that are scored with the token ``unknown``, or have an option that is."""
    if unknown is None:
        return encoded
    first, stop = encoded.spans_tok.T
    before = np.cumsum([0, *(encoded.token_ids == unknown)])
    flagged = set(np.flatnonzero(before[stop] > before[first]).tolist())
    scored_from = encoded.branch_offsets[:-1] + encoded.branch_scored_tok
    before = np.cumsum([0, *(encoded.branch_token_ids == unknown)])
    flagged |= set(encoded.branch_response[before[encoded.branch_offsets[1:]] > before[scored_from]].tolist())
    flags = (f"{flag};unknown" if flag else "unknown" for flag in encoded.flags)
    own = zip(flags, encoded.flags, strict=True)
    return replace(encoded, flags=tuple(new if r in flagged else old for r, (new, old) in enumerate(own)))


def _with_context(draft: Draft, placed: Sequence[Placed | None]) -> dict[int, Placed]:
    """The branches of each response of which all first scored tokens have one before them; flags the others, and those
    with closing marks."""
    own = {}
    for r, entry in enumerate(placed):
        if entry is None:
            continue
        base, branches = entry
        if base + min(map(add, branches.parents, branches.scored)) < 1:
            draft.flags[r].append("no_context")
            continue
        own[r] = entry
        if branches.closing_mark:
            draft.flags[r].append("closing_mark")
    return own
