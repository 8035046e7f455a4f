"""Encoding against oracles that follow PROTOCOL.md one character or token at a time.

Synthetic texts use a byte-level tokenizer with a handful of merges, so that the expected tokens can be read off; the
real tokenizers and transcripts come from the shared data folder.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import shutil
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from support.tiny import branches, build_tiny, fail, scored, transcript, words
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

import psykern.data.branches
import psykern.data.tokenizer
from psykern.core.errors import CheckpointError, PsykernError, RowError
from psykern.core.types import EncodedTranscript, Transcript
from psykern.data.encode import Encoder
from psykern.data.tokenizer import Tokenizer

STUDIES = (
    "alsobay2025publicGoodsGame",
    "dezfouli2019",
    "franke2024bayesian",
    "frey2017mpl",
    "guenther2023ViSpa",
    "guenther2023associations_individual",
    "guenther2024substitutions",
    "haridi2024memory",
    "jagadish2023zero",
    "little2024functionestimation",
    "schiekiera2025metascience",
    "shahar2019twosteptask",
    "spektor2024lossaversion",
    "thoma2025riskychoice",
    "vantiel2021probabilistic_pragmatics",
)
TOKENIZERS = ("qwen3", "llama-3.1", "olmo-dolma2")


def load(tokenizer: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.fixture
def tiny(tmp_path: Path) -> Tokenizer:
    return load(build_tiny(), tmp_path)


@pytest.fixture
def tiny_bos(tmp_path: Path) -> Tokenizer:
    return load(build_tiny(bos=True), tmp_path)


@pytest.fixture(scope="session")
def real(shared: Path) -> Callable[[str], Tokenizer]:
    return cache(lambda name: Tokenizer.load(shared / "tokenizers" / name))


@pytest.fixture(scope="session")
def read(shared: Path) -> Callable[..., list[Transcript]]:
    @cache
    def rows(study: str, count: int, experiment: str = "") -> list[Transcript]:
        with gzip.open(shared / "psych" / f"{study}.jsonl.gz", "rt", encoding="utf-8") as lines:
            every = (json.loads(line) for line in lines)
            wanted = (row for row in every if experiment in row["experiment"])
            return [transcript(row["text"]) for row in itertools.islice(wanted, count)]

    return rows


def encode(tokenizer: Tokenizer, of: Transcript, **settings: Any) -> EncodedTranscript:
    (encoded,) = Encoder(tokenizer, **settings).encode([of], fail)
    return encoded


def scored_options(tokenizer: Tokenizer, encoded: EncodedTranscript) -> list[list[str]]:
    return [words(tokenizer, ids[first:]) for _, _, first, ids in branches(encoded)]


# Tokenizer


def test_ids_equal_those_of_transformers(shared: Path, read: Callable[..., list[Transcript]], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared / "tokenizers" / "qwen3" / name, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for study in ("thoma2025riskychoice", "guenther2024substitutions", "vantiel2021probabilistic_pragmatics"):
        for row in read(study, 4):
            ids = theirs(row.text).input_ids
            encoded = encode(ours, row)
            assert encoded.token_ids.tolist() == ids[: len(encoded.token_ids)]
            assert ours.encode_batch([row.text], True)[0].ids == ids


@pytest.mark.parametrize(
    ("name", "sha256", "size", "front"),
    [
        ("qwen3", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4", 151_669, ()),
        ("llama-3.1", "79e3e522635f3171300913bb421464a87de6222182a0570b9b2ccba2a964b2b4", 128_256, (128_000,)),
        ("olmo-dolma2", "3ca996cca8afea58b34e95c353e859333592642a5e51d695d7a6dbbaf692dfe9", 100_278, ()),
    ],
)
def test_real_tokenizers(
    real: Callable[[str], Tokenizer], name: str, sha256: str, size: int, front: tuple[int, ...]
) -> None:
    tokenizer = real(name)
    assert (tokenizer.hash, tokenizer.size, tokenizer.front, tokenizer.back) == (f"sha256:{sha256}", size, front, ())


def test_offsets_include_white_space_and_nothing_is_cut(tmp_path: Path) -> None:
    definition = build_tiny()
    definition.enable_truncation(3)
    definition.enable_padding(length=50)
    tokenizer = load(definition, tmp_path)
    encoding = tokenizer.encode_batch(["x <<a b>>"], True)[0]
    assert encoding.offsets == [(0, 1), (1, 4), (4, 5), (5, 6), (6, 7), (7, 9)]


def test_special_tokens_on_both_sides(tmp_path: Path) -> None:
    definition = build_tiny(bos=True)
    definition.add_special_tokens(["<eos>"])
    vocab = definition.get_vocab(with_added_tokens=True)
    ids = [(token, vocab[token]) for token in ("<bos>", "<eos>")]
    definition.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    tokenizer = load(definition, tmp_path)
    assert (tokenizer.front, tokenizer.back) == ((ids[0][1],), (ids[1][1],))
    assert tokenizer.size == ids[1][1] + 1
    row = transcript("x <<a>> <<b>>", ("a", "c"))
    assert scored(tokenizer, encode(tokenizer, row)) == [["a"], ["b"]]
    # The study's tokens run to the end of the sequence where a closing mark is hidden in a larger token.
    study = encode(tokenizer, transcript("x <<a>>\n"), protocol="study")
    assert scored(tokenizer, study) == [["a", ">>\n", "<eos>"]] and study.responses == ("a>>\n",)


def test_a_folder_without_tokenizer_json_is_read_by_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    build_tiny().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.load(tmp_path)
    encoded = encode(tokenizer, transcript("x <<10>> y"))
    assert scored(tokenizer, encoded) == [["10"]]
    assert tokenizer.hash.startswith("sha256:")


@pytest.mark.parametrize(
    "content", [None, "{", '{"model": {"type": "no such model"}}'], ids=["no file", "cut", "wrong"]
)
def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# Spans, protocol "exact"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("study", STUDIES)
def test_exact_spans_are_the_responses(
    real: Callable[[str], Tokenizer], read: Callable[..., list[Transcript]], study: str, name: str
) -> None:
    tokenizer = real(name)
    for row in read(study, 2 if name == "qwen3" else 1):
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


@lru_cache(maxsize=64)
def whole(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer.backend.encode(text, add_special_tokens=True)
    return encoding.ids, encoding.offsets


def test_llama_puts_a_token_in_front(real: Callable[[str], Tokenizer], read: Callable[..., list[Transcript]]) -> None:
    for settings in ({}, {"boundary": "split"}, {"protocol": "study"}):
        encoded = encode(real("llama-3.1"), read("thoma2025riskychoice", 1)[0], **settings)
        assert encoded.token_ids[0] == 128_000 and 128_000 not in encoded.token_ids[1:]
        assert scored(real("llama-3.1"), encoded) == [[text] for text in encoded.responses]


def test_a_minus_sign_straddles_unless_split_or_patched(
    real: Callable[[str], Tokenizer], read: Callable[..., list[Transcript]]
) -> None:
    row = read("little2024functionestimation", 1)[0]
    minus = [text.startswith("-") for text in encode(real("qwen3"), row).responses]
    assert 50 < sum(minus) < len(minus) - 50
    joint = encode(real("qwen3"), row)
    assert joint.flags == tuple("straddles" if is_minus else None for is_minus in minus)
    for settings in ({"boundary": "split"}, {"protocol": "study"}):
        assert set(encode(real("qwen3"), row, **settings).flags) == {None}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("study", STUDIES)
def test_split_tokens_never_straddle(
    real: Callable[[str], Tokenizer], read: Callable[..., list[Transcript]], study: str, name: str
) -> None:
    tokenizer = real(name)
    row = read(study, 2)[1]
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


def test_empty_and_blank_responses(
    real: Callable[[str], Tokenizer], read: Callable[..., list[Transcript]], tiny: Tokenizer
) -> None:
    encoded = encode(real("qwen3"), read("haridi2024memory", 6)[5])
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


# Spans, protocol "study"


def patched_by_the_rules(text: str) -> str:
    """PROTOCOL.md, rules 1 to 3, one character at a time."""
    text = text[:32768]
    for old, new in (("<<skip>>", "<<skip>>."), ("<<-", "<< -"), ("<<think>>", "<< think>>")):
        text = new.join(text.split(old))
    text = "More Details ->".join(text.split("More Details >>"))
    opens, closes = len(text.split("<<")) - 1, len(text.split(">>")) - 1
    if opens > closes:
        text = "<<".join(text.split("<<")[:-1])
    parts = text.split(">>")
    return ">>".join([*(part.rstrip() for part in parts[:-1]), parts[-1]])


def scored_by_the_rules(ids: list[int], open_ids: list[int], close_ids: list[int]) -> list[list[int]]:
    """PROTOCOL.md, rules 5 and 6: a label per token, then groups of neighbours."""
    labels = [False] * len(ids)
    inside, i = False, 0
    while i < len(ids):
        mark = close_ids if inside else open_ids
        is_mark = ids[i : i + len(mark)] == mark
        labels[i] = inside and not is_mark and i > 0
        inside ^= is_mark
        i += len(mark) if is_mark else 1
    spans = []
    for is_scored, group in itertools.groupby(range(len(ids)), key=labels.__getitem__):
        tokens = list(group)
        if is_scored:
            spans.append([tokens[0], tokens[-1] + 1])
    return spans


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("study", STUDIES)
def test_study_spans_follow_the_rules(
    real: Callable[[str], Tokenizer], read: Callable[..., list[Transcript]], study: str, name: str
) -> None:
    tokenizer = real(name)
    open_ids, close_ids = (tokenizer.backend.encode(mark, add_special_tokens=False).ids for mark in (" <<", ">>"))
    for row in read(study, 8 if name == "qwen3" else 2):
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
    real: Callable[[str], Tokenizer], read: Callable[..., list[Transcript]], experiment: str, leaks: bool
) -> None:
    rows = read("vantiel2021probabilistic_pragmatics", 3, experiment)
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


# Options

# Signs that merge with the marks, prefixes, white space, patched words, several tokens, several bytes, composition.
TRICKY = ("-5.3", "1", "10", "?", "word)", " x", "a b ", "skip", "think", "\u201cno\u201d", "e\u0301", "20 coins", ">")


def last(row: Transcript, count: int, options: tuple[str, ...]) -> Transcript:
    """The end of a real text with its last responses: short enough to tokenize once per option."""
    ends = [0] * count + (row.responses_char[:, 1] + 2).tolist()
    return transcript(row.text[ends[-count - 1] :], options)


def replaced(row: Transcript, response: int, option: str) -> tuple[str, int, int]:
    """The text with another response, and where that stands."""
    a, b = row.responses_char[response].tolist()
    return row.text[:a] + option + row.text[b:], a, a + len(option)


def replaced_in_study(row: Transcript, response: int, option: str) -> tuple[str, int, int]:
    """The same under the study's rules; the response keeps its place among the opening marks."""
    text = patched_by_the_rules(replaced(row, response, option)[0])
    a, behind = ([match.end() for match in re.finditer("<<", text)] + [len(text)])[response : response + 2]
    return text, a, text.rindex(">>", a, behind)


