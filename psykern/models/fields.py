"""Typed reading of ``config.json``: every error names the file, the key, what was expected and what was got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from psykern.core.errors import CheckpointError

LAYER_TYPES = ("full_attention", "sliding_attention")  # as ``config.json`` names them
_HUGE = 1e300  # JSON allows longer integers than a float has room for, and Python's reader NaN and Infinity


@dataclass(frozen=True, slots=True)
class Fields:
    """The keys of an object of ``config.json``."""

    values: Mapping[str, Any]  # as they stand there
    name: str  # of the file, for errors
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what absent keys mean
    asked: set[str] = field(default_factory=set, compare=False)  # keys, whether they are there or not

    def or_else(self, defaults: Mapping[str, Any]) -> Fields:
        """These, and what absent keys mean where that is not said yet. A key that is there as ``null`` is not
        absent."""
        return replace(self, defaults={**defaults, **self.defaults})

    def get(self, key: str, default: Any = None) -> Any:
        """As it stands there or what its absence means; ``default`` where that is not said either."""
        self.asked.add(key)
        return self.values[key] if key in self.values else self.defaults.get(key, default)

    def agreed(self, said: Mapping[str, Any], default: Any = None) -> Any:
        """The value that all keys of ``said`` have, by their paths in the file; ``default`` where there is none.

        Raises ``CheckpointError`` for keys that say different things about one number.
        """
        if not said:
            return default
        (first, value), *others = said.items()
        for other, its in others:
            if its != value:
                said_of_both = f"{first} is {value!r:.80} and {other} is {its!r:.80}"
                raise self.error(f"{said_of_both}: expected one value, as they mean the same; correct or remove one")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(f"{key}: expected a positive integer, got {value!r:.80}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -_HUGE < value < _HUGE:
            raise self.error(f"{key}: expected a number, got {value!r:.80}")
        return float(value)

    def boolean(self, key: str) -> bool:
        """An absent key means false."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key}: expected true or false, got {value!r}")
        return value

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{key}: expected an object, got {value!r}")
        return value

    def not_asked(self) -> dict[str, Any]:
        """What stands there and nobody asked for. A key that is ``null`` says nothing."""
        return {key: value for key, value in self.values.items() if value is not None and key not in self.asked}

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {problem}")
