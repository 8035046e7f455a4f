"""Every kind of tokenizer that the tokenizers library knows, tiny, each beside the same one made by hand to put nothing
in front of a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END = "<|end|>"  # an added token that stands in texts, too
BOS = "<bos>"
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
CORPUS = [
    "You see two machines, J and F. You press <<J>>. You win 10 points, now 100 in all.",
    "How likely is it, from 1 to 100? You say <<10>>, then <<-7>>, then <<yes, of course>>.\n",
    "Caf\u00e9 na\u00efve \ufb01ne STRA\u00dfE \u0130s \u4f60\u597d \U0001f642 \u201cno\u201d e\u0301\n\n two  spaces",
    "assistant: J user: You win. assistant: F user: You lose. a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1",
] * 3
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


Change = Callable[[Tokenizer, bool], None]  # makes a tokenizer of a kind; False: that of a text's inside


def _bpe() -> Any:
    return models.BPE(unk_token="<unk>")


@dataclass(frozen=True)
class Kind:
    change: Change
    model: Callable[[], Any] = _bpe
    keeps_text: bool = False  # decoding its tokens gives the text again
    without: str = ""  # characters that it has no token for

    def build(self) -> tuple[Tokenizer, Tokenizer]:
        """The tokenizer of a text, and that of a text's inside, with one vocabulary."""
        tokenizer = Tokenizer(self.model())
        self.change(tokenizer, True)
        definition = _trained(tokenizer, [text.translate(dict.fromkeys(map(ord, self.without))) for text in CORPUS])
        inside = Tokenizer.from_str(definition)
        self.change(inside, False)
        return _finished(Tokenizer.from_str(definition)), _finished(inside)


def _trained(tokenizer: Tokenizer, corpus: list[str], size: int = 700) -> str:
    """The definition with a vocabulary from ``corpus``."""
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in str(tokenizer.pre_tokenizer) else []
    model = type(tokenizer.model).__name__
    by_byte = [f"<0x{i:02X}>" for i in range(256)] if getattr(tokenizer.model, "byte_fallback", False) else []
    trainer: Any = {
        "BPE": lambda: trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<unk>", *by_byte], initial_alphabet=alphabet, show_progress=False
        ),
        "Unigram": lambda: trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        ),
        "WordLevel": lambda: trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False),
        "WordPiece": lambda: trainers.WordPieceTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False),
    }[model]()
    tokenizer.train_from_iterator(corpus, trainer)
    definition = json.loads(tokenizer.to_str())
    added = [token for token in definition["added_tokens"] if token["content"] not in by_byte]
    return json.dumps(definition | {"added_tokens": added})


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    """With an added token, and one in front of every text."""
    tokenizer.add_special_tokens([AddedToken(BOS, normalized=False), AddedToken(END, normalized=False)])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return tokenizer


def _byte_level(use_words: bool = True, prefix: bool = False, normalizer: Any = None) -> Change:
    def change(tokenizer: Tokenizer, in_front: bool) -> None:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix and in_front, use_regex=not use_words)
        split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if use_words else byte_level
        tokenizer.decoder = decoders.ByteLevel()
        if normalizer is not None:
            tokenizer.normalizer = normalizer

    return change


def _metaspace(scheme: Any, split: bool = True) -> Change:
    def change(tokenizer: Tokenizer, in_front: bool) -> None:
        own = scheme if in_front else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=own, split=split)

    return change


def _prepend(tokenizer: Tokenizer, in_front: bool) -> None:
    """As Llama 2's tokenizer.json: normalizers instead of a pre-tokenizer."""
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace] if in_front else [replace])


def _gemma(tokenizer: Tokenizer, in_front: bool) -> None:
    """As Gemma's tokenizer.json: a space is a letter, and nothing is put in front."""
    del in_front
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")


def _plain(pre_tokenizer: Any, normalizer: Any = None) -> Change:
    def change(tokenizer: Tokenizer, in_front: bool) -> None:
        del in_front
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            tokenizer.normalizer = normalizer

    return change


_BYTES = partial(models.BPE, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # of what it has no token for
_WORD_LEVEL = partial(models.WordLevel, unk_token="<unk>")
_WORD_PIECE = partial(models.WordPiece, unk_token="<unk>")

NO_MARKS = Kind(_plain(None), models.BPE, without="<>")

KINDS: Mapping[str, Kind] = {
    "byte level": Kind(_byte_level(use_words=False), keeps_text=True),
    "byte level, words of Llama 3": Kind(_byte_level(), keeps_text=True),
    "byte level, add_prefix_space": Kind(_byte_level(use_words=False, prefix=True), keeps_text=True),
    "byte level, NFC": Kind(_byte_level(normalizer=normalizers.NFC())),
    "byte level, NFKC": Kind(_byte_level(normalizer=normalizers.NFKC())),
    "byte level, NFD": Kind(_byte_level(normalizer=normalizers.NFD())),
    "byte level, lower case": Kind(_byte_level(normalizer=normalizers.Lowercase())),
    "byte level, nothing else": Kind(_plain(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))),
    "Metaspace first": Kind(_metaspace("first")),
    "Metaspace always": Kind(_metaspace("always")),
    "Metaspace never": Kind(_metaspace("never")),
    "Metaspace always, not split": Kind(_metaspace("always", split=False)),
    "Prepend": Kind(_prepend),
    "Llama 2": Kind(_prepend, _BYTES, without="\u00e9\U0001f642\u4f60"),
    "Gemma": Kind(_gemma, _BYTES, without="\u00e9\U0001f642\u4f60"),
    "Unigram": Kind(_metaspace("always"), models.Unigram),
    "Unigram first": Kind(_metaspace("first"), models.Unigram),
    "Unigram, NFKC": Kind(_plain(pre_tokenizers.Metaspace(prepend_scheme="never"), normalizers.NFKC()), models.Unigram),
    "WordLevel": Kind(_plain(pre_tokenizers.Whitespace()), _WORD_LEVEL),
    "WordPiece, lower case": Kind(_plain(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()), _WORD_PIECE),
    "no pre-tokenizer": Kind(_plain(None)),
}


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """A model folder's tokenizer with a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, "bos_token": BOS, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
