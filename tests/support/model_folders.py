"""Model folders on the disk, to be damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

EMBEDDING = "model.embed_tokens.weight"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def safetensors_bytes(header: dict[str, object], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
