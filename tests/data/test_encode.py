"""Encoding against oracles that follow PROTOCOL.md one character or token at a time.

Synthetic texts use a byte-level tokenizer with a handful of merges, so that the expected tokens can be read off; the
real tokenizers and transcripts come from the shared data folder.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.protocol_rules import check_branches, patched_by_the_rules, scored_by_the_rules, whole
from support.studies import STUDIES, TOKENIZERS, RealTokenizers, StudyRows
from support.tiny import build_tiny, encode, load, scored, scored_options, transcript
from tokenizers import AddedToken, normalizers

from psykern.core.errors import RowError
from psykern.core.settings import Boundary, Settings
from psykern.core.types import Transcript
from psykern.data.encode import Encoder
from psykern.data.tokenizer import Tokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("study", STUDIES)
def test_exact_spans_are_the_responses(real: RealTokenizers, study_rows: StudyRows, study: str, name: str) -> None:
    tokenizer = real(name)
    for row in study_rows(study, 2 if name == "qwen3" else 1):
        encoded = encode(tokenizer, row)
        a_b = row.responses_char.tolist()
        assert encoded.responses == tuple(row.text[a:b] for a, b in a_b)
        ids, offsets = whole(tokenizer, row.text)
        assert encoded.token_ids.tolist() == ids[: len(encoded.token_ids)]
        assert len(encoded.token_ids) == encoded.spans_tok.max()
        for (a, b), (first, stop), flag in zip(a_b, encoded.spans_tok.tolist(), encoded.flags, strict=True):
            if flag == "empty":
                assert a == b and first == stop
                continue
            assert flag == ("straddles" if offsets[first][0] < a or offsets[stop - 1][1] > b else None)
            assert offsets[first - 1][1] <= a < offsets[first][1] and offsets[stop - 1][0] < b <= offsets[stop][0]
            if flag is None:
                assert tokenizer.backend.decode(ids[first:stop]) == row.text[a:b]


def test_llama_puts_a_token_in_front(real: RealTokenizers, study_rows: StudyRows) -> None:
    for settings in ({}, {"boundary": "split"}, {"protocol": "study"}):
        encoded = encode(real("llama-3.1"), study_rows("thoma2025riskychoice", 1)[0], **settings)
        assert encoded.token_ids[0] == 128_000 and 128_000 not in encoded.token_ids[1:]
        assert scored(real("llama-3.1"), encoded) == [[text] for text in encoded.responses]


def test_a_minus_sign_straddles_unless_split_or_patched(real: RealTokenizers, study_rows: StudyRows) -> None:
    row = study_rows("little2024functionestimation", 1)[0]
    minus = [text.startswith("-") for text in encode(real("qwen3"), row).responses]
    assert 50 < sum(minus) < len(minus) - 50
    joint = encode(real("qwen3"), row)
    assert joint.flags == tuple("straddles" if is_minus else None for is_minus in minus)
    for settings in ({"boundary": "split"}, {"protocol": "study"}):
        assert set(encode(real("qwen3"), row, **settings).flags) == {None}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("study", STUDIES)
def test_split_tokens_never_straddle(real: RealTokenizers, study_rows: StudyRows, study: str, name: str) -> None:
    tokenizer = real(name)
    row = study_rows(study, 2)[1]
    encoded = encode(tokenizer, row, boundary="split")
    assert set(encoded.flags) <= {None, "empty"}
    pieces: list[int] = list(tokenizer.front)
    spans = []
    for piece in re.split("(?<=<<)(.*?)(?=>>)", row.text, flags=re.DOTALL):  # text, response, text, ...
        spans.append([len(pieces), len(pieces)])
        pieces += tokenizer.backend.encode(piece, add_special_tokens=False).ids
        spans[-1][1] = len(pieces)
    assert encoded.spans_tok.tolist() == spans[1::2]
    assert encoded.token_ids.tolist() == pieces[: encoded.spans_tok.max()]
    assert [tokenizer.backend.decode(encoded.token_ids[a:b].tolist()) for a, b in spans[1::2]] == list(
        encoded.responses
    )


def test_empty_and_blank_responses(real: RealTokenizers, study_rows: StudyRows, tiny: Tokenizer) -> None:
    encoded = encode(real("qwen3"), study_rows("haridi2024memory", 6)[5])
    empty = [r for r, text in enumerate(encoded.responses) if text == ""]
    assert [r for r, flag in enumerate(encoded.flags) if flag == "empty"] == empty
    assert all(start == end for start, end in encoded.spans_tok[empty])
    encoded = encode(tiny, transcript("x <<>> y << >> z <<\t>>"))
    assert scored(tiny, encoded) == [[], [" "], ["\t"]]
    assert encoded.flags == ("empty", None, None)


@pytest.mark.parametrize(
    ("text", "tokens", "flags"),
    [
        pytest.param("x <<-5>>", [[" <<-", "5"]], ["straddles"], id="beyond the start"),
        pytest.param("x <<5!>>", [["5", "!>>"]], ["straddles"], id="beyond the end"),
        pytest.param("x <<a>><<b>>", [["a"], ["b"]], [None, None], id="marks without a space between"),
        pytest.param("x <<!>><<!>> y", [["!>>"], ["!>>"]], ["straddles", "straddles"], id="twice in a row"),
        pytest.param("<<a>> <<b>>", [["a"], ["b"]], [None, None], id="at the start"),
        pytest.param("x <<abab>>\n", [["ab", "ab"]], [None], id="two tokens"),
        pytest.param("no responses", [], [], id="none"),
        pytest.param("", [], [], id="no text"),
    ],
)
def test_exact_spans(tiny: Tokenizer, text: str, tokens: list[list[str]], flags: list[str | None]) -> None:
    encoded = encode(tiny, transcript(text))
    assert scored(tiny, encoded) == tokens
    assert list(encoded.flags) == flags


def test_an_empty_response_inside_one_token_has_no_span(tmp_path: Path) -> None:
    definition = build_tiny()
    definition.add_tokens([AddedToken("<<>>")])
    encoded = encode(load(definition, tmp_path), transcript("x <<>> <<a>>"))
    assert encoded.flags == ("empty", None)
    assert np.diff(encoded.spans_tok).ravel().tolist() == [0, 1]


def test_characters_of_several_tokens(tiny: Tokenizer) -> None:
    encoded = encode(tiny, transcript("x <<\u00e9\U0001f9ea>> <<a\u00e9>>"))
    assert np.diff(encoded.spans_tok).ravel().tolist() == [2 + 4, 1 + 2]
    assert encoded.flags == (None, None)


def test_a_response_that_two_share_a_token_with(tmp_path: Path) -> None:
    definition = build_tiny()
    definition.add_tokens([AddedToken("b>><<c")])
    tokenizer = load(definition, tmp_path)
    encoded = encode(tokenizer, transcript("x <<ab>><<cd>>"))
    assert scored(tokenizer, encoded) == [["a", "b>><<c"], ["b>><<c", "d"]]
    assert encoded.flags == ("straddles", "straddles")


def test_no_probability_without_a_token_before(tmp_path: Path) -> None:
    definition = build_tiny()
    definition.add_tokens([AddedToken("<<-")])
    tokenizer = load(definition, tmp_path)
    row = transcript("<<-5>> <<a>>", ("-5", "7"))
    encoded = encode(tokenizer, row)
    assert scored(tokenizer, encoded) == [[], ["a"]]
    assert encoded.flags == ("straddles;no_context", None)
    assert encoded.options == (None, ("-5", "7")) and set(encoded.branch_response) == {1}
    assert encoded.option_index.tolist() == [-1, -1]
    definition = build_tiny(bos=True)
    definition.add_tokens([AddedToken("<<-")])
    encoded = encode(load(definition, tmp_path), row)
    assert encoded.flags == ("straddles", None) and encoded.spans_tok[0].tolist() == [1, 3]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("study", STUDIES)
def test_study_spans_follow_the_rules(real: RealTokenizers, study_rows: StudyRows, study: str, name: str) -> None:
    tokenizer = real(name)
    open_ids, close_ids = (tokenizer.backend.encode(mark, add_special_tokens=False).ids for mark in (" <<", ">>"))
    for row in study_rows(study, 8 if name == "qwen3" else 2):
        encoded = encode(tokenizer, row, protocol="study")
        text = patched_by_the_rules(row.text)
        ids, offsets = whole(tokenizer, text)
        spans = scored_by_the_rules(ids, open_ids, close_ids)
        assert encoded.spans_tok.tolist() == spans
        assert encoded.token_ids.tolist() == ids[: spans[-1][1] if spans else 0]
        assert list(encoded.responses) == [text[offsets[a][0] : offsets[b - 1][1]] for a, b in spans]
        assert {flag for text, flag in zip(encoded.responses, encoded.flags, strict=True) if ">>" in text} <= {"leaks"}
        assert {flag for text, flag in zip(encoded.responses, encoded.flags, strict=True) if ">>" not in text} <= {None}


@pytest.mark.parametrize(
    ("experiment", "leaks"),
    [("exp1a", False), ("exp1b", False), ("exp2a", True), ("exp2b", True), ("exp3", False), ("exp4", True)],
)
def test_a_line_break_behind_the_closing_mark_leaks(
    real: RealTokenizers, study_rows: StudyRows, experiment: str, leaks: bool
) -> None:
    rows = study_rows("vantiel2021probabilistic_pragmatics", 3, experiment)
    assert len(rows) == 3
    for row in rows:
        encoded = encode(real("qwen3"), row, protocol="study")
        assert ("leaks" in encoded.flags) is leaks
        assert ">>\n" in row.text if leaks else ">>\n" not in row.text
        assert all(
            (">>\n" in text) == (flag == "leaks") for text, flag in zip(encoded.responses, encoded.flags, strict=True)
        )


def test_study_runs_keep_the_options_of_their_response(tiny: Tokenizer) -> None:
    text = "x <<a>> <<>> <<-5 >> <<b>>\n <<c>> <<>>\n <<d>>"
    row = transcript(text, tuple((f"{r}!", text) for r, text in enumerate(("a", "-", "-5", "b", "c", "e", "d"))))
    encoded = encode(tiny, row, protocol="study")
    assert encoded.responses == ("a", " -5", "b>>\n <<c", ">>\n <<d")
    assert encoded.flags == (None, None, "leaks", "leaks")
    assert encoded.options == (("0!", "a"), ("2!", "-5"), ("3!", "b"), ("5!", "e"))
    assert encoded.option_index.tolist() == [1, 1, 1, -1]
    # Of a leaking run too, the options are what stands between the marks.
    pairs = [["0", "!>>"], ["a"]], [["2", "!>>"], [" ", "-", "5"]], [["3", "!"], ["b"]], [["5", "!"], ["e"]]
    assert scored_options(tiny, encoded) == [tokens for pair in pairs for tokens in pair]
    check_branches(tiny, row, encoded, "study")


def test_a_patch_that_takes_a_closing_mark_away(tiny: Tokenizer) -> None:
    # One opening mark is left over, so rule 3 drops the last response.
    row = transcript("x <<More Details >> y <<a>> <<b>> <<c>>", ("a", "b"))
    encoded = encode(tiny, row, protocol="study")
    assert encoded.responses == ("More Details -> y <<a", "b")
    assert encoded.flags == ("leaks", None)
    assert encoded.options == (None, ("a", "b")) and encoded.option_index.tolist() == [-1, 1]


def test_options_around_the_full_stop_behind_skip(tiny: Tokenizer) -> None:
    """As "skip" is a prefix of "skips", the closing mark's token is scored: it is another one before a full stop."""
    row = transcript("a b <<skip>>\nc d e <<a>>\nf g h", ("skip", "skips", "a"))
    encoded = encode(tiny, row, protocol="study")
    assert [tokens[-1] for tokens in scored_options(tiny, encoded)] == [">>", ">>\n", ">>\n"] * 2
    check_branches(tiny, row, encoded, "study")


