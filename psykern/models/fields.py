"""Typed reading of ``config.json``: every error names the file, the key, what was expected and what was got."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psykern.core.errors import CheckpointError


def _positive(config: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"{name}: {key}: expected a positive integer, got {value!r:.80}")
    return value


def _number(config: Mapping[str, Any], key: str, name: str) -> float:
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"{name}: {key}: expected a number, got {value!r}")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str, name: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{name}: {key}: expected true or false, got {value!r}")
    return value


def _mapping(config: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any] | None:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{name}: {key}: expected an object, got {value!r}")
    return value
