"""The published study's rules for text and tokens, condition *plain* (``protocol="study"``).

A transcript is cut to its first 32,768 characters, a few strings are patched, an unclosed mark and the white space
before closing marks are dropped. Of its tokens those between a run that equals the ids of ``" <<"`` and the next that
equals the ids of ``">>"`` are scored. Where a mark is part of a larger token it is not seen: a run of scored tokens can
leak into the text behind the response, and an empty response has no run.

Source: github.com/marcelbinz/Psych-201, ``0_analyses/eval.py`` at commit c63dea1.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np

from psykern.core.types import Transcript

MAX_CHARS = 32_768
OPEN_MARK = " <<"  # with the space: the study looks for the ids of this string
CLOSE_MARK = ">>"

# Applied in this order, to the text that is already cut.
_PATCHES = (
    ("<<skip>>", "<<skip>>."),
    ("<<-", "<< -"),
    ("<<think>>", "<< think>>"),
    ("More Details >>", "More Details ->"),
)
_SPACE_BEFORE_CLOSE = re.compile(r"\s+(?=>>)")


def keep_responses(transcript: Transcript, pattern: re.Pattern[str]) -> Transcript:
    """The transcript with only those responses marked that match ``pattern`` from end to end; the others lose their
    marks and stay as text, as in the study's discrete subset (source: ``psych201_push_to_hub.py``)."""
    text, place, shift = [], 0, 0
    spans, kept = [], []
    for r, (begin, end) in enumerate(transcript.responses_char.tolist()):
        if pattern.fullmatch(transcript.text, begin, end):
            spans.append((begin - shift, end - shift))
            kept.append(r)
            continue
        text += [transcript.text[place : begin - 2], transcript.text[begin:end]]
        place, shift = end + 2, shift + 4
    options = transcript.options
    return replace(
        transcript,
        text="".join([*text, transcript.text[place:]]),
        responses_char=np.array(spans, dtype=np.int64).reshape(-1, 2),
        options=None if options is None else tuple(options[r] for r in kept),
    )


def without_marks(transcript: Transcript) -> Transcript:
    """The transcript with the characters of its responses in their places, and no marks around them."""
    bounds = [0, *transcript.responses_char.ravel().tolist(), len(transcript.text)]
    pieces = [transcript.text[i:j] for i, j in pairwise(bounds)]
    outside = [piece.removeprefix(">>") if number else piece for number, piece in enumerate(pieces[::2])]
    outside[:-1] = [piece.removesuffix("<<") for piece in outside[:-1]]
    moved = 2 + 4 * np.arange(len(transcript.responses_char))  # marks up to each response
    text = "".join(chain.from_iterable(zip(outside, [*pieces[1::2], ""], strict=True)))
    return replace(transcript, text=text, responses_char=transcript.responses_char - moved[:, None])


def study_text(text: str) -> str:
    """The text that the study tokenizes for a transcript."""
    text = _patched(text[:MAX_CHARS])
    if text.count("<<") > text.count(">>"):
        text = text[: text.rfind("<<")]
    return _SPACE_BEFORE_CLOSE.sub("", text)


def study_response(response: str) -> tuple[str, str]:
    """What stands in the study's text for ``<<response>>``: the characters between the marks, and the closing mark
    with what the patches put behind it (a full stop after ``skip``)."""
    text = _SPACE_BEFORE_CLOSE.sub("", _patched(f"<<{response}>>"))
    close = text.rfind(">>")
    if close < 0:  # "More Details " loses its closing mark to a patch; as an option it is taken without
        return response.rstrip(), CLOSE_MARK
    return text[2:close], text[close:]


def distinct_responses(responses: Iterable[str], *, stripped: bool) -> tuple[str, ...]:
    """Of those that the rules make equal the first; ``stripped``: white space in front counts for nothing either, as in
    a chat."""
    firsts: dict[str, str] = {}
    for response in responses:
        text = study_response(response)[0]
        firsts.setdefault(text.strip() if stripped else text, response)
    return tuple(firsts.values())


def study_marks(text: str) -> np.ndarray:
    """[K, 2] int64, the characters between the marks of each response in a text made by :func:`study_text`.

    Row i belongs to response i of the transcript, as no rule drops an opening mark but at the end. The second column
    is -1 where a patch took the closing mark away.
    """
    begins = [match.end() for match in re.finditer("<<", text)]
    marks = np.empty((len(begins), 2), dtype=np.int64)
    for i, begin in enumerate(begins):
        limit = begins[i + 1] - 2 if i + 1 < len(begins) else len(text)
        marks[i] = begin, text.find(">>", begin, limit)
    return marks


def study_spans(token_ids: np.ndarray, open_ids: Sequence[int], close_ids: Sequence[int]) -> np.ndarray:
    """[K, 2] int32, first and one-past-last token of each run of scored tokens.

    ``token_ids`` [T] int32 is the whole sequence with its special tokens; ``open_ids`` and ``close_ids`` are the ids
    of the marks. A run without a closing mark behind it goes to the end. Empty runs give no entry. Two runs have marks
    between them, and token 0 is never in a run, as an opening mark comes first.
    """
    if not open_ids or not close_ids:
        raise ValueError("open_ids, close_ids: expected at least one token each")
    opens = _occurrences(token_ids, open_ids)
    closes = _occurrences(token_ids, close_ids)
    spans = []
    i = 0
    while i < len(opens):
        begin = opens[i] + len(open_ids)
        j = bisect_left(closes, begin)
        end = closes[j] if j < len(closes) else len(token_ids)
        if end > begin:
            spans.append((begin, end))
        i = bisect_left(opens, end + len(close_ids), lo=i + 1)
    return np.array(spans, dtype=np.int32).reshape(-1, 2)


def _patched(text: str) -> str:
    for old, new in _PATCHES:
        text = text.replace(old, new)
    return text


def _occurrences(token_ids: np.ndarray, part: Sequence[int]) -> list[int]:
    """Every index at which ``part`` begins in ``token_ids``, ascending."""
    count = len(token_ids) - len(part) + 1
    if count <= 0:
        return []
    hit = np.ones(count, dtype=bool)
    for j, token in enumerate(part):
        hit &= token_ids[j : j + count] == token
    return [int(i) for i in np.flatnonzero(hit)]
