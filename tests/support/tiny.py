"""A tokenizer whose tokens can be read off, and encodings taken apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

from psykern.core.errors import Source
from psykern.core.settings import Settings
from psykern.core.types import EncodedTranscript, Transcript
from psykern.data.chat import ChatTemplate
from psykern.data.encode import Encoder
from psykern.data.tokenizer import Tokenizer

# What Llama 3 splits words by, so that ">>\n" can be one token.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

MERGES = ("Ġ <", "Ġ< <", "> >", ">> Ċ", "Ġ<< -", "1 0", "! >>", "< <", "a b")


def transcript(
    text: str, options: tuple[tuple[str, ...], ...] | tuple[str, ...] | None = None, line: int = 1
) -> Transcript:
    """``options``: a tuple of strings is the list of every response."""
    chars = np.array([match.span(1) for match in re.finditer("<<(.*?)>>", text, re.DOTALL)], dtype=np.int64)
    each: Any = (options,) * len(chars) if options and isinstance(options[0], str) else options
    return Transcript("study", "experiment", "1", text, chars.reshape(-1, 2), each, Source("file.jsonl", line))


def build_tiny(bos: bool = False, merges: tuple[str, ...] = MERGES) -> tokenizers.Tokenizer:
    """256 bytes, then the merges in order, then maybe a token in front of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [merge.split(" ") for merge in merges]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(piece) for piece in pieces)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for a, b in pieces]))
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        tokenizer.add_special_tokens(["<bos>"])
        template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", len(vocab))])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    return tokenizer


def load(tokenizer: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def encode(
    tokenizer: Tokenizer, of: Transcript, chat: ChatTemplate | None = None, **settings: Any
) -> EncodedTranscript:
    """The one transcript as tokens; raises the error that refuses it."""
    encoded = Encoder(tokenizer, Settings(**settings), chat).encode([of])
    for error in encoded.rejects:
        raise error
    (transcript,) = encoded.transcripts
    return transcript


def words(tokenizer: Tokenizer, token_ids: Any) -> list[str]:
    """The text of each token; of the tiny tokenizer only ASCII can be read."""
    return [tokenizer.backend.decode([int(i)], skip_special_tokens=False) for i in token_ids]


def scored(tokenizer: Tokenizer, encoded: EncodedTranscript) -> list[list[str]]:
    return [words(tokenizer, encoded.token_ids[a:b]) for a, b in encoded.spans_tok]


def branches(encoded: EncodedTranscript) -> Iterator[tuple[int, int, int, list[int]]]:
    """Response, tokens before the branch, first scored token in it, its tokens."""
    for i, (begin, end) in enumerate(itertools.pairwise(encoded.branch_offsets.tolist())):
        numbers = (encoded.branch_response[i], encoded.branch_parent_tok[i], encoded.branch_scored_tok[i])
        response, parent, first = map(int, numbers)
        yield response, parent, first, encoded.branch_token_ids[begin:end].tolist()


def scored_options(tokenizer: Tokenizer, encoded: EncodedTranscript) -> list[list[str]]:
    return [words(tokenizer, ids[first:]) for _, _, first, ids in branches(encoded)]


def batches_of(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts that are tokenized together, filled while encoding."""
    batches: list[list[str]] = []
    encode_batch = Tokenizer.encode_batch

    def seen(self: Tokenizer, texts: Sequence[str], *, inside: bool = False) -> list[tokenizers.Encoding]:
        batches.append(list(texts))
        return encode_batch(self, texts, inside=inside)

    monkeypatch.setattr(Tokenizer, "encode_batch", seen)
    return batches