def owner_in_study(tokenizer: Tokenizer, row: Transcript, encoded: EncodedTranscript, run: int) -> int:
    """The response that a scored run belongs to: that of the opening mark before it."""
    text = patched_by_the_rules(row.text)
    begin = whole(tokenizer, text)[1][encoded.spans_tok[run, 0]][0]
    return text[:begin].count("<<") - 1


def check_branches(tokenizer: Tokenizer, row: Transcript, encoded: EncodedTranscript, protocol: str = "exact") -> None:
    """Every branch against the tokens of the whole text with the option in the response's place."""
    study = protocol == "study"
    original = whole(tokenizer, patched_by_the_rules(row.text) if study else row.text)[0]
    for r, group in itertools.groupby(branches(encoded), key=lambda branch: branch[0]):
        response = owner_in_study(tokenizer, row, encoded, r) if study else r
        wanted = []
        for option in encoded.options[r] or ():
            text, a, b = (replaced_in_study if study else replaced)(row, response, option)
            ids, offsets = whole(tokenizer, text)
            overlaps = [i for i, (s, e) in enumerate(offsets) if s < b and e > a and e > s]
            closed = [i for i, (s, e) in enumerate(offsets) if s < b + 2 and e > a and e > s]
            wanted.append((ids, overlaps, closed))
        parts = [[ids[i] for i in overlaps] for ids, overlaps, _ in wanted]
        prefixed = any(x != y and y[: len(x)] == x for x in parts for y in parts)
        assert prefixed == ("closing_mark" in (encoded.flags[r] or ""))
        for (ids, overlaps, closed), (_, parent, first, tokens) in zip(wanted, group, strict=True):
            assert 1 <= parent <= len(encoded.token_ids)
            assert encoded.token_ids[:parent].tolist() + tokens == ids[: (closed if prefixed else overlaps)[-1] + 1]
            assert parent + first == overlaps[0]
            changed = next((i for i, (x, y) in enumerate(zip(ids, original, strict=False)) if x != y), len(ids))
            assert parent == min(changed, overlaps[0])


