"""A model folder: its config and its safetensors weights, memory-mapped and strictly checked.

The rule: a folder is data. Only JSON and safetensors files are read; pickled weights, Python files and custom code
that a config names are never loaded. A tensor that is missing, unused, wrongly shaped or (where :mod:`.quantised` does
not see to it) quantised is an error that names it, and so is a second source of weights that differs from the one that
is read. Weights stay in the files' private mapping until they are touched; :func:`widen` copies one to another dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from psykern.core.errors import CheckpointError
from psykern.core.hub import is_hub_id, split_revision
from psykern.models.names import Names, Spelling, matches
from psykern.models.source import DTYPES, Source, are_equal, listed, refusal

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# How weights are quantised, beside a config.json that does not say it: early AutoGPTQ and AutoAWQ.
LEGACY_CONFIGS: Mapping[str, str] = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = ["*.json", "chat_template.jinja", "*.model", "merges.txt", "vocab.txt"]
_HASH_BYTES = 1 << 20  # read at a time


def at_revision(model: str | Path, revision: str | None) -> str | Path:
    """``model`` with its ``revision`` in its name: ``owner/name@REVISION``. Raises :class:`CheckpointError` for a
    folder, which has none, and for a name with another one."""
    if revision is None:
        return model
    if isinstance(model, Path) or os.path.isdir(model):
        raise CheckpointError(f"{model}: revision {revision!r}: expected none, as a folder is as it is")
    hub_id, own = split_revision(model)
    if own is not None and own != revision:
        raise CheckpointError(
            f"{model}: revision {revision!r}: expected {own!r}, as its name says, or a name without one"
        )
    if os.path.lexists(named := f"{hub_id}@{revision}"):
        raise CheckpointError(f"{model}: revision {revision!r}: {named} is here; give {named} itself or move it")
    return named


def resolve_model(model: str | Path, weights: bool = True, revision: str | None = None) -> Path:
    """The folder of ``model``: a local folder, or a hub id ``owner/name`` that is downloaded to the hub's cache.

    ``revision``: a branch, tag or commit of the hub id, which may be in its name too (``owner/name@REVISION``). A
    :class:`Path`, and whatever is a folder here, is always local. ``weights=False`` leaves the weight files out of the
    download. Raises :class:`CheckpointError`.
    """
    model = at_revision(model, revision)
    if os.path.isdir(model):
        return Path(model)
    if os.path.lexists(model):
        raise CheckpointError(f"{model}: expected a model folder, got something that is not a folder")
    if isinstance(model, Path) or not is_hub_id(model):
        raise CheckpointError(
            f"{str(model)!r}: no such model folder, and not a hub id (owner/name, owner/name@REVISION)"
        )
    return _download(model, weights)


def _download(model: str, weights: bool) -> Path:
    import huggingface_hub

    hub_id, revision = split_revision(model)
    which: dict[str, Any] = {} if revision is None else {"revision": revision}
    allowed = [*_HUB_FILES, "*.safetensors"] if weights else _HUB_FILES
    try:
        # A hub pattern's * matches "/" too; "*/*" keeps to the top folder, the only one that is read.
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=allowed, ignore_patterns=["*/*"], **which))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{model}: not a folder here, and the hub could not be reached or did not give it: {reason}; "
            "download it first and give its folder"
        ) from error


def read_config(folder: Path, name: str = "config.json") -> dict[str, object]:
    """The object in the folder's ``config.json``, as it stands there. Raises :class:`CheckpointError`."""
    return read_object(folder / name)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Of the weights, as ``config.json`` says. None: it does not say, or they are quantised."""
    config = read_config(folder)
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, dict) else {}):
        if values.get("quantization_config") is not None:
            return None
        for key in ("dtype", "torch_dtype"):  # transformers' newer and older name
            found = getattr(torch, str(values.get(key)).removeprefix("torch."), None)
            if isinstance(found, torch.dtype):
                return found
    return None


def read_object(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises :class:`CheckpointError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_as_object)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a model folder needs it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _as_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Raises ValueError for a key that is there twice with different values, of which Python would take the last."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{key!r} is there twice, as {found[key]!r:.80} and as {value!r:.80}")
        found[key] = value
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint(Source):
    """The weights of a model folder, by the model's own names. Made by :meth:`open`; tensors are views of the mapped
    files."""

    folder: Path
    _tensors: dict[str, torch.Tensor]
    _spelling: Spelling  # the files' names, for errors

    @classmethod
    def open(cls, folder: Path, names: Names | None = None) -> Checkpoint:
        """Maps ``model.safetensors``, or the shards of its index. ``names``: of the model; None: each is its own.

        Raises :class:`CheckpointError`, also for weights that are there twice and differ.
        """
        names = names or Names()
        files = {path: in_it and names.wanted(in_it) for path, in_it in _weight_files(folder).items()}
        shards = {path: _map_file(path, names) for path in files}
        _check_other_sources(folder, shards, names)
        try:
            spelling = names.read({name for stored in (*shards.values(), *files.values()) for name in stored or ()})
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        tensors: dict[str, torch.Tensor] = {}
        for path, indexed in files.items():
            shard, placed = shards[path].keys(), shards[path].keys() if indexed is None else indexed
            absent, extra = (
                sorted(name for name in own if not matches(spelling.own(name), names.optional))
                for own in (placed - shard, shard - placed)
            )
            if absent or extra:
                raise CheckpointError(
                    f"{path}: does not hold the tensors that {_INDEX} places there: "
                    f"absent: {listed(absent)}; not in the index: {listed(extra)}"
                )
            tensors.update({spelling.own(name): tensor for name, tensor in shards[path].items()})
        return cls(folder, tensors, spelling)

    @classmethod
    def of_file(cls, path: Path) -> Checkpoint:
        """Of one file that is no model's; each name is its own."""
        return cls(path.parent, _map_file(path, Names()), Names().read(()))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def stored_name(self, name: str) -> str:
        """As the files have it."""
        return self._spelling.stored(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.raw(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored, any; :meth:`tensor` gives those of :data:`DTYPES` alone."""
        return self.raw(name).dtype

    def is_mapped(self, name: str) -> bool:
        """True but for the rare tensor that does not begin where its dtype must."""
        return self.raw(name).data_ptr() % self.raw(name).element_size() == 0

    def stored_bytes(self, name: str) -> int:
        return self.raw(name).nbytes

    def stored(self, name: str) -> tuple[torch.Tensor]:
        return (self.raw(name),)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in its stored dtype, mapped and not copied: not to be written to."""
        tensor = self.raw(name)
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{self.folder}: {self.stored_name(name)} is {tensor.dtype}: {refusal(tensor.dtype)}")
        # The format does not align data; kernels may take an element's natural alignment for granted.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()

    def raw(self, name: str) -> torch.Tensor:
        """As it is stored, of any dtype: quantised weights and what belongs to them, too."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: no tensor named {self.stored_name(name)}")
        return self._tensors[name]


def check_weights(folder: Path) -> None:
    """Raises :class:`CheckpointError` where the folder has no weights in safetensors, or an adapter beside them."""
    _weight_files(folder)
    _check_no_adapter(folder)


def hash_model(folder: Path) -> str:
    """``sha256:…`` over ``config.json`` (and what says how weights are quantised beside it) and the weight files: the
    content, size and name of each."""
    beside = [folder / name for name in LEGACY_CONFIGS if (folder / name).is_file()]
    return hash_files([folder / "config.json", *beside, *_weight_files(folder)])


def hash_files(paths: Iterable[Path]) -> str:
    """``sha256:…`` over the content, size and name of each."""
    total = hashlib.sha256()
    for path in sorted(paths):
        digest = hashlib.sha256()
        size = 0
        try:
            with path.open("rb", buffering=0) as file:
                while block := file.read(_HASH_BYTES):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        total.update(f"{digest.hexdigest()} {size} {path.name}\n".encode())
    return f"sha256:{total.hexdigest()}"


def widen(tensor: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """``tensor`` in ``dtype``: itself when it has that dtype and no ``out`` is given, else a copy (in ``out``)."""
    if out is None:
        return tensor.to(dtype)
    if out.shape != tensor.shape or out.dtype != dtype:
        raise ValueError(f"out: expected {dtype} {list(tensor.shape)}, got {out.dtype} {list(out.shape)}")
    return out.copy_(tensor)


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files, each with the tensors that the index places in it (None: there is no index)."""
    try:
        present = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read as a model folder: {error}") from error
    if _SINGLE in present:
        return {folder / _SINGLE: None}
    if _INDEX in present:
        return _indexed_files(folder)
    pickled = [name for name in present if matches(name, _PICKLED)]
    if pickled:
        raise CheckpointError(
            f"{folder}: pickled weights are refused, because loading them can run code: {listed(pickled)}; "
            "convert them to safetensors"
        )
    others = [name for name in present if name.endswith(".safetensors")]
    raise CheckpointError(
        f"{folder}: no weights: looked for {_SINGLE} or {_INDEX}; other safetensors: {listed(others)}"
    )


def _indexed_files(folder: Path) -> dict[Path, set[str] | None]:
    path = folder / _INDEX
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: expected weight_map to be an object of tensor names, got {places!r:.80}")
    files: dict[Path, set[str] | None] = {}
    for file in sorted(set(map(str, places.values()))):
        if re.search(r"[/\\\0]", file) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: expected the plain name of a .safetensors file, got {file!r}")
        files[folder / file] = {name for name, place in places.items() if place == file}
    absent = [shard.name for shard in files if not shard.is_file()]
    if absent:
        raise CheckpointError(f"{folder}: shards of {_INDEX} are missing: {listed(absent)}")
    return files


def _check_other_sources(folder: Path, shards: Mapping[Path, dict[str, torch.Tensor]], names: Names) -> None:
    """Raises :class:`CheckpointError` where the folder holds other weights too, which another reader would take."""
    _check_no_adapter(folder)
    seen: dict[str, Path] = {}
    for path, tensors in shards.items():
        for name in tensors:
            if seen.setdefault(name, path) != path:
                raise CheckpointError(f"{path}: {name} is in {seen[name].name} too: expected it in one file")
    if (single := shards.get(folder / _SINGLE)) is None:
        return
    try:
        others = _indexed_files(folder).keys() - shards.keys()
    except CheckpointError:  # no index, or one without its files: nobody could read those
        return
    for path in sorted(others):
        for name, tensor in _map_file(path, names).items():
            if name not in single or not are_equal(tensor, single[name]):
                raise CheckpointError(
                    f"{folder}: {_SINGLE} and {path.name} of {_INDEX} are two sources of weights and differ in {name}: "
                    "remove one"
                )


def _check_no_adapter(folder: Path) -> None:
    if (folder / _ADAPTER).exists():
        raise CheckpointError(f"{folder}: {_ADAPTER}: an adapter beside the weights is not applied; merge or remove it")


def _map_file(path: Path, names: Names) -> dict[str, torch.Tensor]:
    """Without the tensors that ``names`` pass over."""
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        # A CPU tensor of safe_open is a view of one private (copy-on-write) mapping, so no weights are read here.
        return {name: file.get_tensor(name) for name in sorted(names.wanted(file.keys()))}
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        # Beside SafetensorError: no access, sizes that overflow, dtypes that this torch does not have.
        reason = str(error).partition("\n")[0]  # torch's goes on with frames of C++
        again = "download it again (`git lfs pull` where the folder was cloned)"
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {reason}; {again}") from error
