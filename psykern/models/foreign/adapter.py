"""A LoRA adapter, merged by ``peft`` itself."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from psykern.core.errors import CheckpointError

_WEIGHTS = "adapter_model.safetensors"


def with_adapter(model: Any, folder: Path) -> Any:
    """``model`` with the adapter's weights in its own. Raises CheckpointError where peft is not there or cannot."""
    if find_spec("peft") is None:
        raise CheckpointError("adapter: with implementation 'transformers' it is merged by peft: pip install peft")
    if not (folder / _WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: expected {_WEIGHTS}; pickled weights are refused, as loading them runs code")
    try:
        return import_module("peft").PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:
        raise CheckpointError(f"{folder}: peft cannot merge it: {str(error).splitlines()[0]}") from error
