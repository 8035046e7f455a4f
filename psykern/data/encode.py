"""Transcripts as tokens: the tokens of each response, and a branch of tokens for each of its answer options.

Response [a, b) of a text has the tokens [s, e) with s < b, e > a and e > s; one that reaches beyond a or b *straddles*.
``boundary="joint"`` tokenizes a text as one string; ``"split"`` tokenizes the pieces between the response's boundaries
one by one, so that no token straddles. ``protocol="study"`` takes text and spans from :mod:`.protocol` instead.

An option's branch is what the transcript's tokens would be if the response were that option. In a joint text the
option can change tokens around it, so a window around the response is tokenized again with the option in its place.
A window begins and ends at pre-tokens at least two away from the marks. It counts only if it reproduces the
transcript's own tokens and if every option leaves its ends as they are; else the whole text is tokenized again.
Where the tokens of an option are a proper prefix of another's, all options of that response also get the tokens of
the closing mark: else P("1") would contain P("10"). In a chat that mark is what the template puts behind a response.

Flags of a response: ``straddles``; ``empty`` (nothing between the marks); ``no_context`` (no token before the first
scored one, so no probability); ``closing_mark`` (appended to its options); ``leaks`` (study: the scored run is more
than the response). Several are joined by ``;``.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import tokenizers

from psykern.core.errors import CheckpointError, PsykernError, RowError
from psykern.core.settings import Boundary, Condition, OptionSource, OverLength, Protocol
from psykern.core.types import EncodedTranscript, Transcript
from psykern.data.chat import ChatTemplate, Rendered
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

# Characters that are tokenized in one batch; the tokenizer's own records take about 100 bytes per token meanwhile.
_BATCH_CHARS = 4_000_000
_WINDOW_WORDS = 2  # whole pre-tokens between a window's ends and the marks

_START = itemgetter(0)
_END = itemgetter(1)


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """The tokenizer of a model folder, with offsets that include white space."""

    backend: tokenizers.Tokenizer
    hash: str  # "sha256:…" of its definition (the bytes of tokenizer.json)
    size: int  # highest token id + 1
    front: tuple[int, ...]  # special tokens that it puts before a text by default
    back: tuple[int, ...]  # and behind

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
class _Tokens:
    """A text as tokens, special tokens included; those have no width and stand at the text's start or end."""

    ids: np.ndarray  # [T] int32
    start_char: np.ndarray  # [T] int32, never falling
    end_char: np.ndarray  # [T] int32, never falling
    word: np.ndarray  # [T] int32, number of the pre-token; -1 in front, one more than the last behind


class _Snippets:
    """Short texts and their tokens without special tokens, each tokenized once."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        distinct = list(dict.fromkeys(texts))
        self._known: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
        for batch in _batches(distinct):
            for text, encoding in zip(batch, tokenizer.encode_batch(batch, False), strict=True):
                self._known[text] = encoding.ids, encoding.offsets

    def __getitem__(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self._known[text]


_Insert = tuple[str, str]  # text between the marks; closing mark with what a patch put behind it
_Options = tuple[str, ...] | None  # of one response


@dataclass(frozen=True, slots=True, eq=False)
class _Draft:
    """A transcript with its responses found; the branches are still missing."""

    transcript: Transcript
    token_ids: np.ndarray  # [T] int32
    responses: tuple[str, ...]  # [R]
    spans_tok: np.ndarray  # [R, 2] int32
    flags: list[list[str]]  # [R]
    options: list[_Options]  # [R]
    option_index: list[int]  # [R]


@dataclass(frozen=True, slots=True, eq=False)
class _Joint:
    """A draft of a text that was tokenized as one string, with what its windows are cut from."""

    draft: _Draft
    text: str
    tokens: _Tokens
    marks_char: np.ndarray  # [R, 2] int64, the characters that an option replaces
    closes: list[str]  # [R] the closing mark behind them, with what a patch put behind it
    inserts: list[tuple[_Insert, ...] | None]  # [R] what each option puts in the place of both


class _Site(NamedTuple):
    """A window of a text around one response, with what each option puts in the response's place."""

    left: str  # up to the opening mark's end
    response: _Insert
    right: str
    options: tuple[_Insert, ...]
    starts_text: bool
    ends_text: bool

    def text(self, insert: _Insert) -> str:
        return f"{self.left}{insert[0]}{insert[1]}{self.right}"

    def texts(self) -> Iterator[str]:
        return map(self.text, (self.response, *self.options))

    @property
    def is_whole(self) -> bool:
        return self.starts_text and self.ends_text


