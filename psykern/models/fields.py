"""Typed reading of ``config.json``: every error names the file, the key, what was expected and what was got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psykern.core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Fields:
    """The keys of an object of ``config.json``."""

    values: Mapping[str, Any]
    name: str  # of the file, for errors

    def or_else(self, defaults: Mapping[str, Any]) -> Fields:
        """These, and what absent keys mean. A key that is there as ``null`` is not absent."""
        return Fields({**defaults, **self.values}, self.name)

    def get(self, key: str) -> Any:
        """As it stands there; None where it is absent."""
        return self.values.get(key)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(f"{key}: expected a positive integer, got {value!r:.80}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.error(f"{key}: expected a number, got {value!r}")
        return float(value)

    def boolean(self, key: str) -> bool:
        """An absent key means false."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key}: expected true or false, got {value!r}")
        return value

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{key}: expected an object, got {value!r}")
        return value

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {problem}")
