"""Tiny models of transformers with the kinds of tokenizer that their checkpoints come with, and rows for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.toy import Row
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TEXT = "You choose J or F. You press <<J>>. You win 10 points, now 100.\nYou press <<F>> and say <<yes, of course>>.\n"
ROWS: list[Row] = [
    {"participant": "1", "text": TEXT, "options": [["J", "F"], ["F", "J"], ["yes, of course", "no", "yes"]]},
    {"participant": "2", "text": TEXT.replace("10 points", "7 points"), "options": [["J", "F"]] * 2 + [[]]},
    {
        "participant": "3",
        "text": "<<J>> Caf\u00e9,  two\tspaces: <<\u4f60 10>>.\n\n<<-7>>",
        "options": [["J", "F"], [], []],
    },
]
_MARK = "\u2581"
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_DECODED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _byte_level(front: str | None = None, normalizer: Any = None, spaces: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if spaces:  # Pythia's runs of spaces
        tokenizer.add_tokens([AddedToken("  ", normalized=True), AddedToken("    ", normalized=True)])
    return _behind(tokenizer, "<|endoftext|>", front)


def _sentencepiece(prefix: bool, front: str | None) -> Tokenizer:
    """The forms of Llama 2 and Mistral, and of Gemma: bytes of what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", _MARK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_MARK), replaced]) if prefix else replaced
    words = pre_tokenizers.Split(_MARK, "merged_with_next")  # while it is trained
    tokenizer.pre_tokenizer = words if prefix else pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<unk>", *_BYTES]
    _train(tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][:1]  # bytes are tokens of the vocabulary
    if prefix:
        definition["pre_tokenizer"] = None
    return _behind(Tokenizer.from_str(json.dumps(definition)), "<s>", front)


def _metaspace(model: Any, scheme: Any, front: str | None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special: dict[str, Any] = {"special_tokens": ["<unk>"], "show_progress": False}
    trainer = (
        trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **special)
        if isinstance(model, models.Unigram)
        else trainers.BpeTrainer(vocab_size=400, **special)
    )
    _train(tokenizer, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return _behind(tokenizer, "</s>", front)


def _train(tokenizer: Tokenizer, trainer: Any) -> None:
    tokenizer.train_from_iterator([TEXT, TEXT.replace("J", "F"), "a b c 0 1 2 3 4 5 6 7 8 9 -"] * 3, trainer)


def _behind(tokenizer: Tokenizer, special: str, front: str | None) -> Tokenizer:
    """With one special token more, and ``front`` in front of a text."""
    tokenizer.add_special_tokens([special])
    if front is not None:
        template = processors.TemplateProcessing(
            single=f"{front} $A", special_tokens=[(front, tokenizer.token_to_id(front))]
        )
        own = tokenizer.post_processor
        tokenizer.post_processor = template if own is None else processors.Sequence([own, template])
    return tokenizer


@dataclass(frozen=True)
class Folder:
    """A kind of checkpoint."""

    config: Mapping[str, Any]
    tokenizer: Callable[[], Tokenizer]
    tokenizer_config: Mapping[str, Any]
    files: tuple[str, ...] = ("tokenizer.json",)

    def make(self, folder: Path) -> PreTrainedModel:
        folder.mkdir(parents=True, exist_ok=True)
        made = self.tokenizer()
        if "tokenizer.json" in self.files:
            made.save(str(folder / "tokenizer.json"))
        else:
            made.model.save(str(folder))  # vocab.json and merges.txt
        (folder / "tokenizer_config.json").write_text(json.dumps(dict(self.tokenizer_config)))
        return make_foreign(folder, vocab_size=made.get_vocab_size() + 3, **self.config)


def make_foreign(folder: Path, **config: Any) -> PreTrainedModel:
    """A random model of ``config`` whose distributions are far from uniform, saved to ``folder``."""
    torch.manual_seed(0)
    made = AutoConfig.for_model(
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3, **config}
    )
    model = AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model.eval()


_GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_LLAMA_CLASS = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>", "legacy": False}
_OPT_CLASS = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}

FOLDERS: Mapping[str, Folder] = {
    "gpt2": Folder(_GPT2, _byte_level, {"tokenizer_class": "GPT2Tokenizer"}),
    "pythia": Folder(
        {"model_type": "gpt_neox", "max_position_embeddings": 256, **_DECODED},
        lambda: _byte_level(normalizer=normalizers.NFC(), spaces=True),
        {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False},
    ),
    "opt": Folder(
        {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "max_position_embeddings": 256},
        lambda: _behind(_byte_level(), "</s>", None),
        _OPT_CLASS | {"add_bos_token": True, "add_prefix_space": False},
        files=("vocab.json", "merges.txt"),
    ),
    "mistral": Folder(
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 12, "max_position_embeddings": 256}
        | _DECODED,
        lambda: _sentencepiece(prefix=True, front="<s>"),
        _LLAMA_CLASS | {"add_bos_token": True},
    ),
    "phi3": Folder(
        {"model_type": "phi3", "num_key_value_heads": 2, "max_position_embeddings": 256} | _DECODED,
        lambda: _sentencepiece(prefix=True, front=None),
        _LLAMA_CLASS | {"add_bos_token": False},
    ),
    "gemma2": Folder(
        {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
        | {"sliding_window": 16}
        | _DECODED,
        lambda: _sentencepiece(prefix=False, front="<s>"),
        {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<s>", "unk_token": "<unk>"},
    ),
    "Metaspace first": Folder(
        _GPT2, lambda: _metaspace(models.BPE(unk_token="<unk>"), "first", "</s>"), {"bos_token": "</s>"}
    ),
    "Unigram": Folder(_GPT2, lambda: _metaspace(models.Unigram(), "always", "</s>"), {"bos_token": "</s>"}),
}