class _Candidate(NamedTuple):
    """An option's tokens. The numbers are indices into ``ids``."""

    ids: list[int]
    begin: int  # where its branch begins
    first: int  # its first scored token
    stop: int  # past its last token
    closed: int  # past the last token of the closing mark


class _Branches(NamedTuple):
    """The branches of one response's options, counted from a token of the transcript."""

    original: list[int]  # the transcript's tokens from there on that the branches were checked against
    parents: list[int]  # [O] tokens before each branch
    scored: list[int]  # [O] first scored token, within the branch
    lengths: list[int]  # [O]
    token_ids: list[int]  # all branches, end to end
    closing_mark: bool
    blank: int | None  # the first option without tokens


_Placed = tuple[int, _Branches]  # the token of the transcript that the branches count from


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
            drafted = _with_branches(self.tokenizer, list(self._joint(transcripts, options, rendered)))
        encoded = []
        for draft, placed in drafted:
            error = _blank_option(draft, placed)
            if error is not None:
                reject(error)
                continue
            assembled = _assembled(draft, placed)
            whole = _cut(assembled, len(assembled.responses))
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

    def _options(self, transcript: Transcript, observed: Mapping[tuple[str, str], tuple[str, ...]]) -> list[_Options]:
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
        self, transcripts: Sequence[Transcript], options: Sequence[list[_Options]], rendered: Sequence[Rendered]
    ) -> Iterator[_Joint]:
        study = self.protocol == "study"
        if study and not self._chat:
            texts = [study_text(t.text) for t in transcripts]
            rendered = [Rendered(text, study_marks(text), False) for text in texts]
        texts = [of.text for of in rendered] if study else [t.text for t in transcripts]
        tokenized = _tokenize(self.tokenizer, texts)
        for i, (transcript, tokens, given) in enumerate(zip(transcripts, tokenized, options, strict=True)):
            if study:
                ids = self._open_ids, self._close_ids
                yield _study(transcript, rendered[i], tokens, given, *ids, is_chat=self._chat is not None)
            else:
                yield _exact(transcript, tokens, given, "" if self._chat else CLOSE_MARK)


def fit(encoded: EncodedTranscript, over_length: OverLength, max_positions: int | None) -> EncodedTranscript | None:
    """The transcript under the over-length policy, for a context of ``max_positions`` tokens. None: skipped.

    Raises PsykernError where it is too long and the policy is "error".
    """
    needed = _positions_needed(encoded)
    if max_positions is None or needed.max(initial=0) <= max_positions:
        return encoded
    if over_length == "error":
        raise PsykernError(
            f"{encoded.source.file}:{encoded.source.line}: {encoded.study}, participant {encoded.participant}: "
            f"needs {needed.max()} tokens of context, the model has {max_positions}; "
            'over-length policies: "error" stops, "skip" leaves such transcripts out, '
            '"truncate" keeps the responses that fit'
        )
    return None if over_length == "skip" else _cut(encoded, int(np.argmax(needed > max_positions)))


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        if batch and chars + len(text) > _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
    if batch:
        yield batch


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[_Tokens]:
    for batch in _batches(texts):
        for text, encoding in zip(batch, tokenizer.encode_batch(batch, False), strict=True):
            yield _tokens(tokenizer, encoding, len(text))


def _tokens(tokenizer: Tokenizer, encoding: tokenizers.Encoding, num_chars: int) -> _Tokens:
    """Arrays of an encoding without special tokens, with the special tokens put around it."""
    front, back = len(tokenizer.front), len(tokenizer.back)
    ids = encoding.ids
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids)).reshape(-1, 2)
    words = np.array(encoding.word_ids, dtype=np.int32)

    def around(before: int, middle: np.ndarray, after: int) -> np.ndarray:
        return np.pad(middle, (front, back), constant_values=(before, after))

    return _Tokens(
        ids=np.array([*tokenizer.front, *ids, *tokenizer.back], dtype=np.int32),
        start_char=around(0, offsets[:, 0], num_chars),
        end_char=around(0, offsets[:, 1], num_chars),
        word=around(-1, words, int(words[-1]) + 1 if len(words) else 0),
    )


def _inside(transcript: Transcript) -> list[str]:
    return [transcript.text[a:b] for a, b in transcript.responses_char.tolist()]