def test_study_responses_keep_a_composed_character(tmp_path: Path) -> None:
    definition = build_tiny()
    definition.normalizer = normalizers.NFC()
    encoded = encode(load(definition, tmp_path), transcript("x <<ae\u0301>> y"), protocol="study")
    assert encoded.responses == ("ae\u0301",) and encoded.flags == (None,)


def test_a_closing_mark_hidden_at_the_end_of_the_text_leaks(tiny: Tokenizer) -> None:
    encoded = encode(tiny, transcript("x <<5!>>"), protocol="study")
    assert encoded.responses == ("5!>>",) and encoded.flags == ("leaks",)


def test_study_cuts_to_the_first_characters(tiny: Tokenizer) -> None:
    row = transcript("x <<a>>" + "y" * 32_760 + " <<b>>")
    assert encode(tiny, row).responses == ("a", "b")
    assert encode(tiny, row, protocol="study").responses == ("a",)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("none", [None, None, None]),
        ("given", [("a", "b"), None, ("c",)]),
        ("observed", [("b", "a"), ("b", "a"), ("b", "a")]),
        ("observed-experiment", [("p", "q"), ("p", "q"), ("p", "q")]),
    ],
)
def test_sources_of_options(tiny: Tokenizer, source: Any, options: list[tuple[str, ...] | None]) -> None:
    row = transcript("x <<b>> <<a>> <<b>>", (("a", "b"), (), ("c",)))
    observed = {("study", "experiment"): ("p", "q"), ("study", "other"): ("r", "s")}
    boundaries: tuple[Boundary, ...] = ("joint", "split")
    for boundary in boundaries:
        encoder = Encoder(tiny, Settings(options=source, boundary=boundary))
        (encoded,) = encoder.encode([row], observed).transcripts
        assert list(encoded.options) == options
        indices = [
            (of or ()).index(text) if text in (of or ()) else -1 for of, text in zip(options, "bab", strict=True)
        ]
        assert encoded.option_index.tolist() == indices
        assert len(encoded.branch_response) == sum(len(of or ()) for of in options)


