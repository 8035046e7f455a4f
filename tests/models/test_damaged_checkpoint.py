"""Model folders that are damaged or lack usable weights: each kind is refused by the name of what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_folders import EMBEDDING, INDEX, SINGLE, edit_index, safetensors_bytes

from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import Checkpoint, hash_model, read_config
from psykern.models.names import Names


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="last-byte-missing"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:100], id="cut-in-header"),
        pytest.param(lambda data: data[:5], id="cut-in-header-length"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: struct.pack("<Q", 1 << 62) + data[8:], id="header-length-too-large"),
        pytest.param(lambda data: data[:8] + b"\xff" * 64 + data[72:], id="garbage-header"),
        pytest.param(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", id="git-lfs-pointer"),
        pytest.param(lambda data: data + b"\0", id="trailing-byte"),
        pytest.param(lambda data: data.replace(b"[199,32]", b"[199,64]"), id="header-claims-too-much"),
        pytest.param(
            lambda data: safetensors_bytes({"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, b""),
            id="overflowing-shape",
        ),
        pytest.param(
            lambda data: safetensors_bytes({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 1]}}, b"\0"),
            id="unknown-dtype",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_damaged_file_is_named(
    kind: str, damage: Callable[[bytes], bytes], saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[kind], tmp_path / kind))
    file = next(path for path in sorted(folder.glob("*.safetensors")) if b"[199,32]" in path.read_bytes())
    data = file.read_bytes()
    file.write_bytes(damage(data))
    assert file.read_bytes() != data
    with pytest.raises(
        CheckpointError, match=f"{re.escape(str(file))}: damaged or not a safetensors file: .*git lfs pull"
    ):
        Checkpoint.open(folder)


def test_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        Checkpoint.open(tmp_path)


def test_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / SINGLE).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*No such file"):
        Checkpoint.open(tmp_path)


# Shards


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shards of .* are missing: {re.escape(shard.name)}"):
        Checkpoint.open(sharded)


def test_tensor_absent_from_its_shard(sharded: Path) -> None:
    edit_index(sharded, lambda places: places.update({"model.extra.weight": places[EMBEDDING]}))
    with pytest.raises(CheckpointError, match=r"absent: model\.extra\.weight; not in the index: none"):
        Checkpoint.open(sharded)


def test_tensor_not_in_the_index(sharded: Path) -> None:
    edit_index(sharded, lambda places: places.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"absent: none; not in the index: model\.norm\.weight"):
        Checkpoint.open(sharded)


def test_tensor_in_another_shard(sharded: Path) -> None:
    other = sorted(sharded.glob("*.safetensors"))[-1].name
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert index[EMBEDDING] != other
    edit_index(sharded, lambda places: places.update({EMBEDDING: other}))
    with pytest.raises(CheckpointError, match=re.escape(EMBEDDING)):
        Checkpoint.open(sharded)


UNUSED = Names(optional=["lm_head.weight", "*.rotary_emb.inv_freq"])


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
@pytest.mark.parametrize("where", ["index", "shard", "another shard"])
def test_index_and_shards_may_disagree_in_what_is_not_used(where: str, name: str, sharded: Path) -> None:
    """As in one file, where such a tensor may be there or not. Anything else is an error, see above."""
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    edit_index(sharded, lambda places: places.pop(name, None))
    for path in (first, last):
        tensors = load_file(path)
        tensors.pop(name, None)
        save_file(tensors, path)
    if where != "shard":
        edit_index(sharded, lambda places: places.update({name: first.name}))
    if where != "index":
        save_file(load_file(last) | {name: torch.ones(3)}, last)
    Checkpoint.open(sharded, UNUSED)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        Checkpoint.open(sharded)
    edit_index(sharded, lambda places: places.update({"model.extra.weight": last.name}))
    with pytest.raises(CheckpointError, match=r"absent: model\.extra\.weight; not in the index: none"):
        Checkpoint.open(sharded, UNUSED)


@pytest.mark.parametrize("change", [0, 1], ids=["equal", "different"])
@pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight"])
def test_tensor_in_two_shards(name: str, change: int, sharded: Path) -> None:
    """Which of them counts would be up to the order of the files."""
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    tensor = next(load_file(path)[name] for path in sharded.glob("*.safetensors") if name in load_file(path))
    for path in (first, last):
        save_file(load_file(path) | {name: tensor + change}, path)
    with pytest.raises(CheckpointError, match=rf"safetensors: {re.escape(name)} is in model-.*\.safetensors too"):
        Checkpoint.open(sharded, UNUSED)


def test_tensor_that_the_index_places_twice(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    key = f'"{EMBEDDING}"'
    (sharded / INDEX).write_text(text.replace(key, f'{key}: "a.safetensors", {key}', 1))
    with pytest.raises(CheckpointError, match=rf"'{EMBEDDING}' is there twice, as 'a\.safetensors' and as 'model-"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "place",
    [
        "../outside.safetensors",
        "sub/a.safetensors",
        "/etc/a.safetensors",
        "a\\b.safetensors",
        "..",
        "",
        "a.bin",
        3,
        None,
    ],
    ids=repr,
)
def test_shard_names_are_plain(place: str, sharded: Path) -> None:
    (sharded / "sub").mkdir()
    for target in (sharded.parent / "outside.safetensors", sharded / "sub" / "a.safetensors", sharded / "a.bin"):
        save_file({EMBEDDING: torch.zeros(2)}, target)
    edit_index(sharded, lambda places: places.update({EMBEDDING: place}))
    with pytest.raises(CheckpointError, match=r"expected the plain name of a \.safetensors file, got"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\0", "[" * 10**5],
    ids=lambda text: repr(text[:20]),
)
def test_broken_index(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(INDEX)):
        Checkpoint.open(sharded)


# No usable weights


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt", "a.pth", "a.ckpt"])
def test_pickled_weights_are_refused_unread(name: str, single: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (single / name).write_bytes(pickle.dumps(Trap(sprung)))
    (single / "modeling.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    (single / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}))
    Checkpoint.open(single)  # beside safetensors they do no harm
    (single / SINGLE).unlink()
    for use in (Checkpoint.open, hash_model):
        with pytest.raises(CheckpointError, match=f"loading them can run code: {re.escape(name)}; convert them"):
            use(single)
    assert read_config(single)["auto_map"] == {"AutoModelForCausalLM": "modeling.Model"}
    assert not sprung.exists()
    pickle.loads((single / name).read_bytes())
    assert sprung.exists(), "the trap must work"


def test_no_weights(single: Path) -> None:
    (single / SINGLE).rename(single / "consolidated.safetensors")
    expected = rf"no weights: looked for {SINGLE} or {INDEX}; other safetensors: consolidated\.safetensors"
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(single)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as a model folder"):
        Checkpoint.open(tmp_path / "gone")
