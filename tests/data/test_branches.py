"""Branches of options against the tokens of the whole text with each option in the response's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from support.protocol_rules import check_branches, replaced
from support.studies import STUDIES, TOKENIZERS, RealTokenizers, StudyRows
from support.tiny import batches_of, branches, build_tiny, encode, load, scored, scored_options, transcript, words
from tokenizers import AddedToken, normalizers, pre_tokenizers

from psykern.core.settings import Settings
from psykern.core.types import Transcript
from psykern.data.encode import Encoder
from psykern.data.tokenizer import Tokenizer

# Signs that merge with the marks, prefixes, white space, patched words, several tokens, several bytes, composition.
TRICKY = ("-5.3", "1", "10", "?", "word)", " x", "a b ", "skip", "think", "\u201cno\u201d", "e\u0301", "20 coins", ">")


def last(row: Transcript, count: int, options: tuple[str, ...]) -> Transcript:
    """The end of a real text with its last responses: short enough to tokenize once per option."""
    ends = [0] * count + (row.responses_char[:, 1] + 2).tolist()
    return transcript(row.text[ends[-count - 1] :], options)


def tokenized_again(batches: list[list[str]]) -> list[list[str]]:
    """Of the batches that encoding one text took, those with the whole text again, for want of a window."""
    return [batch for batch in batches[1:] if batch[0] == batches[0][0]]


@pytest.mark.parametrize("protocol", ["exact", "study"])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("study", STUDIES)
def test_branches_equal_the_replaced_text(
    real: RealTokenizers, study_rows: StudyRows, study: str, name: str, protocol: str
) -> None:
    row = study_rows(study, 3)[2]
    own = [row.text[a:b] for a, b in row.responses_char[-4:].tolist()]
    seen = tuple(dict.fromkeys(text for text in own if text.strip()))
    for count, options in ((4, seen), (2, TRICKY)):
        short = last(row, count, options)
        encoded = encode(real(name), short, protocol=protocol)
        assert len(encoded.branch_response) >= len(options)
        check_branches(real(name), short, encoded, protocol)


@pytest.mark.parametrize(("protocol", "boundary"), [("exact", "joint"), ("exact", "split"), ("study", "joint")])
@pytest.mark.parametrize("study", STUDIES)
def test_the_branch_of_the_response_itself_is_the_response(
    real: RealTokenizers,
    study_rows: StudyRows,
    monkeypatch: pytest.MonkeyPatch,
    study: str,
    protocol: str,
    boundary: str,
) -> None:
    batches = batches_of(monkeypatch)
    row = study_rows(study, 2)[1]
    texts = [row.text[a:b] for a, b in row.responses_char.tolist()]
    given = transcript(row.text, tuple((f"7{text}", text) if text.strip() else ("a", "b") for text in texts))
    encoded = encode(real("qwen3"), given, protocol=protocol, boundary=boundary)
    checked = 0
    for response, parent, first, tokens in list(branches(encoded))[1::2]:
        if encoded.flags[response] in (None, "straddles") and encoded.option_index[response] == 1:
            a, b = encoded.spans_tok[response].tolist()
            assert (parent, first) == (a, 0)
            assert tokens == encoded.token_ids[a:b].tolist()
            checked += 1
    assert checked >= 0.9 * len(encoded.responses)
    assert not tokenized_again(batches), "a window serves every response of a long text"


def test_split_branches_are_the_tokens_of_the_option_alone(tiny_bos: Tokenizer) -> None:
    row = transcript("x <<1>>\n y <<!>> z", (("1", "10", "-"), ("!", "ab")))
    encoded = encode(tiny_bos, row, boundary="split")
    assert words(tiny_bos, encoded.token_ids) == ["<bos>", "x", " <<", "1", ">>\n", " ", "y", " <<", "!"]
    assert encoded.flags == (None, None)
    assert [(r, parent, first) for r, parent, first, _ in branches(encoded)] == [(0, 3, 0)] * 3 + [(1, 8, 0)] * 2
    assert scored_options(tiny_bos, encoded) == [["1"], ["10"], ["-"], ["!"], ["ab"]]
    prefixes = transcript("x <<1>>\n y <<!>> z", ("a", "aa"))
    encoded = encode(tiny_bos, prefixes, boundary="split")
    assert scored_options(tiny_bos, encoded) == [["a", ">>\n"], ["a", "a", ">>\n"], ["a", ">>"], ["a", "a", ">>"]]
    assert encoded.flags == ("closing_mark", "closing_mark")


@pytest.mark.parametrize(
    ("options", "tokens", "flag"),
    [
        (("1", "2"), [["1"], ["2"]], None),
        (("1", "10"), [["1"], ["10"]], None),
        (("1", "12"), [["1", ">>"], ["1", "2", ">>"]], "closing_mark"),
        (("12", "3", "1"), [["1", "2", ">>"], ["3", ">>"], ["1", ">>"]], "closing_mark"),
        (("1", "1!"), [["1", ">>"], ["1", "!>>"]], "closing_mark"),
        (("-", "5"), [[" <<-"], ["5"]], None),
        (("5",), [["5"]], None),
    ],
)
def test_prefix_options_get_the_closing_mark(
    tiny: Tokenizer, options: tuple[str, ...], tokens: list[list[str]], flag: str | None
) -> None:
    encoded = encode(tiny, transcript("x <<1>> y z", options))
    # "1!" ends inside "!>>", so "1" is a prefix of it only by the tokens, not by the mark.
    assert scored_options(tiny, encoded) == tokens
    assert encoded.flags == (flag,)
    check_branches(tiny, transcript("x <<1>> y z", options), encoded)


def test_an_option_can_change_tokens_before_itself(tmp_path: Path) -> None:
    tokenizer = load(build_tiny(merges=("Ġ <", "< -", "Ġ< <", "> >")), tmp_path)
    row = transcript("a b c x <<5>> d e f", ("-5", "7"))
    encoded = encode(tokenizer, row)
    assert words(tokenizer, encoded.token_ids) == ["a", " ", "b", " ", "c", " ", "x", " <<", "5"]
    assert [(parent, first, words(tokenizer, ids)) for _, parent, first, ids in branches(encoded)] == [
        (7, 1, [" <", "<-", "5"]),
        (8, 0, ["7"]),
    ]
    check_branches(tokenizer, row, encoded)


def test_an_option_can_change_the_first_token_of_a_text(tmp_path: Path) -> None:
    """It has a score where a token stands before its first scored one, as a response has."""
    tokenizer = load(build_tiny(merges=("< ?", "<? >", "< <", "> >")), tmp_path)
    row = transcript("<<5>> y", ("?", "7"))
    encoded = encode(tokenizer, row)
    assert [(parent, first, words(tokenizer, ids)) for _, parent, first, ids in branches(encoded)] == [
        (0, 1, ["<", "<?>"]),
        (1, 0, ["7"]),
    ]
    assert encoded.flags == (None,)
    check_branches(tokenizer, row, encoded)


def test_an_option_in_the_first_token_has_no_probability(tmp_path: Path) -> None:
    tokenizer = load(build_tiny(merges=("< <", "<< -")), tmp_path)
    encoded = encode(tokenizer, transcript("<<5>> y", ("-", "7")))
    assert scored(tokenizer, encoded) == [["5"]]
    assert (encoded.flags, encoded.options) == (("no_context",), (None,))


def swallowing(token: str) -> tokenizers.Tokenizer:
    definition = build_tiny()
    definition.add_tokens([AddedToken(token)])
    return definition


def normalizing(normalizer: normalizers.Normalizer) -> tokenizers.Tokenizer:
    definition = build_tiny()
    definition.normalizer = normalizer
    return definition


def unsplit() -> tokenizers.Tokenizer:
    definition = build_tiny()
    definition.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return definition


@pytest.mark.parametrize(
    ("definition", "responses"),
    [
        pytest.param(build_tiny(), [], id="a window serves"),
        pytest.param(swallowing(" b c <<9"), [1], id="an option changes the window's first token"),
        pytest.param(swallowing("9>> d e"), [1], id="an option changes the window's last token"),
        pytest.param(normalizing(normalizers.Prepend("_")), [], id="a window has nothing put in front"),
        pytest.param(
            normalizing(normalizers.Replace(tokenizers.Regex("^ "), "_")),
            [0, 1, 2],
            id="a window begins otherwise than the same characters in a text",
        ),
        pytest.param(unsplit(), [0, 1, 2], id="no pre-tokens"),
    ],
)
def test_where_no_window_serves_the_whole_text_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, definition: tokenizers.Tokenizer, responses: list[int]
) -> None:
    batches = batches_of(monkeypatch)
    tokenizer = load(definition, tmp_path)
    row = transcript("w x y z <<1>> a b c <<2>> d e f <<3>> g h i", (("1", "8"), ("2", "9", "90"), ("3", "-3", "88")))
    encoded = encode(tokenizer, row)
    again = [{row.text} | {replaced(row, r, option)[0] for option in (row.options or ())[r]} for r in responses]
    assert [set(batch) for batch in tokenized_again(batches)] == again
    check_branches(tokenizer, row, encoded)


def test_equal_trials_are_tokenized_once(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_of(monkeypatch)
    rows = [transcript("Begin. " + "You press <<A>> and win 1.\n" * 300, ("A", "B"))] * 2
    for encoded in Encoder(tiny, Settings()).encode(rows).transcripts:
        assert scored_options(tiny, encoded) == [["A"], ["B"]] * 300
        assert encoded.branch_parent_tok.tolist() == np.repeat(encoded.spans_tok[:, 0], 2).tolist()
    assert [len(batch) for batch in batches] == [
        2,
        4,
    ]  # both texts; the first window has other words before it than all that follow


def test_options_of_an_empty_response(tiny: Tokenizer) -> None:
    row = transcript("x <<>> y", ("a", "-"))
    encoded = encode(tiny, row)
    assert encoded.flags == ("empty",) and encoded.option_index.tolist() == [-1]
    assert scored_options(tiny, encoded) == [["a"], [" <<-"]]
    assert len(encoded.token_ids) == encoded.branch_parent_tok.max() == 2
    check_branches(tiny, row, encoded)