def test_observed_options_are_few_and_not_blank(tiny: Tokenizer) -> None:
    def options(text: str) -> tuple[str, ...] | None:
        return encode(tiny, transcript(text), options="observed", max_options=3).options[0]

    assert options("<<b>> <<>> << >> <<a>> <<b>>") == ("b", "a")
    assert options("<<c>> <<b>> <<a>>") == ("c", "b", "a")
    assert options("<<c>> <<b>> <<a>> <<d>>") is None
    assert options("<<c>> <<c>>") is None
    encoder = Encoder(tiny, Settings(options="observed-experiment"))
    (encoded,) = encoder.encode([transcript("<<b>>")], {}).transcripts
    assert encoded.options == (None,)


@pytest.mark.parametrize(("protocol", "boundary"), [("exact", "joint"), ("exact", "split"), ("study", "joint")])
def test_an_option_without_tokens_rejects_the_row(tiny: Tokenizer, protocol: Any, boundary: Any) -> None:
    good = transcript("x <<a>> <<b>>", ("a", "b"), line=1)
    bad = transcript("x <<a>> <<b>>", (("a", "b"), ("c", "d", "")), line=2)
    encoded = Encoder(tiny, Settings(protocol=protocol, boundary=boundary)).encode([good, bad, good])
    assert [one.source.line for one in encoded.transcripts] == [1, 1]
    assert [str(error) for error in encoded.rejects] == [
        'file.jsonl:2: option 3 ("") of response 2 encodes to no token'
    ]


