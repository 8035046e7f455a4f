"""Which tokens begin a new word, or end the text: those that begin with white space, and the special ones.

In most vocabularies the space in front of a word is part of the word's first token, so a word's tokens alone do not say
that it ends with them. Whether it does is whether such a token comes next.
"""

from __future__ import annotations

from psykern.data.tokenizer import Tokenizer

_BEFORE = "a"  # as the library takes white space from the front of what it decodes


def word_starts(tokenizer: Tokenizer) -> list[int]:
    """Their ids, ascending. A token of parts of a character is none of them.

    Raises ValueError for a tokenizer whose tokens do not begin with the white space before a word.
    """
    backend = tokenizer.backend
    offsets = backend.encode("a b", add_special_tokens=False).offsets
    if not any(start == 1 < end for start, end in offsets):
        raise ValueError(
            "trailing_space: this tokenizer has no tokens that begin with the space in front of a word, so the "
            "correction does not apply to it"
        )
    decoder, added = backend.decoder, backend.get_added_tokens_decoder()
    starts = [number for number, token in added.items() if token.special or token.content[:1].isspace()]
    for token, number in backend.get_vocab(with_added_tokens=False).items():
        text = decoder.decode([_BEFORE, token]).removeprefix(_BEFORE) if decoder else token.replace("\u2581", " ")
        if text[:1].isspace() and number not in added:
            starts.append(number)
    return sorted(starts)
