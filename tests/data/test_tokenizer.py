"""Tokenizers of model folders: the real ones, and definitions that would cut, pad, trim or surround."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.studies import RealTokenizers, StudyRows
from support.tiny import batches_of, build_tiny, encode, load, scored, transcript
from tokenizers import processors

from psykern.core.errors import CheckpointError
from psykern.core.settings import Settings
from psykern.data.encode import Encoder
from psykern.data.tokenizer import Tokenizer


def test_ids_equal_those_of_transformers(shared: Path, study_rows: StudyRows, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared / "tokenizers" / "qwen3" / name, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for study in ("thoma2025riskychoice", "guenther2024substitutions", "vantiel2021probabilistic_pragmatics"):
        for row in study_rows(study, 4):
            ids = theirs(row.text).input_ids
            encoded = encode(ours, row)
            assert encoded.token_ids.tolist() == ids[: len(encoded.token_ids)]
            assert [*ours.front, *ours.encode_batch([row.text])[0].ids] == ids


@pytest.mark.parametrize(
    ("name", "sha256", "size", "front"),
    [
        ("qwen3", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4", 151_669, ()),
        ("llama-3.1", "79e3e522635f3171300913bb421464a87de6222182a0570b9b2ccba2a964b2b4", 128_256, (128_000,)),
        ("olmo-dolma2", "3ca996cca8afea58b34e95c353e859333592642a5e51d695d7a6dbbaf692dfe9", 100_278, ()),
    ],
)
def test_real_tokenizers(real: RealTokenizers, name: str, sha256: str, size: int, front: tuple[int, ...]) -> None:
    tokenizer = real(name)
    assert (tokenizer.hash, tokenizer.size, tokenizer.front, tokenizer.back) == (f"sha256:{sha256}", size, front, ())


def test_offsets_include_white_space_and_nothing_is_cut(tmp_path: Path) -> None:
    definition = build_tiny()
    definition.enable_truncation(3)
    definition.enable_padding(length=50)
    tokenizer = load(definition, tmp_path)
    encoding = tokenizer.encode_batch(["x <<a b>>"])[0]
    assert encoding.offsets == [(0, 1), (1, 4), (4, 5), (5, 6), (6, 7), (7, 9)]


def test_special_tokens_on_both_sides(tmp_path: Path) -> None:
    definition = build_tiny(bos=True)
    definition.add_special_tokens(["<eos>"])
    vocab = definition.get_vocab(with_added_tokens=True)
    ids = [(token, vocab[token]) for token in ("<bos>", "<eos>")]
    definition.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    tokenizer = load(definition, tmp_path)
    assert (tokenizer.front, tokenizer.back) == ((ids[0][1],), (ids[1][1],))
    assert tokenizer.size == ids[1][1] + 1
    row = transcript("x <<a>> <<b>>", ("a", "c"))
    assert scored(tokenizer, encode(tokenizer, row)) == [["a"], ["b"]]
    # The study's tokens run to the end of the sequence where a closing mark is hidden in a larger token.
    study = encode(tokenizer, transcript("x <<a>>\n"), protocol="study")
    assert scored(tokenizer, study) == [["a", ">>\n", "<eos>"]] and study.responses == ("a>>\n",)


def test_a_folder_without_tokenizer_json_is_read_by_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    build_tiny().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.load(tmp_path)
    encoded = encode(tokenizer, transcript("x <<10>> y"))
    assert scored(tokenizer, encoded) == [["10"]]
    assert tokenizer.hash.startswith("sha256:")


@pytest.mark.parametrize(
    "content", [None, "{", '{"model": {"type": "no such model"}}'], ids=["no file", "cut", "wrong"]
)
def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_texts_are_tokenized_in_batches_of_bounded_size(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [transcript(f"x <<{i}>> y" * (3 if i == 2 else 1), ("a", "b")) for i in range(7)]
    together = Encoder(tiny, Settings()).encode(rows).transcripts
    batches = batches_of(monkeypatch)
    apart = Encoder(replace(tiny, batch_chars=20), Settings()).encode(rows).transcripts
    assert [len(batch) for batch in batches[:4]] == [2, 1, 2, 2]  # 9 characters each, but 27 of the third
    assert all(len(batch) == 1 or sum(map(len, batch)) <= 20 for batch in batches)
    for one, other in zip(together, apart, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.branch_token_ids.tolist() == other.branch_token_ids.tolist()