def test_observed_experiment_needs_the_observed(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="observed: "):
        encode(tiny, transcript("<<a>>"), options="observed-experiment")


def test_options_that_are_the_same_tokens_reject_the_row(tiny: Tokenizer, tmp_path: Path) -> None:
    """Each would take half of their probability: the study drops white space before a closing mark, a tokenizer may
    compose characters."""
    row = transcript("x <<2>> y <<1>>", options=((), ("2", "1 ", "1")))
    assert encode(tiny, row).options[1] == ("2", "1 ", "1")
    with pytest.raises(RowError, match=r'options 2 \("1 "\) and 3 \("1"\) of response 2 encode to the same tokens'):
        encode(tiny, row, protocol="study")
    composing = build_tiny()
    composing.normalizer = normalizers.NFC()
    row = transcript("x <<é>>", options=("é", "e\u0301"))
    for boundary in ("joint", "split"):
        assert encode(tiny, row, boundary=boundary).options[0] == ("é", "e\u0301")
        with pytest.raises(RowError, match=r"options 1 .* and 2 .* of response 1 encode to the same tokens"):
            encode(load(composing, tmp_path), row, boundary=boundary)


@pytest.mark.parametrize("source", ["observed", "observed-experiment"])
def test_observed_options_are_one_where_the_study_makes_them_one(tiny: Tokenizer, source: Any) -> None:
    row = transcript("x <<A >> y <<A>> z <<B>>")
    observed = {(row.study, row.experiment): ("A ", "A", "B")}
    for protocol, expected in (("exact", ("A ", "A", "B")), ("study", ("A ", "B"))):
        encoded = Encoder(tiny, Settings(options=source, protocol=protocol, max_options=3)).encode([row], observed)
        assert encoded.rejects == ()
        assert encoded.transcripts[0].options == (expected,) * 3
    encoded = Encoder(tiny, Settings(options=source, protocol="study", max_options=2)).encode([row], observed)
    assert encoded.transcripts[0].option_index.tolist() == [0, 0, 1]


