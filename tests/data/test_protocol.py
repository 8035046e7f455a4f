"""The study's rules for text and tokens, on small cases; test_encode.py compares them on real transcripts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from psykern.core.errors import Source
from psykern.core.types import Transcript
from psykern.data.protocol import MAX_CHARS, keep_responses, study_marks, study_response, study_spans, study_text

OPEN, CLOSE = [7], [8]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a <<b>> c", "a <<b>> c", id="nothing to patch"),
        pytest.param("<<skip>> and <<skip>>", "<<skip>>. and <<skip>>.", id="skip gets a full stop"),
        pytest.param("<<-5>> <<- >>", "<< -5>> << ->>", id="minus gets a space"),
        pytest.param("<<think>>", "<< think>>", id="think gets a space"),
        pytest.param("click More Details >> and <<a>>", "click More Details -> and <<a>>", id="details button"),
        pytest.param("<<a>> <<b>> <<c", "<<a>> <<b>> ", id="unclosed mark is dropped"),
        pytest.param("a <<", "a ", id="unclosed mark at the end is dropped"),
        pytest.param("<<a >> <<b\n\t>> <<\u00a0>>", "<<a>> <<b>> <<>>", id="white space before a closing mark"),
        pytest.param("<<a>>  >>", "<<a>>>>", id="white space before a stray closing mark"),
        pytest.param("x" * MAX_CHARS + "<<a>>", "x" * MAX_CHARS, id="cut behind the limit"),
        pytest.param("x" * (MAX_CHARS - 4) + "<<a>>", "x" * (MAX_CHARS - 4), id="cut inside a response"),
        pytest.param("x" * (MAX_CHARS - 8) + "<<skip>>y", "x" * (MAX_CHARS - 8) + "<<skip>>.", id="cut before patches"),
        pytest.param("<<a>" + "x" * MAX_CHARS, "", id="cut leaves one unclosed mark"),
        pytest.param("", "", id="empty"),
    ],
)
def test_study_text(text: str, expected: str) -> None:
    assert study_text(text) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("A", ("A", ">>")),
        ("-5.3", (" -5.3", ">>")),
        ("think", (" think", ">>")),
        ("skip", ("skip", ">>.")),
        ("word \n", ("word", ">>")),
        (" ", ("", ">>")),
        ("", ("", ">>")),
        (">", (">", ">>")),
        ("More Details ", ("More Details", ">>")),
    ],
)
def test_study_response(response: str, expected: tuple[str, str]) -> None:
    assert study_response(response) == expected
    assert study_response(expected[0]) == expected, "a patched response is not patched again"


@pytest.mark.parametrize(
    ("text", "insides"),
    [
        ("a <<b>> c <<>> <<d\ne>>.", ["b", "", "d\ne"]),
        ("<<More Details ->, then <<A>>", [None, "A"]),
        ("<<A>> <<More Details ->", ["A", None]),
        ("<<a>>>", ["a"]),
        ("no marks", []),
    ],
)
def test_study_marks(text: str, insides: list[str | None]) -> None:
    marks = study_marks(text)
    assert marks.shape == (len(insides), 2)
    assert [text[a:b] if b >= 0 else None for a, b in marks] == insides


@pytest.mark.parametrize(
    ("tokens", "spans"),
    [
        pytest.param([1, 7, 2, 3, 8, 1, 7, 4, 8], [(2, 4), (7, 8)], id="two responses"),
        pytest.param([7, 2, 8], [(1, 2)], id="mark first"),
        pytest.param([1, 7, 8, 7, 2, 8], [(4, 5)], id="an empty response has no entry"),
        pytest.param([1, 7, 2, 3, 9, 1, 7, 4, 8, 1], [(2, 8)], id="leaks over an opening mark to the next closing one"),
        pytest.param([1, 7, 2, 3], [(2, 4)], id="leaks to the end"),
        pytest.param([1, 8, 8, 7, 2, 8, 8, 7], [(4, 5)], id="stray closing marks, opening mark last"),
        pytest.param([1, 7, 7, 2, 8], [(2, 4)], id="second opening mark is scored"),
        pytest.param([1, 2, 3], [], id="no marks"),
        pytest.param([], [], id="no tokens"),
    ],
)
def test_study_spans(tokens: list[int], spans: list[tuple[int, int]]) -> None:
    result = study_spans(np.array(tokens, dtype=np.int32), OPEN, CLOSE)
    assert result.dtype == np.int32 and result.shape == (len(spans), 2)
    assert [tuple(span) for span in result.tolist()] == spans


@pytest.mark.parametrize(
    ("tokens", "spans"),
    [
        pytest.param([5, 6, 1, 9, 9, 2], [(2, 3)], id="plain"),
        pytest.param([5, 1, 5, 6, 1, 9, 2, 9, 9], [(4, 7)], id="half a mark is none"),
        pytest.param([5, 5, 6, 9, 9, 5], [], id="empty, half a mark last"),
        pytest.param([5, 6, 9, 9, 9, 5, 6, 1, 9, 9], [(7, 8)], id="search goes on behind the mark"),
        pytest.param([5, 6, 9], [(2, 3)], id="shorter than a mark behind"),
        pytest.param([5], [], id="shorter than a mark"),
    ],
)
def test_study_spans_with_marks_of_two_tokens(tokens: list[int], spans: list[tuple[int, int]]) -> None:
    result = study_spans(np.array(tokens, dtype=np.int32), [5, 6], [9, 9])
    assert [tuple(span) for span in result.tolist()] == spans


def test_study_spans_needs_marks() -> None:
    with pytest.raises(ValueError, match="open_ids, close_ids: expected at least one token each"):
        study_spans(np.array([1, 2], dtype=np.int32), [], CLOSE)


def test_study_spans_like_a_walk_over_random_tokens() -> None:
    """Few distinct tokens, so that marks overlap, repeat and stand at the ends."""
    rng = np.random.default_rng(0)
    for open_ids, close_ids in (([1], [2]), ([1, 1], [2]), ([1], [2, 2]), ([1, 2], [2, 1]), ([1, 2, 1], [3, 3])):
        for _ in range(300):
            tokens = rng.integers(0, 4, size=rng.integers(0, 25)).astype(np.int32)
            expected = _walked(tokens.tolist(), open_ids, close_ids)
            assert study_spans(tokens, open_ids, close_ids).tolist() == expected, tokens.tolist()


def _walked(tokens: list[int], open_ids: list[int], close_ids: list[int]) -> list[list[int]]:
    """PROTOCOL.md, rules 5 and 6, one token at a time."""
    scored = [False] * len(tokens)
    inside = False
    i = 0
    while i < len(tokens):
        mark = close_ids if inside else open_ids
        if tokens[i : i + len(mark)] == mark:
            inside = not inside
            i += len(mark)
        else:
            scored[i] = inside and i > 0
            i += 1
    return [[i, _run_end(scored, i)] for i in range(len(tokens)) if scored[i] and not (i and scored[i - 1])]


def _run_end(scored: list[bool], i: int) -> int:
    while i < len(scored) and scored[i]:
        i += 1
    return i


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[A-Z]", "Do <<A>> or b, AB, \nC,, and <<Z>>."),
        ("[a-z]", "Do A or <<b>>, AB, \nC,, and Z."),
        ("x", "Do A or b, AB, \nC,, and Z."),
        ("(?s).*", "Do <<A>> or <<b>>, <<AB>>, <<\nC>>,<<>>, and <<Z>>."),
    ],
    ids=["capitals", "small", "none", "all"],
)
def test_only_matching_responses_keep_their_marks(pattern: str, expected: str) -> None:
    kept = keep_responses(responses_of("Do <<A>> or <<b>>, <<AB>>, <<\nC>>,<<>>, and <<Z>>."), re.compile(pattern))
    assert kept.text == expected
    inside = [match[1] for match in re.finditer("<<(.*?)>>", expected, re.DOTALL)]
    assert [kept.text[a:b] for a, b in kept.responses_char.tolist()] == inside
    assert kept.options == tuple((response, "other") for response in inside)


def responses_of(text: str) -> Transcript:
    """A transcript in which each response has itself and another as options."""
    spans = [match.span(1) for match in re.finditer("<<(.*?)>>", text, re.DOTALL)]
    options = tuple((text[a:b], "other") for a, b in spans)
    return Transcript("study", "", "1", text, np.array(spans), options, Source("file.jsonl", 1))
