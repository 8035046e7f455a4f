"""Where a model is: the folder of its base, and that of an adapter on it or none.

The rule: a folder with ``adapter_config.json`` and without weights of a base is an adapter; its base is the one that it
names, as peft takes it. Tokenizer and chat template are the adapter's where its folder holds a tokenizer, else the
base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import at_revision, resolve_model
from psykern.models.lora import CONFIG, LoraConfig

_BASE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_AND = " + "  # between the names of base and adapter


@dataclass(frozen=True, slots=True)
class Located:
    """A model's folders."""

    name: str  # what runs call it: as the user gave it, and with an adapter "BASE + ADAPTER"
    base: Path
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The folder of tokenizer and chat template."""
        own = self.adapter
        return own if own is not None and any((own / name).is_file() for name in _TOKENIZERS) else self.base


def locate(
    model: str | Path, adapter: str | Path | None = None, *, revision: str | None = None, weights: bool = True
) -> Located:
    """Of ``model`` (a folder or hub id, of ``revision``) with ``adapter`` (the same). ``weights=False`` downloads none.

    Raises ``CheckpointError`` for what is not there, and for an adapter's folder that is not a LoRA adapter's or whose
    base is not there.
    """
    model = at_revision(model, revision)
    folder = resolve_model(model, weights)
    if not _is_adapter(folder):
        return Located(str(model), folder) if adapter is None else _with_adapter(model, folder, adapter, weights)
    if adapter is not None:
        raise CheckpointError(f"{folder}: an adapter, and {adapter} on top of it: expected the base of one adapter")
    without = f"{folder}: an adapter folder without its base: base_model_name_or_path of {CONFIG}"
    config = LoraConfig.read(folder)
    if config.base is None:
        raise CheckpointError(f"{without} names none; give the base as the model, and this folder as its adapter")
    base = config.base if Path(config.base).is_dir() else at_revision(config.base, config.revision)
    try:
        base_folder = resolve_model(base, weights)
    except CheckpointError as error:
        raise CheckpointError(
            f"{without} names {str(base)!r}; give the base as the model, and this folder as its adapter: {error}"
        ) from error
    if _is_adapter(base_folder):
        raise CheckpointError(f"{without} names {base}, which is an adapter itself; merge that one first")
    return Located(f"{base}{_AND}{model}", base_folder, folder)


def _with_adapter(model: str | Path, base: Path, adapter: str | Path, weights: bool) -> Located:
    try:
        folder = resolve_model(adapter, weights)
    except CheckpointError as error:
        raise CheckpointError(f"adapter: {error}") from error
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: expected an adapter's folder, with {CONFIG}")
    LoraConfig.read(folder)
    return Located(f"{model}{_AND}{adapter}", base, folder)


def folder_names(adapters: Sequence[str | Path]) -> list[str]:
    """What the folders of runs with ``adapters`` are called: the last parts of their names. Raises ``CheckpointError``
    for none, and for two that are called the same."""
    names = [Path(a).resolve().name if Path(a).is_dir() else str(a).rstrip("/").rpartition("/")[2] for a in adapters]
    if not names or len(set(names)) < len(names):
        raise CheckpointError(
            f"adapter: expected folders of different names, got {', '.join(map(str, adapters)) or 'none'}"
        )
    return names


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not any(next(folder.glob(name), None) for name in _BASE_WEIGHTS)
