"""Tokens that begin a word against what the tokenizer decodes them to."""

from __future__ import annotations

import pytest
from support.studies import TOKENIZERS, RealTokenizers
from support.tokenizer_kinds import KINDS, save

from psykern.data.tokenizer import Tokenizer
from psykern.data.word_starts import word_starts

REFUSED = {"WordLevel", "WordPiece, lower case"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = Tokenizer.load(save(KINDS[kind].build()[0], tmp_path_factory.mktemp("kind")))
    if kind in REFUSED:
        with pytest.raises(ValueError, match="trailing_space: this tokenizer has no tokens that begin with the space"):
            word_starts(tokenizer)
        return
    bytes_of_spaces = (*range(9, 14), *range(28, 33))
    spaces = (*(chr(256 + byte) for byte in bytes_of_spaces), *map(chr, bytes_of_spaces), "\u2581")
    backend = tokenizer.backend
    spelled = {number for token, number in backend.get_vocab().items() if token.startswith(spaces)}
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    assert set(word_starts(tokenizer)) - (spelled | special) == set()
    missing = spelled - set(word_starts(tokenizer))
    assert len(spelled) > 20 and not missing


@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_ones(real: RealTokenizers, name: str) -> None:
    tokenizer = real(name)
    starts = word_starts(tokenizer)
    assert starts == sorted(set(starts))
    own = set(starts)
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    for token in ("\u0120the", "\u0120", "\u010a", "\u0120\u0120", "\u0109", "\u010a\u010a"):
        assert vocabulary[token] in own
    for token in ("the", ".", ".\u010a", "1"):
        assert vocabulary[token] not in own
    assert {token for token, of in tokenizer.backend.get_added_tokens_decoder().items() if of.special} <= own
    assert 0.3 < len(starts) / len(vocabulary) < 0.7
