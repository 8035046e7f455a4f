"""What the files beside tokenizer.json say of a tokenizer, against transformers' own ids."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny import build_tiny, encode, transcript, words
from transformers import AutoTokenizer

from psykern.core.errors import CheckpointError
from psykern.data.chat import ChatTemplate
from psykern.data.pretrained import Pretrained
from psykern.data.tokenizer import Tokenizer

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXT = "x <|im_start|>You press <<J>>.<|im_end|> x <bos>"
FIRST = build_tiny().get_vocab_size()  # the id of the first added token


def token(content: str, **more: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **flags, "special": True, **more}


START, END = token("<|im_start|>"), token("<|im_end|>", lstrip=True)
BOTH = ["<|im_start|>", "<|im_end|>"]

# Files beside tokenizer.json; what stands under "tokenizer_config" is that file.
OUTSIDE: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {"tokenizer_config": {"added_tokens_decoder": {FIRST: START, FIRST + 1: END}}},
    "additional_special_tokens": {"tokenizer_config": {"additional_special_tokens": BOTH}},
    "extra_special_tokens": {"tokenizer_config": {"extra_special_tokens": BOTH}},
    "extra_special_tokens by name": {"tokenizer_config": {"extra_special_tokens": {"start": BOTH[0], "end": BOTH[1]}}},
    "eos_token": {"tokenizer_config": {"eos_token": "<|im_end|>"}},
    "a token of another name": {"tokenizer_config": {"turn_token": "<|im_end|>"}},
    "added_tokens.json": {"added_tokens": {"<|im_start|>": FIRST, "<|im_end|>": FIRST + 1}},
    "special_tokens_map.json": {
        "special_tokens_map": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    },
    "split_special_tokens": {"tokenizer_config": {"additional_special_tokens": BOTH, "split_special_tokens": True}},
    "split_special_tokens, the token in tokenizer.json": {
        "bos": True,
        "tokenizer_config": {"split_special_tokens": True},
    },
}


def folder_of(path: Path, *, bos: bool = False, tokenizer_config: dict[str, Any] | None = None, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    build_tiny(bos=bos).save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, **(tokenizer_config or {})}
    for name, content in {"tokenizer_config": config, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("where", OUTSIDE)
def test_added_tokens_outside_tokenizer_json(where: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, **OUTSIDE[where])
    theirs = AutoTokenizer.from_pretrained(folder)
    encoded = encode(Tokenizer.load(folder), transcript(TEXT + "<<J>>"))
    ids = theirs(TEXT + "<<J>>").input_ids
    assert encoded.token_ids.tolist() == ids[: len(encoded.token_ids)]
    assert (FIRST in ids[1:]) != where.startswith("split"), "the case is one where the file matters"
    messages = [{"role": "user", "content": "Press "}, {"role": "assistant", "content": "J"}]
    chat = encode(Tokenizer.load(folder), transcript("Press <<J>>"), ChatTemplate.load(folder), condition="chat")
    expected = theirs.apply_chat_template(messages, return_dict=False)
    assert chat.token_ids.tolist() == expected[: len(chat.token_ids)]


def test_the_hash_says_what_stands_outside(tmp_path: Path) -> None:
    plain = Pretrained.load(folder_of(tmp_path / "plain")).hash
    hashes = {where: Pretrained.load(folder_of(tmp_path / where, **files)).hash for where, files in OUTSIDE.items()}
    assert plain not in hashes.values()
    groups = [
        {"additional_special_tokens", "extra_special_tokens", "extra_special_tokens by name"},
        {"eos_token", "a token of another name"},
        *({where} for where in OUTSIDE if where.startswith(("added_tokens", "split", "special_tokens_map"))),
    ]
    assert sorted(map(sorted, groups)) == sorted(
        sorted(where for where, of in hashes.items() if of == one) for one in set(hashes.values())
    )
    other_eos = folder_of(tmp_path / "same", tokenizer_config={"model_max_length": 77, "eos_token": "a"})
    assert Pretrained.load(other_eos).hash != plain, "'a' is matched before all others now"
    assert Pretrained.load(folder_of(tmp_path / "longer", tokenizer_config={"model_max_length": 7})).hash == plain


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"added_tokens_decoder": {FIRST + 7: START}}},
            rf"tokenizer_config.json: expected '<\|im_start\|>' to have the id {FIRST + 7}, but .* gives it {FIRST}",
        ),
        (
            {"added_tokens": {"<|im_end|>": FIRST + 1}},
            rf"added_tokens.json: expected '<\|im_end\|>' to have the id {FIRST + 1}, but .* gives it {FIRST}",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {FIRST: "x"}}}, "tokenizer.json: cannot be read as a tokenizer"),
    ],
    ids=["added_tokens_decoder", "added_tokens.json", "not a token"],
)
def test_an_added_token_with_two_ids_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    """transformers numbers new tokens from the vocabulary's end on, whatever id a file gives them."""
    with pytest.raises(CheckpointError, match=message):
        Pretrained.load(folder_of(tmp_path, **files))


LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.parametrize(
    ("bos", "config", "front", "back"),
    [
        # R1's distillates: the token that the model was trained with is in the flag alone. transformers 4 puts it
        # there, and so did the study.
        (False, {**LLAMA, "add_bos_token": True, "add_eos_token": False}, ["<bos>"], []),
        (False, {**LLAMA, "add_eos_token": True}, [], ["<eos>"]),
        (True, {**LLAMA, "add_bos_token": False}, [], []),
        (True, {**LLAMA, "add_bos_token": True}, ["<bos>"], []),
        (True, {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, ["<bos>"], []),
        (False, {"add_bos_token": True}, [], []),  # there is no such token
        (False, {**LLAMA, "add_bos_token": None}, [], []),
    ],
)
def test_tokens_around_a_text_by_flags(
    bos: bool, config: dict[str, Any], front: list[str], back: list[str], tmp_path: Path
) -> None:
    of = Pretrained.load(folder_of(tmp_path, bos=bos, tokenizer_config=config))
    names = [[of.backend.id_to_token(i) for i in ids] for ids in (of.front, of.back)]
    assert names == [front, back]


@pytest.mark.parametrize(("bos", "does"), [(False, "does not put it there"), (True, "puts it there")])
def test_a_flag_against_tokenizer_json_is_refused(bos: bool, does: str, tmp_path: Path) -> None:
    config = {"bos_token": "<bos>", "add_bos_token": not bos}
    message = f"add_bos_token is {str(not bos).lower()}, but tokenizer.json {does} \\('<bos>'\\)"
    with pytest.raises(CheckpointError, match=message):
        Pretrained.load(folder_of(tmp_path, bos=bos, tokenizer_config=config))


def test_a_prefix_space_against_tokenizer_json_is_refused(tmp_path: Path) -> None:
    """For some classes transformers takes the one, for others the other."""
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    folder = folder_of(tmp_path, tokenizer_config=config)
    assert AutoTokenizer.from_pretrained(folder)("x").input_ids != build_tiny().encode("x").ids
    with pytest.raises(CheckpointError, match=r"add_prefix_space is true, but in tokenizer.json false; make the two a"):
        Pretrained.load(folder)
    Pretrained.load(folder_of(tmp_path, tokenizer_config=config | {"add_prefix_space": False}))


def test_a_tokenizer_that_draws_lots_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: its model has a dropout"):
        Pretrained.load(folder)


def test_tokenizer_json_stands_above_a_class_that_would_build_another(tmp_path: Path) -> None:
    """transformers 5 builds Qwen2Tokenizer's own splitting of digits into every folder of that model type."""
    folder = folder_of(tmp_path, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    encoded = encode(Tokenizer.load(folder), transcript("x <<10>>"))
    expected = build_tiny().encode("x <<10>>").ids
    assert encoded.token_ids.tolist() == expected[: len(encoded.token_ids)]
    assert AutoTokenizer.from_pretrained(folder)("x <<10>>").input_ids != expected


@pytest.mark.parametrize("name", ["qwen3", "llama-3.1", "olmo-dolma2"])
def test_real_folders_add_nothing(shared: Path, name: str, tmp_path: Path) -> None:
    """Their tokenizers are whole in tokenizer.json, and the hash is that of its bytes."""
    folder = shutil.copytree(shared / "tokenizers" / name, tmp_path / name)
    for path in folder.glob("tokenizer_config.json"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "chat_template": CHAT, "model_max_length": 3}))
    assert Pretrained.load(folder).hash == Pretrained.load(shared / "tokenizers" / name).hash


def sentencepiece_folder(folder: Path, kind: str, model_type: str, tokenizer_class: str) -> Path:
    """With SentencePiece's file alone; its texts begin with a space that is put there."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{"sentence_iterator": iter([TEXT, "You see machines. You press <<J>>. You win 10 points."] * 5)},
        **{"model_writer": file, "vocab_size": 320, "model_type": kind, "byte_fallback": True, "minloglevel": 2},
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False},
    )
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    config = {"tokenizer_class": tokenizer_class, "add_bos_token": True, "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def test_a_sentencepiece_file_alone(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, "bpe", "llama", "LlamaTokenizer")
    import sentencepiece

    row = transcript("You press <<J>>. Caf\u00e9,  two <<10>>\nYou win.", ("J", "10"))
    ours = Tokenizer.load(folder)
    encoded = encode(ours, row)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(row.text)
    assert encoded.token_ids.tolist() == [1, *expected][: len(encoded.token_ids)]
    assert [words(ours, encoded.token_ids[a:b]) for a, b in encoded.spans_tok] == [["J"], ["10"]]


@pytest.mark.parametrize(
    ("kind", "model_type"), [("bpe", "mistral"), ("unigram", "llama")], ids=["a text's beginning", "another kind"]
)
def test_a_sentencepiece_file_that_transformers_takes_for_another(kind: str, model_type: str, tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, kind, model_type, "LlamaTokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer.model: transformers makes another tokenizer of it: .*\u2581"):
        Tokenizer.load(folder)


def test_a_sentencepiece_file_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"tokenizer.model: a SentencePiece file .*pip install sentencepiece pro"):
        Tokenizer.load(tmp_path)
