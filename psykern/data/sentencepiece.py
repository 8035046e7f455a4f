"""A tokenizer that comes as SentencePiece's own file, without ``tokenizer.json``: whether transformers reads it aright.

The rule: what transformers makes of such a file must cut a text as SentencePiece does. Version 5 goes by the class that
the model's kind calls for: it passes over what the file says of a text's beginning, and takes one kind for another.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import tokenizers

from psykern.core.errors import CheckpointError

_PROBE = "You press <<J>>. You win 10 points."  # nothing in it is changed by the usual normalizers

Pieces = Mapping[Path, list[str]]  # what each file makes of the probe


def pieces_in(folder: Path) -> Pieces:
    """By every SentencePiece file of ``folder``. Raises CheckpointError where one is there and cannot be read."""
    paths = [path for path in sorted(folder.glob("*.model")) if not _is_tiktoken(path)]
    if not paths:
        return {}
    if importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{paths[0]}: a SentencePiece file without a tokenizer.json is read with the packages sentencepiece and "
            "protobuf: pip install sentencepiece protobuf, or give a tokenizer.json"
        )
    from sentencepiece import SentencePieceProcessor

    try:
        return {path: SentencePieceProcessor(model_file=str(path)).encode(_PROBE, out_type=str) for path in paths}
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{paths[0].parent}: a .model file is none of SentencePiece: {error}") from error


def check_pieces(pieces: Pieces, made: tokenizers.Tokenizer) -> None:
    """Raises CheckpointError where ``made``, of one of these files, cuts the probe otherwise."""
    got = made.encode(_PROBE, add_special_tokens=False).tokens
    for path, expected in pieces.items():
        if got != expected:
            first = next((i for i, (one, two) in enumerate(zip(got, expected, strict=False)) if one != two), 0)
            raise CheckpointError(
                f"{path}: transformers makes another tokenizer of it: {_PROBE!r} has {got[first : first + 3]} where "
                f"SentencePiece has {expected[first : first + 3]}; give a tokenizer.json, as save_pretrained of the "
                "tokenizer's own class writes it"
            )


def _is_tiktoken(path: Path) -> bool:
    """Lines of a token in base 64 and its rank: the other kind of ``tokenizer.model``."""
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* [0-9]+\s*", file.readline(1000)) is not None
