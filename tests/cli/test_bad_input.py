"""Models and data that are missing, damaged or odd: what is said, and what is left on the disk."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import CONFIGS, make_model
from support.command import assert_error, manifest, psykern_command, rejects, score
from support.toy import CONTEXT, Toy, fitting, make_toy, responses, write_rows
from tokenizers import Tokenizer, processors

import psykern

# Models


def test_a_missing_model_is_named_and_the_folder_can_be_used_again(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no" / "such" / "model"
    assert_error(capsys, score(missing, toy.data, tmp_path / "run"), missing, "no such model folder")
    assert score(toy.model, toy.data, tmp_path / "run") == 0


def test_a_hub_model_that_cannot_be_had(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert_error(
        capsys, score("owner/name", toy.data, tmp_path / "run"), "owner/name", "no route to host", "download it"
    )
    for command in (["owner/name@v1"], ["owner/name", "--revision", "v1"]):
        assert psykern_command("plan", *command, toy.data) == 1
        assert "owner/name@v1: not a folder here" in capsys.readouterr().err
    refused = score("owner/name@v2", toy.data, tmp_path / "run", "--revision", "v1")
    assert_error(capsys, refused, "owner/name@v2: revision 'v1'", "'v2'")
    assert_error(
        capsys, score(toy.model, "owner/data", tmp_path / "run"), "owner/data", "no route to host", "download it"
    )


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def bos_beyond_embedding(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|late|>"])
    special = [("<|late|>", tokenizer.token_to_id("<|late|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|late|> $A", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    make_model(folder, **(CONFIGS["qwen3"] | {"vocab_size": 300}))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no-config": (remove("config.json"), ["config.json: no such file"]),
    "config-not-json": (put("config.json", "{"), ["config.json: cannot be read as JSON"]),
    "unknown-family": (
        put("config.json", '{"model_type": "gpt2"}'),
        ["model_type: expected one of llama", "got 'gpt2'"],
    ),
    "no-weights": (remove("model.safetensors"), ["no weights: looked for model.safetensors"]),
    "truncated-weights": (truncate, ["model.safetensors: damaged"]),
    "missing-tensor": (drop_tensor, ["missing tensors: model.layers.1.mlp.up_proj.weight"]),
    "pickled-weights": (pickle_weights, ["pickled weights are refused", "pytorch_model.bin"]),
    "no-tokenizer": (remove("tokenizer.json"), ["no tokenizer.json"]),
    "tokenizer-not-json": (put("tokenizer.json", "[1,"), ["tokenizer.json: cannot be read as a tokenizer"]),
    "tokenizer-of-another-model": (bos_beyond_embedding, ["puts token 391 around every text", "has 300 rows"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_named(
    name: str, toy: Toy, broken_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, parts = DAMAGE[name]
    damage(broken_model)
    status = score(broken_model, toy.data, tmp_path / "run", "--quiet")
    assert_error(capsys, status, broken_model, *parts)
    assert not list((tmp_path / "run").glob("**/*.parquet"))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("layer", [0, 2])
def test_weights_that_are_not_finite_stop_the_run_and_name_the_layer(
    value: str, layer: int, toy: Toy, broken_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(broken_model / "model.safetensors")
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    tensors[name][3, 5] = float(value)
    save_file(tensors, broken_model / "model.safetensors")
    assert_error(capsys, score(broken_model, toy.data, tmp_path / "run"), f"began in layer {layer} ", name)
    assert not list((tmp_path / "run").glob("**/*.parquet"))


# Data


def not_gzip(path: Path) -> Path:
    path = path / "rows.jsonl.gz"
    path.write_text("not packed\n")
    return path


def lfs_pointer(path: Path) -> Path:
    path = path / "rows.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    return path


def empty_folder(path: Path) -> Path:
    (path / "folder").mkdir()
    return path / "folder"


def other_kind(path: Path) -> Path:
    (path / "rows.csv").write_text("text\n<<a>>\n")
    return path / "rows.csv"


def not_allowed(path: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    write_rows(path / "rows.jsonl", [{"text": "<<a>>"}]).chmod(0)
    return path / "rows.jsonl"


NO_DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path / "rows.jsonl", "no such file or folder"),
    "lfs-pointer": (lfs_pointer, "Git LFS pointer"),
    "empty-folder": (empty_folder, "expected files that end in .jsonl.gz"),
    "other-kind": (other_kind, "expected a name that ends in .jsonl.gz"),
    "not-allowed": (not_allowed, "Permission denied"),
}


@pytest.mark.parametrize("name", NO_DATA)
def test_data_that_cannot_be_read_at_all_is_named(
    name: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = NO_DATA[name]
    path = make(tmp_path)
    assert_error(capsys, score(toy.model, [toy.data, path], tmp_path / "run"), path, reason)


BAD_LINES = {
    b'{"text": "<<a>>"': "not JSON",
    b"[1]": "row: expected an object, got a list",
    b'{"participant": 1}': "text: missing",
    b'{"text": 7}': "text: expected a string, got a number",
    b'{"text": "a \xff <<b>>"}': "not UTF-8: byte 0xff",
    b'{"text": "<<a <<b>> c>>"}': "text: '<<' at character 4 inside the response",
    b'{"text": "a <<b"}': "text: '<<' at character 2 is never closed",
    b'{"text": "a>> <<b>>"}': "text: '>>' at character 1 without '<<'",
    b'{"text": "a <<b>>", "options": "J"}': "options: expected a list, got a string",
    b'{"text": "a <<b>>", "options": ["b", ""]}': "options: option 2 is empty",
    b'{"text": "a <<b>>", "options": [["b"], ["c"]]}': "options: expected one list for each of 1 responses",
}


def test_bad_rows_are_rejected_and_the_others_scored(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps(row).encode() for row in toy.rows]
    lines = [*good[:4], *BAD_LINES, *good[4:]]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    assert score(toy.model, tmp_path / "rows.jsonl", tmp_path / "run", "--quiet") == 3
    assert capsys.readouterr().err == f"psykern: 11 rows were rejected: {tmp_path / 'run' / 'rejects.jsonl'}\n"
    found = rejects(tmp_path / "run")
    assert [(r["file"], r["line"]) for r in found] == [(str(tmp_path / "rows.jsonl"), n) for n in range(5, 16)]
    for reject, reason in zip(found, BAD_LINES.values(), strict=True):
        assert reject["reason"].startswith(reason)
    assert manifest(tmp_path / "run")["counts"]["rejects"] == 11
    assert score(toy.model, toy.data, tmp_path / "good") == 0
    assert psykern.read_run(tmp_path / "run").equals(psykern.read_run(tmp_path / "good"))


def test_a_truncated_archive_gives_the_rows_before_its_end(toy: Toy, tmp_path: Path) -> None:
    rows = [toy.rows[0] | {"participant": i, "note": np.random.default_rng(i).bytes(50_000).hex()} for i in range(5)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert score(toy.model, tmp_path / "rows.jsonl.gz", tmp_path / "run") == 3
    (reject,) = rejects(tmp_path / "run")
    assert "file is damaged or truncated after line" in reject["reason"]
    participants = set(psykern.read_run(tmp_path / "run").column("participant").to_pylist())
    assert participants == {str(i) for i in range(reject["line"] - 1)} != set()


def test_what_is_no_archive_is_rejected(toy: Toy, tmp_path: Path) -> None:
    assert score(toy.model, [not_gzip(tmp_path), toy.data], tmp_path / "run") == 3
    assert [reject["file"] for reject in rejects(tmp_path / "run")] == [str(tmp_path / "rows.jsonl.gz")]
    assert manifest(tmp_path / "run")["counts"]["transcripts"] == len(toy.rows)


@pytest.mark.parametrize("protocol", ["exact", "study"])
def test_an_option_that_encodes_to_nothing_rejects_its_row(
    protocol: str, toy: Toy, broken_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """exact: a tokenizer whose normalizer drops the option; study: its rules drop white space before `>>`."""
    tokenizer = json.loads((broken_model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    (broken_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    blank = {"exact": "\u200b", "study": "  "}[protocol]
    bad = toy.rows[1] | {"text": "You press <<J>>\nYou press <<F>>\n", "options": ["J", blank]}
    data = write_rows(tmp_path / "rows.jsonl", [toy.rows[0], bad, *toy.rows[2:]])
    assert score(broken_model, data, tmp_path / "run", "--protocol", protocol) == 3
    (reject,) = rejects(tmp_path / "run")
    assert (reject["file"], reject["line"]) == (str(data), 2)
    assert reject["reason"] == f'option 2 ("{blank}") of response 1 encodes to no token'
    assert manifest(tmp_path / "run")["counts"]["transcripts"] == len(toy.rows) - 1
    capsys.readouterr()
    status = score(broken_model, data, tmp_path / "strict", "--protocol", protocol, "--strict")
    assert_error(capsys, status, f"{data}:2: option 2", "encodes to no token")


def test_strict_stops_at_the_first_bad_row(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [toy.rows[0], {"text": "<<a"}, {"text": "b>>"}])
    status = score(toy.model, data, tmp_path / "run", "--strict")
    assert_error(capsys, status, f"{data}:2: text: '<<' at character 0 is never closed")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_rows_that_are_odd_but_not_wrong(toy: Toy, tmp_path: Path) -> None:
    """Bare NaN, numbers as strings, repeated participants, no response, an empty and a blank one."""
    lines = [
        '{"text": "x <<a>>", "RTs": [NaN], "age": NaN, "participant": "7", "options": NaN}',
        '{"text": "x <<a>>", "participant": 7.0}',
        '{"text": "nothing was said"}',
        '{"text": ""}',
        '{"text": "x <<>> y << >>"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert score(toy.model, tmp_path / "rows.jsonl", tmp_path / "run") == 0
    records = psykern.read_run(tmp_path / "run").to_pylist()
    fifth = f"{hashlib.sha256((tmp_path / 'rows.jsonl').read_bytes()).hexdigest()[:8]}:5"
    assert [(r["participant"], r["response"]) for r in records] == [("7", "a"), ("7", "a"), (fifth, ""), (fifth, " ")]
    assert [r["logprob"] is None for r in records] == [False, False, True, False]
    assert records[0]["logprob"] == records[1]["logprob"]
    assert records[2]["flag"] == "empty"
    assert manifest(tmp_path / "run")["counts"]["transcripts"] == 5


@pytest.mark.parametrize(
    ("content", "status"),
    [("", 0), ('{"text": "no response here"}\n', 0), ('{"text": 1}\n', 3)],
    ids=["empty", "none", "bad"],
)
def test_data_without_any_response_gives_an_empty_run(
    content: str, status: int, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    assert score(toy.model, tmp_path / "rows.jsonl", tmp_path / "run") == status
    assert "0 responses of" in capsys.readouterr().out
    assert len(psykern.read_run(tmp_path / "run")) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["mean_nll"] is None
    assert manifest(tmp_path / "run")["counts"]["responses"] == 0
    assert psykern_command("plan", toy.model, tmp_path / "rows.jsonl", "--device", "cpu") == status


def test_a_study_that_is_not_in_the_data_is_named(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = score(toy.model, toy.data, tmp_path / "run", "--studies", "words", "wrods")
    assert_error(capsys, status, "studies: no transcript of wrods in the data")
    status = psykern_command("plan", toy.model, toy.data, "--device", "cpu", "--studies", "wrods")
    assert_error(capsys, status, "studies: no transcript of wrods in the data")


@pytest.fixture(scope="module")
def short_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short-context")
    make_toy(folder, max_position_embeddings=CONTEXT)
    return folder


def test_transcripts_longer_than_the_context(
    toy: Toy, short_context: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--options", "none", "--quiet"]
    long = [i for i, row in enumerate(toy.rows) if fitting(toy, row) < len(list(responses(row["text"])))]
    assert 0 < len(long) < len(toy.rows)
    status = score(short_context, toy.data, tmp_path / "error", *options)
    row = toy.rows[long[0]]
    where = f"{toy.data}:{long[0] + 1}: {row['study']}, participant {row['participant']}: needs"
    assert_error(capsys, status, where, f"the model has {CONTEXT}", '"skip"', '"truncate"')

    assert score(short_context, toy.data, tmp_path / "skip", *options, "--over-length", "skip") == 0
    line = f"longer than the model's context: {len(long)} transcripts skipped, 0 responses dropped"
    assert line in capsys.readouterr().out.splitlines()

    assert score(short_context, toy.data, tmp_path / "truncate", *options, "--over-length", "truncate") == 0
    dropped = sum(len(list(responses(toy.rows[i]["text"]))) - fitting(toy, toy.rows[i]) for i in long)
    line = f"longer than the model's context: 0 transcripts skipped, {dropped} responses dropped"
    assert line in capsys.readouterr().out.splitlines()