def _exact(transcript: Transcript, tokens: _Tokens, options: list[_Options], close: str) -> _Joint:
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
    draft = _Draft(
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
    return _Joint(draft, transcript.text, tokens, marks, [close] * len(marks), inserts)


def _index(response: str, options: _Options) -> int:
    return options.index(response) if options and response in options else -1


def _flag_unscored(draft: _Draft) -> None:
    """Flags responses without a score; a span that begins at token 0 becomes empty."""
    first, stop = draft.spans_tok.T
    for r in np.flatnonzero(first == stop):
        draft.flags[r].append("empty")
    for r in np.flatnonzero((first == 0) & (stop > 0)):
        draft.flags[r].append("no_context")
        draft.spans_tok[r] = 0


@lru_cache(maxsize=1024)
def _inserts(options: tuple[str, ...], close: str, *, patched: bool, stripped: bool = False) -> tuple[_Insert, ...]:
    """What each option puts in a response's place; ``patched`` as the study's rules would write it, ``stripped`` as a
    chat template would."""
    inserts = [study_response(option) if patched else (option, close) for option in options]
    return tuple((text.strip() if stripped else text, after if close else "") for text, after in inserts)


def _study(
    transcript: Transcript,
    rendered: Rendered,
    tokens: _Tokens,
    options: list[_Options],
    open_ids: list[int],
    close_ids: list[int],
    *,
    is_chat: bool,
) -> _Joint:
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
    draft = _Draft(
        transcript=transcript,
        token_ids=tokens.ids,
        responses=tuple(text[i:j] for i, j in zip(begins.tolist(), reads.tolist(), strict=True)),
        spans_tok=spans,
        flags=[["leaks"] if leaks else [] for leaks in (begins < a) | (ends > b)],
        options=own,
        option_index=[_patched_index(text, of) for text, of in zip(inside, inserts, strict=True)],
    )
    closes = ["" if is_chat else study_response(response)[1] for response in inside]
    return _Joint(draft, text, tokens, marks[owners], closes, inserts)


def _patched_index(inside: str, inserts: tuple[_Insert, ...] | None) -> int:
    """The option that the characters between the marks are, but for white space around them; -1: none."""
    return _index(inside.strip(), tuple(insert.strip() for insert, _ in inserts or ()))


def _with_branches(tokenizer: Tokenizer, joints: list[_Joint]) -> Iterator[tuple[_Draft, list[_Placed | None]]]:
    """Each draft with the branches of its responses. Equal windows are tokenized once."""
    sites = [_sites(tokenizer, joint) for joint in joints]
    windows = dict.fromkeys(site for of in sites for site, _, _ in of.values() if not site.is_whole)
    snippets = _Snippets(tokenizer, (text for site in windows for text in site.texts()))
    known = {site: _site_branches(site, snippets) for site in windows}
    for joint, of in zip(joints, sites, strict=True):
        placed: list[_Placed | None] = [None] * len(joint.inserts)
        ids = joint.tokens.ids.tolist() if of else []
        for r, (site, begin, end) in of.items():
            branches = known.get(site)
            if branches is not None and branches.original == ids[begin:end]:
                placed[r] = begin, branches
            else:
                placed[r] = len(tokenizer.front), _whole_branches(tokenizer, joint, r, site)
        yield joint.draft, placed


def _sites(tokenizer: Tokenizer, joint: _Joint) -> dict[int, tuple[_Site, int, int]]:
    """The window of each response with options, and the tokens [begin, end) of the transcript that it covers."""
    sites = {}
    with_options = [r for r, inserts in enumerate(joint.inserts) if inserts]
    windows = _windows(tokenizer, joint, with_options).tolist() if with_options else []
    for r, (begin, end, left, right) in zip(with_options, windows, strict=True):
        a, b = joint.marks_char[r].tolist()
        site = _Site(
            left=joint.text[left:a],
            response=(joint.text[a:b], joint.closes[r]),
            right=joint.text[b + len(joint.closes[r]) : right],
            options=joint.inserts[r] or (),
            starts_text=left == 0,
            ends_text=right == len(joint.text),
        )
        sites[r] = site, begin, end
    return sites


def _windows(tokenizer: Tokenizer, joint: _Joint, responses: list[int]) -> np.ndarray:
    """[n, 4] int64, the first and one-past-last token, then character, of the window around each response."""
    tokens = joint.tokens
    a, b = joint.marks_char[responses].T
    after = b + [len(joint.closes[r]) for r in responses]
    opening = np.searchsorted(tokens.end_char, a - len("<<"), side="right")
    closing = np.searchsorted(tokens.start_char, after, side="left") - 1
    own_first, own_stop = len(tokenizer.front), len(tokens.ids) - len(tokenizer.back)
    begin = np.searchsorted(tokens.word, tokens.word[opening] - _WINDOW_WORDS, side="left")
    end = np.searchsorted(tokens.word, tokens.word[closing] + _WINDOW_WORDS, side="right")
    begin, end = np.maximum(begin, own_first), np.minimum(end, own_stop)
    # A window ends where the next token starts, as a composed character's last part is in no token.
    left = np.where(begin == own_first, 0, tokens.start_char[begin])
    right = np.where(end == own_stop, len(joint.text), np.append(tokens.start_char, 0)[end])
    return np.stack([begin, end, left, right], axis=1).astype(np.int64)


def _whole_branches(tokenizer: Tokenizer, joint: _Joint, r: int, site: _Site) -> _Branches:
    """The branches of response r from the whole text: always exact, and slow."""
    a, b = joint.marks_char[r].tolist()
    after = joint.text[b + len(joint.closes[r]) :]
    whole = site._replace(left=joint.text[:a], right=after, starts_text=True, ends_text=True)
    branches = _site_branches(whole, _Snippets(tokenizer, whole.texts()))
    assert branches is not None  # only a window can be too narrow
    return branches


def _site_branches(site: _Site, snippets: _Snippets) -> _Branches | None:
    """The branches in one window. None: an option changes a token at an end of the window, so it is too narrow."""
    original, offsets = snippets[site.text(site.response)]
    from_end = len(site.text(site.response)) - offsets[-1][0]
    candidates = []
    for insert in site.options:
        ids, offsets = snippets[site.text(insert)]
        candidate = _candidate(site, insert, original, ids, offsets)
        if not site.starts_text and candidate.begin == 0:
            return None
        resumed = ids[-1] == original[-1] and len(site.text(insert)) - offsets[-1][0] == from_end
        if not site.ends_text and not (resumed and candidate.closed < len(ids)):
            return None
        candidates.append(candidate)
    return _branches(original, candidates)


def _candidate(
    site: _Site, insert: _Insert, original: list[int], ids: list[int], offsets: list[tuple[int, int]]
) -> _Candidate:
    """An option's branch begins at its first scored token, or at the token before that where the text's tokens
    change."""
    a = len(site.left)
    b = a + len(insert[0])
    first = bisect_right(offsets, a, key=_END)
    stop = max(first, bisect_left(offsets, b, key=_START)) if insert[0] else first
    changed = next((i for i, (new, old) in enumerate(zip(ids, original, strict=False)) if new != old), first)
    closed = bisect_left(offsets, b + len(CLOSE_MARK), key=_START)
    return _Candidate(ids, begin=min(first, changed), first=first, stop=stop, closed=closed)


def _branches(original: list[int], candidates: Sequence[_Candidate]) -> _Branches:
    """The branches of a response's options, with the closing mark's tokens where the options need them."""
    options = sorted(c.ids[c.first : c.stop] for c in candidates)
    # In sorted order, a list that begins any other begins the next one that differs from it.
    closing_mark = any(len(one) < len(two) and two[: len(one)] == one for one, two in pairwise(options))
    stops = [c.closed if closing_mark else c.stop for c in candidates]
    return _Branches(
        original=original,
        parents=[c.begin for c in candidates],
        scored=[c.first - c.begin for c in candidates],
        lengths=[stop - c.begin for c, stop in zip(candidates, stops, strict=True)],
        token_ids=[token for c, stop in zip(candidates, stops, strict=True) for token in c.ids[c.begin : stop]],
        closing_mark=closing_mark,
        blank=next((i for i, c in enumerate(candidates) if c.first == c.stop), None),
    )


def _split(
    tokenizer: Tokenizer, transcripts: Sequence[Transcript], options: Sequence[list[_Options]]
) -> Iterator[tuple[_Draft, list[_Placed | None]]]:
    """Each transcript from the tokens of its pieces, with the branches of its responses. Equal pieces are tokenized
    once."""
    pieces = [_pieces(transcript) for transcript in transcripts]
    given = dict.fromkeys(chain.from_iterable(options))
    snippets = _Snippets(tokenizer, chain(chain.from_iterable(pieces), *(of for of in given if of)))
    for transcript, own, of in zip(transcripts, pieces, options, strict=True):
        draft = _split_draft(tokenizer, transcript, own, of, snippets)
        starts = draft.spans_tok[:, 0].tolist()
        placed: list[_Placed | None] = [
            (start, _split_branches(texts, after, snippets)) if texts else None
            for start, texts, after in zip(starts, of, own[2::2], strict=True)
        ]
        _flag_unscored(draft)
        yield draft, placed


def _pieces(transcript: Transcript) -> list[str]:
    """2 R + 1 pieces: the text up to a response's opening mark, the response, the text from its closing mark on."""
    bounds = [0, *transcript.responses_char.ravel().tolist(), len(transcript.text)]
    return [transcript.text[i:j] for i, j in pairwise(bounds)]


def _split_draft(
    tokenizer: Tokenizer, transcript: Transcript, pieces: list[str], options: list[_Options], snippets: _Snippets
) -> _Draft:
    ids = [snippets[piece][0] for piece in pieces]
    bounds = np.cumsum([len(tokenizer.front), *map(len, ids)])  # piece i is bounds[i] to bounds[i + 1]
    responses = tuple(pieces[1::2])
    return _Draft(
        transcript=transcript,
        token_ids=np.fromiter(chain(tokenizer.front, *ids), dtype=np.int32),
        responses=responses,
        spans_tok=bounds[1:-1].reshape(-1, 2).astype(np.int32),
        flags=[[] for _ in responses],
        options=options,
        option_index=[_index(text, of) for text, of in zip(responses, options, strict=True)],
    )


def _split_branches(options: tuple[str, ...], after: str, snippets: _Snippets) -> _Branches:
    """``after`` is the piece that begins with the closing mark."""
    ids, offsets = snippets[after]
    closing = ids[: bisect_left(offsets, len(CLOSE_MARK), key=_START)]
    candidates = []
    for option in options:
        own = snippets[option][0]
        candidates.append(_Candidate(own + closing, 0, 0, len(own), len(own) + len(closing)))
    return _branches([], candidates)


def _blank_option(draft: _Draft, placed: list[_Placed | None]) -> RowError | None:
    for r, entry in enumerate(placed):
        if entry is not None and entry[1].blank is not None:
            option = (draft.options[r] or ())[entry[1].blank]
            number = entry[1].blank + 1
            reason = f'option {number} ("{option}") of response {r + 1} encodes to no token'
            return RowError(draft.transcript.source, reason)
    return None


def _assembled(draft: _Draft, placed: list[_Placed | None]) -> EncodedTranscript:
    """The draft with its branches, all tokens and all responses."""
    options: list[_Options] = [None] * len(placed)
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


def _positions_needed(encoded: EncodedTranscript) -> np.ndarray:
    """[R] int64, tokens of context that a response and its options need: the token at index p is predicted from the
    p before it."""
    first, stop = encoded.spans_tok.astype(np.int64).T
    needed = np.where(first < stop, stop - 1, 0)
    np.maximum.at(needed, encoded.branch_response, encoded.branch_parent_tok + np.diff(encoded.branch_offsets) - 1)
    return needed


def _cut(encoded: EncodedTranscript, count: int) -> EncodedTranscript:
    """The first ``count`` responses, with the tokens that they and their branches need."""
    branches = int(np.searchsorted(encoded.branch_response, count))
    first, stop = encoded.spans_tok[:count].T
    # A branch of an empty last response can begin behind the last scored token.
    num_tokens = max(stop[first < stop].max(initial=0), encoded.branch_parent_tok[:branches].max(initial=0))
    return replace(
        encoded,
        token_ids=encoded.token_ids[:num_tokens].copy(),
        responses=encoded.responses[:count],
        spans_tok=np.minimum(encoded.spans_tok[:count], num_tokens),
        flags=encoded.flags[:count],
        options=encoded.options[:count],
        option_index=encoded.option_index[:count],
        branch_response=encoded.branch_response[:branches],
        branch_parent_tok=encoded.branch_parent_tok[:branches],
        branch_scored_tok=encoded.branch_scored_tok[:branches],
        branch_offsets=encoded.branch_offsets[: branches + 1],
        branch_token_ids=encoded.branch_token_ids[: encoded.branch_offsets[branches]],
        num_dropped=len(encoded.responses) - count,
    )