def count_whole_texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The responses for which no window served, filled while encoding."""
    seen: list[int] = []
    by_whole_text = psykern.data.branches._whole_branches

    def counted(tokenizer: Any, joint: Any, r: int, site: Any) -> Any:
        seen.append(r)
        return by_whole_text(tokenizer, joint, r, site)

    monkeypatch.setattr(psykern.data.branches, "_whole_branches", counted)
    return seen


@pytest.mark.parametrize("protocol", ["exact", "study"])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("study", STUDIES)
def test_branches_equal_the_replaced_text(
    real: Callable[[str], Tokenizer], read: Callable[..., list[Transcript]], study: str, name: str, protocol: str
) -> None:
    row = read(study, 3)[2]
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
    real: Callable[[str], Tokenizer],
    read: Callable[..., list[Transcript]],
    monkeypatch: pytest.MonkeyPatch,
    study: str,
    protocol: str,
    boundary: str,
) -> None:
    whole_texts = count_whole_texts(monkeypatch)
    row = read(study, 2)[1]
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
    assert not whole_texts, "a window serves every response of a long text"


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
        (("1", "1"), [["1"], ["1"]], None),
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


def swallowing(token: str) -> tokenizers.Tokenizer:
    definition = build_tiny()
    definition.add_tokens([AddedToken(token)])
    return definition


def prefixing() -> tokenizers.Tokenizer:
    definition = build_tiny()
    definition.normalizer = normalizers.Prepend("_")
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
        pytest.param(prefixing(), [0, 1, 2], id="a window begins otherwise than the same characters in a text"),
        pytest.param(unsplit(), [0, 1, 2], id="no pre-tokens"),
    ],
)
def test_where_no_window_serves_the_whole_text_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, definition: tokenizers.Tokenizer, responses: list[int]
) -> None:
    whole_texts = count_whole_texts(monkeypatch)
    tokenizer = load(definition, tmp_path)
    row = transcript("w x y z <<1>> a b c <<2>> d e f <<3>> g h i", (("1", "8"), ("2", "9", "90"), ("3", "-3", "88")))
    encoded = encode(tokenizer, row)
    assert whole_texts == responses
    check_branches(tokenizer, row, encoded)


def test_equal_trials_are_tokenized_once(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    encode_batch = Tokenizer.encode_batch

    def counted(self: Tokenizer, texts: Any, add_special_tokens: bool) -> Any:
        batches.append(len(texts))
        return encode_batch(self, texts, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    rows = [transcript("Begin. " + "You press <<A>> and win 1.\n" * 300, ("A", "B"))] * 2
    for encoded in Encoder(tiny).encode(rows, fail):
        assert scored_options(tiny, encoded) == [["A"], ["B"]] * 300
        assert encoded.branch_parent_tok.tolist() == np.repeat(encoded.spans_tok[:, 0], 2).tolist()
    assert batches == [2, 4]  # both texts; the first window has other words before it than all that follow


def test_texts_are_tokenized_in_batches_of_bounded_size(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [transcript(f"x <<{i}>> y", ("a", "b")) for i in range(7)]
    together = Encoder(tiny).encode(rows, fail)
    monkeypatch.setattr(psykern.data.tokenizer, "_BATCH_CHARS", 20)
    for one, other in zip(together, Encoder(tiny).encode(rows, fail), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.branch_token_ids.tolist() == other.branch_token_ids.tolist()


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
    for boundary in ("joint", "split"):
        (encoded,) = Encoder(tiny, options=source, boundary=boundary).encode([row], fail, observed)
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
    (encoded,) = Encoder(tiny, options="observed-experiment").encode([transcript("<<b>>")], fail, {})
    assert encoded.options == (None,)


def test_options_of_an_empty_response(tiny: Tokenizer) -> None:
    row = transcript("x <<>> y", ("a", "-"))
    encoded = encode(tiny, row)
    assert encoded.flags == ("empty",) and encoded.option_index.tolist() == [-1]
    assert scored_options(tiny, encoded) == [["a"], [" <<-"]]
    assert len(encoded.token_ids) == encoded.branch_parent_tok.max() == 2
    check_branches(tiny, row, encoded)


@pytest.mark.parametrize(("protocol", "boundary"), [("exact", "joint"), ("exact", "split"), ("study", "joint")])
def test_an_option_without_tokens_rejects_the_row(tiny: Tokenizer, protocol: Any, boundary: Any) -> None:
    good = transcript("x <<a>> <<b>>", ("a", "b"), line=1)
    bad = transcript("x <<a>> <<b>>", (("a", "b"), ("c", "d", "")), line=2)
    rejected: list[RowError] = []
    encoder = Encoder(tiny, protocol=protocol, boundary=boundary)
    encoded = encoder.encode([good, bad, good], rejected.append)
    assert [one.source.line for one in encoded] == [1, 1]
    assert [str(error) for error in rejected] == ['file.jsonl:2: option 3 ("") of response 2 encodes to no token']


# Over-length

LONG = "x <<a>> <<b>> <<ab>> <<a>>"  # x | <<|a|>>| <<|b|>>| <<|ab|>>| <<|a|>>: responses at 2, 5, 8, 11


def test_tokens_behind_the_last_response_are_left_out(tiny: Tokenizer) -> None:
    encoded = encode(tiny, transcript(LONG + " and more text"), max_positions=11)
    assert words(tiny, encoded.token_ids[-3:]) == [">>", " <<", "a"] and len(encoded.token_ids) == 12
    assert encoded.num_dropped == 0


@pytest.mark.parametrize("settings", [{}, {"options": "observed"}, {"boundary": "split"}, {"protocol": "study"}])
def test_a_transcript_without_responses_has_no_tokens(tiny_bos: Tokenizer, settings: dict[str, Any]) -> None:
    encoded = encode(tiny_bos, transcript("nothing here"), max_positions=1, **settings)
    assert len(encoded.token_ids) == 0 and encoded.spans_tok.shape == (0, 2) and encoded.responses == ()
    assert encoded.branch_offsets.tolist() == [0]


def test_over_length_is_an_error_that_says_what_to_do(tiny: Tokenizer) -> None:
    with pytest.raises(PsykernError) as caught:
        encode(tiny, transcript(LONG, line=3), max_positions=10)
    message = str(caught.value)
    for part in ("file.jsonl:3", "study, participant 1", "needs 11 tokens", "has 10", "error", "skip", "truncate"):
        assert part in message


def test_over_length_counts_what_branches_need(tiny: Tokenizer) -> None:
    row = transcript(LONG, (("a",),) * 3 + (("a", "bcd"),))
    assert len(encode(tiny, row, max_positions=13).token_ids) == 12
    with pytest.raises(PsykernError, match="needs 13 tokens"):
        encode(tiny, row, max_positions=12)


def test_over_length_skips(tiny: Tokenizer) -> None:
    encoder = Encoder(tiny, over_length="skip", max_positions=10)
    rows = [transcript(LONG), transcript("x <<a>>"), transcript(LONG)]
    assert [one.responses for one in encoder.encode(rows, fail)] == [("a",)]
    assert (encoder.num_skipped, encoder.num_dropped) == (2, 0)
    encoder.encode(rows[1:2], fail)
    assert encoder.num_skipped == 0


def test_over_length_truncates_at_a_response(tiny: Tokenizer) -> None:
    row = transcript(LONG, ("a", "b"))
    full = encode(tiny, row)
    for limit, count in ((11, 4), (10, 3), (8, 3), (7, 2), (2, 1), (1, 0)):
        encoder = Encoder(tiny, over_length="truncate", max_positions=limit)
        (encoded,) = encoder.encode([row], fail)
        assert (
            len(encoded.responses) == count == len(encoded.flags) == len(encoded.options) == len(encoded.option_index)
        )
        assert encoded.num_dropped == encoder.num_dropped == 4 - count
        assert encoded.spans_tok.tolist() == full.spans_tok[:count].tolist()
        assert encoded.token_ids.tolist() == full.token_ids[: encoded.spans_tok.max(initial=0)].tolist()
        assert list(branches(encoded)) == list(branches(full))[: 2 * count]


def test_real_truncation(real: Callable[[str], Tokenizer], read: Callable[..., list[Transcript]]) -> None:
    row = read("dezfouli2019", 1)[0]
    encoder = Encoder(real("qwen3"), options="observed", over_length="truncate", max_positions=4096)
    (encoded,) = encoder.encode([row], fail)
    assert 4096 - 40 < len(encoded.token_ids) <= 4097
    assert len(encoded.responses) + encoder.num_dropped == len(row.responses_char)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "chat"}, "protocol: expected one of exact, study, got 'chat'"),
        ({"boundary": "both"}, "boundary: expected one of joint, split, got 'both'"),
        ({"options": "all"}, "options: expected one of none, given, observed, observed-experiment, got 'all'"),
        ({"over_length": "cut"}, "over_length: expected one of error, skip, truncate, got 'cut'"),
        ({"protocol": "study", "boundary": "split"}, "boundary: .*got 'split'"),
    ],
)
def test_wrong_settings_are_named(tiny: Tokenizer, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(tiny, **settings)


def test_observed_experiment_needs_the_observed(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="observed: "):
        encode(tiny, transcript("<<a>>"), options="observed-experiment")
