"""Every kind of tokenizer against transformers' own ids and offsets: joint, split, chat, options, both protocols."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from support.protocol_rules import check_branches, patched_by_the_rules, scored_by_the_rules
from support.tiny import branches, encode, transcript
from support.tokenizer_kinds import END, KINDS, NO_MARKS, save
from tokenizers import AddedToken, Regex, normalizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from psykern.core.errors import CheckpointError
from psykern.core.types import EncodedTranscript, Transcript
from psykern.data.chat import ChatTemplate
from psykern.data.tokenizer import Tokenizer

OPTIONS = ("1", "10", "100", "J", "-7", "yes, of course", "e\u0301", "\ufb01ne")
TEXTS = {
    "letters": "You see two machines. You press <<J>>. You win 10 points.\nYou press <<F>> and <<J>>, now 100 in all.",
    "at the start": "<<J>> is pressed. Then <<F>>.",
    "a space at the start": " You press << J>>, then <<F >>.",
    "numbers": "From 1 to 100: <<10>>, then <<-7>>,\n<<1>>\n\n<<100>>",
    "characters": "Caf\u00e9 \ufb01ne e\u0301 <<na\u00efve \U0001f642>> STRA\u00dfE \u0130s <<\u4f60\u597d>> "
    "e\u0301<<e\u0301>>\u0301 and <<\u0130>>",
    "an added token": f"You press <<J>>.{END}You press <<F>>. {END} Now <<yes{END}no>> x{END} <<J>>",
    "empty": "You press <<>> and << >> then <<J>>.",
    "two spaces": "two  spaces  <<J>>  or\ttabs\t<<F>>\t.",
}


@dataclass(frozen=True)
class Case:
    ours: Tokenizer
    theirs: Any  # transformers' tokenizer, loaded anew
    inside: Backend  # made by hand: the same, with nothing in front of a text
    chat: ChatTemplate


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def of(kind: str) -> Case:
        whole, inside = KINDS[kind].build()
        folder = save(whole, tmp_path_factory.mktemp("kind"))
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        return Case(Tokenizer.load(folder), theirs, inside, ChatTemplate.load(folder))

    return of


def overlapping(offsets: list[tuple[int, int]], row: Transcript) -> list[list[int]]:
    """PROTOCOL.md: a token that overlaps the response is the response's."""
    spans = []
    for a, b in row.responses_char.tolist():
        spans.append([i for i, (s, e) in enumerate(offsets) if s < b and e > a and e > s and a < b])
    return spans


