"""Model folders: what is read, that weights stay mapped, and what of a config or of weights is refused."""

from __future__ import annotations

import re
import shutil
import struct
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.model_folders import EMBEDDING, INDEX, SINGLE, edit_index, safetensors_bytes

from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import Checkpoint, at_revision, hash_model, read_config, resolve_model, widen


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_are_those_saved(kind: str, saved: dict[str, Path], model: transformers.PreTrainedModel) -> None:
    checkpoint = Checkpoint.open(saved[kind])
    state = model.state_dict()
    assert checkpoint.names == state.keys()
    for name, tensor in state.items():
        assert checkpoint.dtype(name) == torch.bfloat16
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.stored_bytes(name) == tensor.nbytes
        assert torch.equal(checkpoint.tensor(name), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.arange(6).to(dtype)}, tmp_path / SINGLE)
    assert Checkpoint.open(tmp_path).tensor("a").dtype == dtype


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_tensors_stay_in_the_mapped_files(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    mapped = [
        tuple(int(address, 16) for address in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if f"{sharded}/" in line
    ]
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        first = tensor.data_ptr()
        assert any(begin <= first and first + tensor.nbytes <= end for begin, end in mapped), name


def test_writing_to_a_tensor_leaves_the_file_alone(single: Path) -> None:
    before = hash_model(single)
    Checkpoint.open(single).tensor(EMBEDDING).zero_()
    assert hash_model(single) == before


def test_misaligned_tensor_is_given_aligned(tmp_path: Path) -> None:
    header = {
        "pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [9, 13]},
    }
    (tmp_path / SINGLE).write_bytes(safetensors_bytes(header, b"\0" + struct.pack("<3f", 1.5, -2, 7)))
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.get_tensor("a").data_ptr() % 4, "the case must be misaligned"
    tensor = Checkpoint.open(tmp_path).tensor("a")
    assert tensor.tolist() == [1.5, -2]
    assert tensor.data_ptr() % 4 == 0


def test_links_into_a_hub_cache_are_followed(saved: dict[str, Path], tmp_path: Path) -> None:
    for number, file in enumerate(sorted(saved["sharded"].iterdir())):
        (tmp_path / file.name).symlink_to(shutil.copy(file, tmp_path / f"blob{number}"))
    assert Checkpoint.open(tmp_path).names == Checkpoint.open(saved["sharded"]).names
    assert hash_model(tmp_path) == hash_model(saved["sharded"])


def test_one_file_goes_before_an_index(single: Path) -> None:
    (single / INDEX).write_text("{")
    assert EMBEDDING in Checkpoint.open(single).names


def test_one_file_goes_before_shards_that_are_not_all_there(single: Path, sharded: Path) -> None:
    """What is left of an earlier checkpoint, and cannot be loaded."""
    first, *_ = (shutil.copy(path, single) for path in sorted(sharded.glob("*.safetensors*"), reverse=True))
    Path(first).unlink()
    (single / sorted(sharded.glob("*.safetensors"))[0].name).unlink()
    assert EMBEDDING in Checkpoint.open(single).names


def test_one_file_beside_shards_that_say_the_same(single: Path, sharded: Path) -> None:
    names = Checkpoint.open(single).names
    for path in sharded.glob("*.safetensors*"):
        shutil.copy(path, single)
    assert Checkpoint.open(single).names == names
    edit_index(single, lambda places: places.update(dict.fromkeys(places, SINGLE)))  # an index of the one file
    assert Checkpoint.open(single).names == names


@pytest.mark.parametrize("change", ["number", "shape", "name"])
def test_one_file_beside_shards_that_differ(change: str, single: Path, sharded: Path) -> None:
    """transformers takes the one file; a reader that goes by the index the shards."""
    for path in sharded.glob("*.safetensors*"):
        shutil.copy(path, single)
    tensors = load_file(single / SINGLE)
    norm = tensors.pop("model.norm.weight")
    if change != "name":
        tensors["model.norm.weight"] = norm[:-1].clone() if change == "shape" else norm + 2**-7
    save_file(tensors, single / SINGLE)
    differ = (
        r"model\.safetensors and model-.*\.safetensors of .*index\.json .* differ in model\.norm\.weight: remove one"
    )
    with pytest.raises(CheckpointError, match=differ):
        Checkpoint.open(single)


def test_an_adapter_beside_the_weights(single: Path) -> None:
    """transformers would apply it."""
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: an adapter beside the weights is not applied"):
        Checkpoint.open(single)


def test_unknown_name(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor named model\.norm\.bias"):
        Checkpoint.open(single).tensor("model.norm.bias")


# Strictness


def test_check_accepts_exactly_the_model(saved: dict[str, Path], shapes: dict[str, tuple[int, ...]]) -> None:
    for folder in saved.values():
        Checkpoint.open(folder).check(shapes)


def test_check_names_missing_unused_and_misshaped(single: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    shapes["model.layers.0.self_attn.q_norm.weight"] = (8,)
    del shapes["lm_head.weight"]
    shapes[EMBEDDING] = (200, 32)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(single).check(shapes)
    assert str(caught.value) == (
        f"{single}: weights do not fit the config: missing tensors: model.layers.0.self_attn.q_norm.weight; "
        "unused tensors: lm_head.weight; "
        "wrongly shaped tensors: model.embed_tokens.weight (expected [200, 32], got [199, 32])"
    )


def test_check_names_up_to_eight(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"and 22 more$") as caught:
        Checkpoint.open(single).check({})
    assert str(caught.value).count(".weight") == 8


def test_check_compares_rank(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 1)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"a \(expected \[4\], got \[4, 1\]\)"):
        Checkpoint.open(tmp_path).check({"a": (4,)})


OPTIONAL = ["lm_head.weight", "*.rotary_emb.inv_freq"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_optional_may_be_present_and_unused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2), "lm_head.weight": torch.zeros(3)}
    tensors["layers.1.rotary_emb.inv_freq"] = torch.zeros(5, dtype=dtype)
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check({"a": (2,)}, OPTIONAL)
    with pytest.raises(CheckpointError, match=r"unused tensors: layers\.1\.rotary_emb\.inv_freq"):
        checkpoint.check({"a": (2,)}, ["lm_head.weight"])


def test_optional_may_be_absent(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check({"a": (2,), "lm_head.weight": (3,)}, OPTIONAL)
    with pytest.raises(CheckpointError, match=r"missing tensors: lm_head\.weight"):
        checkpoint.check({"a": (2,), "lm_head.weight": (3,)})


def test_optional_that_is_used_is_checked(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(3)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \(expected \[4\], got \[3\]\)"):
        Checkpoint.open(tmp_path).check({"lm_head.weight": (4,)}, OPTIONAL)


def tied(folder: Path, head: torch.Tensor | None) -> Checkpoint:
    tensors = {EMBEDDING: torch.arange(6.0).view(3, 2), "lm_head.weight": head}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE)
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    "head", [None, torch.arange(6.0).view(3, 2), torch.arange(6).view(3, 2).bfloat16()], ids=["none", "same", "bf16"]
)
def test_a_tied_head_may_be_there_again(head: torch.Tensor | None, tmp_path: Path) -> None:
    tied(tmp_path, head).check_tied("lm_head.weight", EMBEDDING)


@pytest.mark.parametrize(
    "head",
    [
        torch.arange(6.0).view(3, 2) + torch.tensor([[0, 0], [0, 0], [0, 1e-6]]),
        torch.arange(6.0).view(2, 3),
        torch.arange(4.0).view(2, 2),
    ],
    ids=["number", "shape", "rows"],
)
def test_a_tied_head_that_differs(head: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = tied(tmp_path, head)
    with pytest.raises(
        CheckpointError, match=r"tie_word_embeddings .* lm_head\.weight differs from model\.embed_tokens"
    ):
        checkpoint.check_tied("lm_head.weight", EMBEDDING)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32, torch.float64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2).to(dtype)}, tmp_path / SINGLE)
    checkpoint = Checkpoint.open(tmp_path)
    wide = dtype == torch.float64
    kind = "float64 weights" if wide else "quantised weights without a quantization_config"
    refused = f"{kind} are not supported, expected float32, bfloat16 or float16"
    refused += r"; convert them, as model\.to\(torch\.float32\) does" * wide
    with pytest.raises(CheckpointError, match=f"config: {refused}: b is {dtype}$"):
        checkpoint.check({"a": (2,), "b": (2,)})
    assert checkpoint.dtype("b") == checkpoint.raw("b").dtype == dtype
    with pytest.raises(CheckpointError, match=f"b is {dtype}: {refused}"):
        checkpoint.tensor("b")


