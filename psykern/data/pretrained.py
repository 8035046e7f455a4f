"""The tokenizer of a model folder as ``transformers`` reads it, for token ids and for the chat template alike.

``tokenizer.json`` is taken as it stands: the classes of ``transformers`` 5 that build a tokenizer anew from its
vocabulary can cut a text otherwise. To it comes what the folder's other files add: tokens (``added_tokens_decoder``,
``extra_special_tokens``, ``special_tokens_map.json``, …), ``split_special_tokens``, and tokens around a text
(``add_bos_token``, ``add_eos_token``). Nothing of the folder is executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from psykern.core.errors import CheckpointError
from psykern.data.sentencepiece import check_pieces, pieces_in

# Whose flags transformers 4 obeyed, with tokenizer.json too; version 5 passes over them, and R1's distillates
# (tokenizer_class LlamaTokenizerFast) lose the token that they were trained with in front of a text.
_OBEYS_FLAGS = ("LlamaTokenizer", "LlamaTokenizerFast")


@dataclass(frozen=True, slots=True, eq=False)
class Pretrained:
    """What a model folder says of its tokenizer. Filled by :meth:`load`."""

    tokenizer: Any  # transformers' own
    backend: tokenizers.Tokenizer  # of the same
    front: tuple[int, ...]  # special tokens that it puts before a text by default
    back: tuple[int, ...]  # and behind
    hash: str  # "sha256:…" of tokenizer.json, and of what the other files add where they add something

    @classmethod
    def load(cls, folder: Path) -> Pretrained:
        """Reads ``tokenizer.json`` and what stands beside it, or what ``transformers`` can turn into a tokenizer.

        Raises CheckpointError where there is none, where it cannot be used, and where files contradict each other.
        """
        path, origin = folder / "tokenizer.json", str(folder / "tokenizer.json")
        if path.is_file():
            tokenizer, definition = _read(path), path.read_bytes()
        else:
            tokenizer, origin = _converted(folder), f"{folder}: no tokenizer.json, and what transformers makes instead"
            definition = str(tokenizer.backend_tokenizer.to_str()).encode()
        backend = tokenizer.backend_tokenizer
        if getattr(backend.model, "dropout", None):
            raise CheckpointError(f"{origin}: its model has a dropout, so that equal texts get other tokens")
        own = _around(backend, origin)
        config = _object(folder / "tokenizer_config.json")
        around = _with_flags(own, tokenizer, config, folder) if path.is_file() else own
        _check_ids(backend, config, folder)
        if path.is_file():
            _check_front(backend, config, folder)
        outside = _outside(backend, definition) | ({"around": around} if around != own else {})
        return cls(tokenizer, backend, *around, _hash(definition, outside))


def _hash(definition: bytes, outside: Mapping[str, Any]) -> str:
    """Of the definition alone where nothing stands outside it."""
    more = json.dumps(outside, sort_keys=True).encode() if outside else b""
    return f"sha256:{hashlib.sha256(definition + more).hexdigest()}"


def _outside(backend: tokenizers.Tokenizer, definition: bytes) -> dict[str, Any]:
    """What ``backend`` has beside its ``definition``."""
    outside: dict[str, Any] = {}
    now = _as_set(_added(backend))
    if now != _as_set(json.loads(definition).get("added_tokens") or []):
        outside["added_tokens"] = sorted(now)
    if backend.encode_special_tokens:
        outside["split_special_tokens"] = True
    return outside


def _read(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast  # here, because the import takes long

    try:
        return PreTrainedTokenizerFast.from_pretrained(path.parent, local_files_only=True)
    except Exception as error:  # whatever a broken folder makes it raise; the library raises bare Exception too
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error


def _converted(folder: Path) -> Any:
    """A tokenizer that comes in another form than ``tokenizer.json``."""
    looked_for = f"{folder}: no tokenizer.json, and no other tokenizer that transformers can read"
    pieces = pieces_in(folder)
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a broken folder makes it raise
        raise CheckpointError(f"{looked_for}: {error}") from error
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise CheckpointError(
            f"{looked_for}: {type(loaded).__name__} has no definition in the form of the tokenizers library"
        )
    check_pieces(pieces, loaded.backend_tokenizer)
    return loaded


_Around = tuple[tuple[int, ...], tuple[int, ...]]  # special tokens before a text and behind it


def _around(backend: tokenizers.Tokenizer, origin: str) -> _Around:
    sample = backend.encode("a", add_special_tokens=True)
    own = [i for i, special in enumerate(sample.special_tokens_mask) if not special]
    if not own:
        raise CheckpointError(f"{origin}: the tokenizer has no token for the text 'a'")
    return tuple(sample.ids[: own[0]]), tuple(sample.ids[own[-1] + 1 :])


def _with_flags(own: _Around, tokenizer: Any, config: Mapping[str, Any], folder: Path) -> _Around:
    """The special tokens around a text, by ``add_bos_token`` and ``add_eos_token`` where those stand there."""
    front, back = own
    if _flag_differs("bos", front, tokenizer, config, folder):
        front = (tokenizer.bos_token_id, *front) if config["add_bos_token"] else ()
    if _flag_differs("eos", back, tokenizer, config, folder):
        back = (*back, tokenizer.eos_token_id) if config["add_eos_token"] else ()
    return front, back


def _flag_differs(name: str, ids: tuple[int, ...], tokenizer: Any, config: Mapping[str, Any], folder: Path) -> bool:
    """Whether ``add_bos_token`` (or eos) says something else than what tokenizer.json does.

    Raises CheckpointError for a class of which nobody can say which of the two holds.
    """
    flag, token = config.get(f"add_{name}_token"), getattr(tokenizer, f"{name}_token_id")
    if not isinstance(flag, bool) or token is None or flag == (token in ids):
        return False
    if config.get("tokenizer_class") not in _OBEYS_FLAGS:
        does = "puts it there" if token in ids else "does not put it there"
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: add_{name}_token is {str(flag).lower()}, but tokenizer.json {does} "
            f"({getattr(tokenizer, f'{name}_token')!r}); make the two agree"
        )
    return True


def _check_ids(backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError where a file gives an added token another id than it gets."""
    decoder: Mapping[str, Any] = config.get("added_tokens_decoder") or {}
    declared = [("tokenizer_config.json", int(number), token["content"]) for number, token in decoder.items()]
    other = "added_tokens.json"
    declared += [(other, number, content) for content, number in _object(folder / other).items()]
    for source, number, content in declared:
        got = backend.token_to_id(content)
        if got is not None and got != number:
            raise CheckpointError(
                f"{folder / source}: expected {content!r} to have the id {number}, but the tokenizer gives it {got}"
            )


def _check_front(backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError where ``add_prefix_space`` says something else than tokenizer.json does: which of the two
    holds depends on the class, and on the version of transformers."""
    flag, part = config.get("add_prefix_space"), backend.pre_tokenizer
    own = set() if part is None else set(re.findall(r'"add_prefix_space": ?(true|false)', part.__getstate__().decode()))
    if isinstance(flag, bool) and own and str(flag).lower() not in own:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: add_prefix_space is {str(flag).lower()}, but in tokenizer.json "
            f"{'/'.join(own)}; make the two agree"
        )


def _object(path: Path) -> dict[str, Any]:
    """An optional file's JSON object. One that cannot be read has already been refused by transformers."""
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


_PROPERTIES = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def _added(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    return [
        {"id": number, **{name: getattr(token, name) for name in _PROPERTIES}}
        for number, token in backend.get_added_tokens_decoder().items()
    ]


def _as_set(added: Iterable[Mapping[str, Any]]) -> set[str]:
    """Added tokens, comparable whatever their order."""
    return {json.dumps({name: token.get(name) for name in ("id", *_PROPERTIES)}) for token in added}