def spans_of(encoded: EncodedTranscript) -> list[list[int]]:
    return [list(range(a, b)) for a, b in encoded.spans_tok.tolist()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_joint(case: Callable[[str], Case], kind: str, text: str) -> None:
    own, row = case(kind), transcript(TEXTS[text], OPTIONS)
    encoded = encode(own.ours, row)
    expected = own.theirs(row.text, return_offsets_mapping=True)
    ids = expected.input_ids
    assert encoded.token_ids.tolist() == ids[: len(encoded.token_ids)]
    assert spans_of(encoded) == overlapping(expected.offset_mapping, row)
    check_branches(replace(own.ours, backend=own.theirs.backend_tokenizer), row, encoded)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_study(case: Callable[[str], Case], kind: str, text: str) -> None:
    own, row = case(kind), transcript(TEXTS[text], OPTIONS)
    encoded = encode(own.ours, row, protocol="study")
    ids = own.theirs(patched_by_the_rules(row.text)).input_ids
    marks = [own.theirs(mark, add_special_tokens=False).input_ids for mark in (" <<", ">>")]
    assert encoded.token_ids.tolist() == ids[: len(encoded.token_ids)]
    assert encoded.spans_tok.tolist() == scored_by_the_rules(ids, *marks)


def piece_by_piece(own: Case, row: Transcript) -> list[list[int]]:
    """Token ids of each piece. Only the first is the front of a text. Behind an added token, inside a piece too, a
    tokenizer begins anew, as it does in a text."""
    bounds = [0, *row.responses_char.ravel().tolist(), len(row.text)]
    pieces = [row.text[a:b] for a, b in pairwise(bounds)]
    ids = [own.theirs(pieces[0]).input_ids]
    anew = own.theirs.encode(f"{END}J", add_special_tokens=False)[1:]
    begins_anew = anew != own.inside.encode(f"{END}J", add_special_tokens=False).ids[1:]
    for piece in pieces[1:]:
        head, mark, tail = piece.partition(END)
        if not begins_anew:
            ids.append(own.inside.encode(piece, add_special_tokens=False).ids)
        else:
            front = own.inside.encode(head, add_special_tokens=False).ids if head else []
            ids.append(front + own.theirs.encode(mark + tail, add_special_tokens=False))
    return ids


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_split(case: Callable[[str], Case], kind: str, text: str) -> None:
    own, row = case(kind), transcript(TEXTS[text], OPTIONS)
    encoded = encode(own.ours, row, boundary="split")
    ids = piece_by_piece(own, row)
    ends = [sum(map(len, ids[: i + 1])) for i in range(len(ids))]
    assert encoded.token_ids.tolist() == [*chain(*ids)][: len(encoded.token_ids)]
    assert encoded.spans_tok.tolist() == [[ends[i - 1], ends[i]] for i in range(1, len(ids), 2)]
    for r, parent, first, tokens in branches(encoded):
        assert (parent, first) == (ends[2 * r], 0)
        option = OPTIONS[[b for b in branches(encoded) if b[0] == r].index((r, parent, first, tokens))]
        expected = own.inside.encode(option, add_special_tokens=False).ids
        assert tokens[: len(expected)] == expected
        assert len(tokens) == len(expected) or "closing_mark" in (encoded.flags[r] or "")


@pytest.mark.parametrize("kind", [kind for kind, of in KINDS.items() if of.keeps_text])
def test_split_puts_no_character_between_pieces(case: Callable[[str], Case], kind: str) -> None:
    own, row = case(kind), transcript(f"{TEXTS['letters']} {TEXTS['numbers']}<<J>>")
    encoded = encode(own.ours, row, boundary="split")
    decoded = own.theirs.decode(encoded.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decoded.lstrip() == row.text[: int(row.responses_char[-1, 1])].lstrip()


@pytest.mark.parametrize("protocol", ["exact", "study"])
@pytest.mark.parametrize("kind", KINDS)
def test_chat(case: Callable[[str], Case], kind: str, protocol: str) -> None:
    """Contents stand in the rendered text as they are, so that their places are found by counting."""
    own, row = case(kind), transcript(TEXTS["letters"], OPTIONS)
    parts = re.split("<<|>>", row.text + ("." if protocol == "study" else ""))
    turns = [("user" if i % 2 == 0 else "assistant", part) for i, part in enumerate(parts)]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = own.theirs.apply_chat_template(messages, tokenize=False)
    expected = own.theirs(rendered, return_offsets_mapping=True, add_special_tokens=protocol == "study")
    encoded = encode(own.ours, row, own.chat, condition="chat", protocol=protocol)
    ids = expected.input_ids
    assert encoded.token_ids.tolist() == ids[: len(encoded.token_ids)]
    if protocol == "exact":
        places, place = [], 0
        for role, content in turns:
            place = rendered.index(f"{role}: {content}", place) + len(f"{role}: ")
            places.append((place, place + len(content)))
        expected_spans = [
            [i for i, (s, e) in enumerate(expected.offset_mapping) if s < b and e > a and e > s]
            for a, b in places[1::2]
        ]
        assert spans_of(encoded) == expected_spans


def test_a_tokenizer_without_tokens_for_the_marks_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(NO_MARKS.build()[0], tmp_path))
    with pytest.raises(CheckpointError, match="the tokenizer has no token for the marks ' <<' and '>>'"):
        encode(tokenizer, transcript(TEXTS["letters"], OPTIONS))


def strips(backend: Backend) -> None:
    backend.normalizer = normalizers.Strip()


def marks_the_front(backend: Backend) -> None:
    backend.normalizer = normalizers.Replace(Regex("^ "), "_")


@pytest.mark.parametrize("change", [strips, marks_the_front])
def test_split_is_refused_where_pieces_would_change(change: Callable[[Backend], None], tmp_path: Path) -> None:
    """Of these tokenizers nobody can turn off what they do to a piece's ends."""
    whole, _ = KINDS["byte level"].build()
    change(whole)
    tokenizer = Tokenizer.load(save(whole, tmp_path))
    encode(tokenizer, transcript(TEXTS["letters"], OPTIONS))
    with pytest.raises(CheckpointError, match=r"boundary split: .*; use boundary joint"):
        encode(tokenizer, transcript(TEXTS["letters"], OPTIONS), boundary="split")


def test_added_tokens_that_are_single_words(tmp_path: Path) -> None:
    """Where one is found the tokenizer puts a space again; where its characters are part of a word it does not, though
    the vocabulary may have the same token for them."""
    whole, _ = KINDS["byte level, add_prefix_space"].build()
    whole.add_tokens([AddedToken("<<", single_word=True), AddedToken("10", single_word=True)])
    folder = save(whole, tmp_path)
    ours, theirs = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder).backend_tokenizer
    row = transcript("You press <<J>>. You press <<.>> and <<a10>>, then <<10>>.", ("J", ".", " 10", "a10", "10."))
    check_branches(replace(ours, backend=theirs), row, encode(ours, row))
    with pytest.raises(CheckpointError, match="boundary split"):
        encode(ours, row, boundary="split")


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram", "WordPiece, lower case", "Metaspace first", "byte level"])
@pytest.mark.parametrize("boundary", ["joint", "split"])
def test_what_the_vocabulary_lacks_is_flagged(case: Callable[[str], Case], kind: str, boundary: str) -> None:
    """The score is the unknown token's, whatever the person said."""
    own, lacks = case(kind), kind != "byte level"
    row = transcript("You press <<J>>, <<\u0416>>, <<F>>.", ((), (), ("F", "\u0416")))
    encoded = encode(own.ours, row, boundary=boundary)
    unknown = own.theirs.convert_tokens_to_ids("<unk>")
    assert (unknown in encoded.token_ids[slice(*encoded.spans_tok[1])]) == lacks
    assert [flag is not None and "unknown" in flag for flag in encoded.flags] == [False, lacks, lacks]


def test_a_tokenizer_that_the_library_breaks_down_on_is_named(tmp_path: Path) -> None:
    """Its panic is no Exception. Here an added token becomes empty under the normalizer."""
    whole, _ = KINDS["byte level"].build()
    strips(whole)
    whole.add_tokens([AddedToken("  ", normalized=True)])
    tokenizer = Tokenizer.load(save(whole, tmp_path))
    with pytest.raises(CheckpointError, match=r"tokenizers library breaks down on one of 1 texts, .*normalizer"):
        encode(tokenizer, transcript("\u0301a <<\u00e9>>"))