@pytest.mark.parametrize("source", ["observed", "observed-experiment"])
@pytest.mark.parametrize("boundary", ["joint", "split"])
def test_observed_options_are_one_where_the_tokenizer_makes_them_one(
    tmp_path: Path, source: Any, boundary: Any
) -> None:
    """Qwen's tokenizers compose characters: one person's spelling is not to cost the rows of all others."""
    composing = build_tiny()
    composing.normalizer = normalizers.NFC()
    row = transcript("x <<\u00e9>> y <<e\u0301>> z <<B>>")
    observed = {(row.study, row.experiment): ("\u00e9", "e\u0301", "B")}
    settings = Settings(options=source, boundary=boundary, max_options=2)
    (encoded,) = Encoder(load(composing, tmp_path), settings).encode([row], observed).transcripts
    assert encoded.options == (("\u00e9", "B"), ("e\u0301", "B"), ("\u00e9", "B"))
    assert encoded.option_index.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({"condition": "persona"}, replace(transcript("x <<A>>", ("A", "B")), metadata=(("education", "<<HS>>"),))),
        ({"condition": "persona"}, replace(transcript("x <<A>>", ("A", "B")), metadata=(("education", "a << b"),))),
        ({"discrete": "[A-Z]"}, transcript("x <<a<>><b <<A>>", ("A", "B"))),
    ],
)
def test_the_study_finds_no_mark_that_is_none(tiny: Tokenizer, settings: dict[str, Any], row: Transcript) -> None:
    """Its runs would be of other responses, with their options."""
    with pytest.raises(RowError, match="take '<<' for a mark where no response is"):
        encode(tiny, row, protocol="study", **settings)
    assert scored(tiny, encode(tiny, row, **settings)) == [["A"]]