# Config


def test_config_is_read(single: Path) -> None:
    assert read_config(single)["model_type"] == "llama"


def test_config_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_config(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff{}", b"{} {}", b"[" * 10**5], ids=lambda data: repr(data[:8]))
def test_config_broken(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("null", "NoneType"), ('"llama"', "str")])
def test_config_is_an_object(text: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"expected a JSON object, got {kind}"):
        read_config(tmp_path)


# Hash


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_hash_follows_the_content(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[kind], tmp_path / kind))
    first = hash_model(folder)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", first)
    assert hash_model(saved[kind]) == first, "neither the folder's place nor the files' times count"
    (folder / "README.md").write_text("not part of the model")
    assert hash_model(folder) == first
    seen = {first}
    for file in [folder / "config.json", *folder.glob("*.safetensors")]:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        seen.add(hash_model(folder))
        data[-1] ^= 1
        file.write_bytes(data)
    assert len(seen) == 2 + len(list(folder.glob("*.safetensors")))
    assert hash_model(folder) == first


def test_hash_follows_the_names(sharded: Path) -> None:
    first = hash_model(sharded)
    old = sorted(sharded.glob("*.safetensors"))[-1]
    new = old.rename(sharded / "z.safetensors").name
    edit_index(
        sharded, lambda places: places.update({name: new for name, place in places.items() if place == old.name})
    )
    assert hash_model(sharded) != first


