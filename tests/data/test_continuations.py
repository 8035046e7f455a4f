"""Contexts and what follows them against the tokens of the whole text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.studies import STUDIES, TOKENIZERS, RealTokenizers, StudyRows
from support.tiny import batches_of, build_tiny, load, words
from support.tokenizer_kinds import END, KINDS, save
from tokenizers import AddedToken, Regex, normalizers

from psykern.data.branches import Placed
from psykern.data.continuations import Context, closing_behind, contexts, extended, option_branches
from psykern.data.tokenizer import Tokenizer

# What changes tokens before it: white space, composition, parts of words and of added tokens, marks, digits.
PIECES = (" ", "  ", "\n", "\t\n", "e", "\u0301", "n't", "'s", "<|", "end", "|>", END, "<<", ">>", "-7", "1", "234567")
PIECES += ("You press <<", "J", ". You win ", "\u4f60\u597d", "\U0001f642", "\u200d\U0001f642", "\u00df", "\ufb01", "_")
OPTIONS = ("1", "10", " x", "-7", "yes, of course", "n't", "\n", "\u0301e", "|>", "end|>", ">>")


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    @cache
    def of(name: str) -> Tokenizer:
        return Tokenizer.load(save(KINDS[name].build()[0], tmp_path_factory.mktemp("kind")))

    return of


def assert_equal(one: Context, two: Context) -> None:
    assert one.text == two.text
    for name in ("ids", "start_char", "end_char", "word"):
        of = getattr(one.tokens, name)
        assert of.tolist() == getattr(two.tokens, name).tolist(), (name, one.text)
        assert of.dtype == np.int32


def grown(tokenizer: Tokenizer, start: str, pieces: Sequence[str]) -> None:
    (context,) = contexts(tokenizer, [start])
    for piece in pieces:
        context = extended(tokenizer, context, piece)
        assert_equal(context, contexts(tokenizer, [context.text])[0])
    whole = tokenizer.backend.encode(context.text, add_special_tokens=False).ids
    assert context.tokens.ids.tolist() == [*tokenizer.front, *whole]


def random_pieces(text: str, rng: np.random.Generator, count: int) -> list[str]:
    """Pieces of a real text, and what is strange."""
    pieces = []
    for _ in range(count):
        begin = int(rng.integers(len(text)))
        strange = PIECES[rng.integers(len(PIECES))]
        pieces.append(strange if rng.random() < 0.6 else text[begin : begin + int(rng.integers(1, 40))])
    return pieces


@pytest.mark.parametrize("name", KINDS)
def test_a_context_grows_as_the_whole_is_tokenized(kind: Callable[[str], Tokenizer], name: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(6):
        grown(kind(name), str(rng.choice(["", "You see two machines. "])), random_pieces("Caf\u00e9 two  x", rng, 25))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_real_context_grows_as_the_whole_is_tokenized(
    real: RealTokenizers, study_rows: StudyRows, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rng = np.random.default_rng(4)
    for study in STUDIES:
        text = study_rows(study, 2)[1].text
        grown(real(name), text[:500], random_pieces(text, rng, 30))
    batches = batches_of(monkeypatch)
    long = contexts(real(name), [text])[0]
    extended(real(name), long, " You win 10 points.\n")
    assert max(map(len, batches[-1])) < 200, "a window serves"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda backend: backend.add_tokens([AddedToken("c d e f g", normalized=False)]), id="added token"),
        pytest.param(lambda backend: backend.add_tokens([AddedToken("h", lstrip=True)]), id="that takes white space"),
        pytest.param(lambda backend: setattr(backend, "normalizer", normalizers.Strip()), id="stripped"),
        pytest.param(
            lambda backend: setattr(backend, "normalizer", normalizers.Replace(Regex("^ "), "_")), id="changed in front"
        ),
    ],
)
def test_where_no_window_serves_the_whole_text_does(change: Callable[[object], None], tmp_path: Path) -> None:
    backend = build_tiny()
    change(backend)
    tokenizer = load(backend, tmp_path)
    rng = np.random.default_rng(5)
    for _ in range(20):
        grown(tokenizer, "a b c", [str(rng.choice([" ", " d", " e", " f", " g", "h", "   "])) for _ in range(20)])


def test_an_added_token_of_many_words_is_seen_whole(tmp_path: Path) -> None:
    backend = build_tiny()
    backend.add_tokens([AddedToken("c d e f g", normalized=False)])
    tokenizer = load(backend, tmp_path)
    grown(tokenizer, "u v w x y a b c", [" d", " e", " f", " g", " h"])
    check(tokenizer, "u v w x y a b c d e f", (" g", " h"), "")


@pytest.mark.parametrize("name", ["byte level", "byte level, words of Llama 3", "Metaspace always", "WordLevel"])
def test_a_context_grows_by_a_character_at_a_time(kind: Callable[[str], Tokenizer], name: str) -> None:
    """An added token takes the place of more tokens than it has behind it."""
    text = f" >11x {END}{END}, now <|end of all. Caf\u0065\u0301 {END}"
    for front in ((), kind(name).front):
        grown(replace(kind(name), front=front), "", text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_real_context_grows_by_a_character_at_a_time(real: RealTokenizers, name: str) -> None:
    added = [of.content for of in real(name).backend.get_added_tokens_decoder().values()][-3:]
    grown(real(name), "", "".join(f"You win 100 points{token}\n >11x {token}1" for token in added))


def test_what_is_put_behind_a_text_is_not_behind_a_context(tmp_path: Path) -> None:
    tokenizer = replace(load(build_tiny(bos=True), tmp_path), back=(7,))
    assert contexts(tokenizer, ["a"])[0].tokens.ids.tolist() == [
        *tokenizer.front,
        *tokenizer.backend.encode("a").ids[1:],
    ]
    grown(tokenizer, "", ["a b c", " d e", "f"])
    check(tokenizer, "a b c d e f", ("g", "h"), "")


def check(tokenizer: Tokenizer, text: str, options: tuple[str, ...], closing: str) -> None:
    context = contexts(tokenizer, [text])[0]
    check_branches(
        tokenizer, context, options, closing, option_branches(tokenizer, [context], [options], [closing], "joint")[0]
    )


def check_branches(
    tokenizer: Tokenizer, context: Context, options: tuple[str, ...], closing: str, placed: Placed
) -> None:
    """Against the tokens of context, option and closing as one string."""
    base, branches = placed
    a, front, at = len(context.text), list(tokenizer.front), 0
    for i, option in enumerate(options):
        encoding = tokenizer.backend.encode(context.text + option + closing, add_special_tokens=False)
        whole, offsets = front + encoding.ids, [(0, 0)] * len(front) + encoding.offsets
        stop = bisect_left(offsets, a + len(option), key=lambda of: of[0])
        own = [j for j in range(len(front), stop) if offsets[j][1] > a]
        if branches.closing_mark:
            stop = max(stop, bisect_left(offsets, a + len(option) + len(closing), key=lambda of: of[0]))
        parent, length = branches.parents[i], branches.lengths[i]
        tokens = branches.token_ids[at : at + length]
        at += length
        if not own:
            assert branches.blank is not None
            continue
        assert context.tokens.ids.tolist()[: base + parent] + tokens == whole[:stop]
        assert base + parent + branches.scored[i] == own[0]
        moved = [(start - branches.option_char, end - branches.option_char) for start, end in branches.chars[i]]
        assert moved == [(offsets[j][0] - a, offsets[j][1] - a) for j in own]
    assert at == len(branches.token_ids)


@pytest.mark.parametrize("closing", ["", ">>", "\n\nYou"])
@pytest.mark.parametrize("name", KINDS)
def test_joint_branches(kind: Callable[[str], Tokenizer], name: str, closing: str) -> None:
    texts = [
        "",
        " ",
        "a",
        "You see two machines. You press <<",
        "two  spaces  ",
        "now <|end",
        f"x{END}",
        "Cafe",
        "1 2 3",
    ]
    texts += ["now a long enough text before it <|", "e " * 30]
    tokenizer = kind(name)
    every = contexts(tokenizer, texts)
    placed = option_branches(tokenizer, every, [OPTIONS] * len(texts), [closing] * len(texts), "joint")
    for context, of in zip(every, placed, strict=True):
        check_branches(tokenizer, context, OPTIONS, closing, of)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_joint_branches_of_real_transcripts(
    real: RealTokenizers, study_rows: StudyRows, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rng = np.random.default_rng(6)
    texts = [study_rows(study, 1)[0].text[: int(rng.integers(1000, 1500))] for study in STUDIES]
    every = contexts(real(name), texts)
    batches = batches_of(monkeypatch)
    placed = option_branches(real(name), every, [OPTIONS] * len(texts), [">>"] * len(texts), "joint")
    assert len(batches) <= 2 and max(map(len, batches[0])) < 200, "a window serves"
    for context, of in zip(every, placed, strict=True):
        check_branches(real(name), context, OPTIONS, ">>", of)


def test_split_branches(tiny_bos: Tokenizer) -> None:
    every = contexts(tiny_bos, ["x <", "y"])
    (base, first), (_, second) = option_branches(tiny_bos, every, [("<-", "-"), ("1", "12")], ["", ">>\n"], "split")
    assert base == len(every[0].tokens.ids) == 3
    assert words(tiny_bos, first.token_ids) == ["<", "-", "-"] and first.lengths == [2, 1]
    assert words(tiny_bos, second.token_ids) == ["1", ">>\n", "1", "2", ">>\n"] and second.closing_mark


def test_split_is_refused_by_name(tmp_path: Path) -> None:
    backend = build_tiny()
    backend.normalizer = normalizers.Strip()
    tokenizer = load(backend, tmp_path)
    with pytest.raises(ValueError, match=r'boundary: "split" cannot be had with this tokenizer.*use boundary="joint"'):
        option_branches(tokenizer, contexts(tokenizer, ["a"]), [("b",)], [""], "split")


@pytest.mark.parametrize(
    ("text", "closing"),
    [("", ""), ("x <<", ">>"), ("x <<a>> y", ""), ("x <<a>> y <<b", ">>"), (">>", ""), ("a >> <<", ">>")],
)
def test_an_option_inside_a_response_is_closed(text: str, closing: str) -> None:
    assert closing_behind(text) == closing