def test_hash_needs_a_config(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        hash_model(single)


# Widening


def test_widen_gives_the_tensor_itself_or_a_copy(single: Path) -> None:
    tensor = Checkpoint.open(single).tensor(EMBEDDING)
    assert widen(tensor, torch.bfloat16) is tensor
    wide = widen(tensor, torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.to(torch.bfloat16), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widen_into(dtype: torch.dtype, single: Path) -> None:
    tensor = Checkpoint.open(single).tensor(EMBEDDING)
    out = torch.full(tensor.shape, torch.nan, dtype=dtype)
    assert widen(tensor, dtype, out) is out
    assert torch.equal(out, tensor.to(dtype))


@pytest.mark.parametrize(
    "out",
    [torch.empty(2, 3), torch.empty(3, dtype=torch.bfloat16), torch.empty(1)],
    ids=["broadcast", "dtype", "shape"],
)
def test_widen_into_something_else(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"out: expected torch\.float32 \[3\], got"):
        widen(torch.zeros(3, dtype=torch.bfloat16), torch.float32, out)


# Finding the folder

REPOSITORY = [
    "chat_template.jinja",
    *("config.json", "generation_config.json", "tokenizer.json", INDEX, "tokenizer.model", "merges.txt", "vocab.txt"),
    *(SINGLE, "pytorch_model.bin", "modeling_x.py", "README.md", "original/params.json", "original/a.safetensors"),
]


@pytest.mark.parametrize("as_type", [str, Path])
def test_local_folder(as_type: type, single: Path) -> None:
    assert resolve_model(as_type(single)) == single


@pytest.mark.parametrize("model", ["", "gone", "/gone", "./a/b", "../a", "a/b/c", "a/", Path("a/b"), "a\0/b"], ids=repr)
def test_no_folder_and_no_hub_id(model: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(CheckpointError, match="no such model folder"):
        resolve_model(model)


def test_file_in_place_of_a_folder(single: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model folder"):
        resolve_model(single / SINGLE)


@pytest.mark.parametrize("weights", [True, False])
def test_hub_id_downloads_only_data(weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo_id == "Qwen/Qwen2.5-0.5B"
        fetched.extend(filter_repo_objects(REPOSITORY, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("Qwen/Qwen2.5-0.5B", weights) == tmp_path
    assert fetched == REPOSITORY[: 9 if weights else 8]


REVISIONS = {
    "in-the-name": ("owner/name@v1.0", None),
    "beside-it": ("owner/name", "v1.0"),
    "in-both": ("owner/name@v1.0", "v1.0"),
}


@pytest.mark.parametrize(("model", "revision"), REVISIONS.values(), ids=REVISIONS)
def test_a_revision_reaches_the_hub(
    model: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "owner")  # where there is no folder owner/name
    asked: list[tuple[str, str]] = []

    def download(repo_id: str, *, revision: str, **_: object) -> str:
        asked.append((repo_id, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model(model, revision=revision) == tmp_path
    assert resolve_model("owner/name@refs/pr/7") == tmp_path
    assert asked == [("owner/name", "v1.0"), ("owner/name", "refs/pr/7")]
    assert at_revision(model, revision) == "owner/name@v1.0"


def test_a_folder_is_never_split(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    folder = single.rename(single.parent / "owner@v1")
    monkeypatch.chdir(single.parent.parent)
    relative = f"{folder.parent.name}/owner@v1"
    for model in (folder, str(folder), relative):
        assert resolve_model(model) == Path(model)
        with pytest.raises(CheckpointError, match=r"owner@v1: revision 'main': expected none, as a folder is as it is"):
            resolve_model(model, revision="main")
    with pytest.raises(CheckpointError, match=rf"revision 'v1': {relative} is here; give"):
        resolve_model(relative.removesuffix("@v1"), revision="v1")
    with pytest.raises(CheckpointError, match="gone: revision 'main': expected none"):
        resolve_model(Path("gone"), revision="main")


def test_two_revisions_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(CheckpointError, match=r"owner/name@v1: revision 'v2': expected 'v1', as its name says"):
        resolve_model("owner/name@v1", revision="v2")
    for model, revision in (("owner/name@", None), ("owner@v1", None), ("owner/name", ""), ("owner/name", "a b")):
        with pytest.raises(CheckpointError, match="no such model folder, and not a hub id"):
            resolve_model(model, revision=revision)


def test_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match="owner/name: not a folder here, and the hub could not be reached"
    ) as caught:
        resolve_model("owner/name")
    assert str(caught.value).endswith("; download it first and give its folder")
    assert "\n" not in str(caught.value)
