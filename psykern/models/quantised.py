"""A checkpoint's quantised weights as floats: a source around the mapped files.

A weight has the model's own name; what it is stored as, its parts, has none. It is computed when it is asked for and
not kept, so that a layer at a time is in floats. Which weights are quantised is what has parts; the config's lists of
modules that are not need no reading, as those are floats.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import Checkpoint
from psykern.models.quantisation.scheme import Dtypes, Parts, Scheme
from psykern.models.source import DTYPES, Source, listed

_STACKED = re.compile(r"\.experts\.(?:gate_up_proj|down_proj)[._]")  # a part of all experts' weights in one tensor


class Dequantised(Source):
    """See the module. Raises :class:`CheckpointError` where no weight is quantised in the scheme's way."""

    def __init__(self, scheme: Scheme, checkpoint: Checkpoint) -> None:
        self.folder = checkpoint.folder
        self._scheme = scheme
        self._checkpoint = checkpoint
        self._parts = _group(scheme, checkpoint)
        parts = {name for names in self._parts.values() for name in names.values()}
        self._names = frozenset(checkpoint.names - parts | self._parts.keys())
        self._twice = sorted(self._parts.keys() & (checkpoint.names - parts))  # in floats, too

    @property
    def names(self) -> frozenset[str]:
        return self._names

    @property
    def num_quantised(self) -> int:
        """Weights that are stored as parts."""
        return len(self._parts)

    @property
    def changes(self) -> tuple[str, ...]:
        label = self._scheme.label(self._read(next(iter(self._parts))))
        return (f"{label}; {len(self._parts)} tensors dequantised",)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return self._checkpoint.shape(name)
        return self._scheme.shape(self._read(name))

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._parts else self._checkpoint.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """What is quantised in float32, made anew each time."""
        if name not in self._parts:
            return self._checkpoint.tensor(name)
        return self._scheme.weight(self._read(name))

    def is_mapped(self, name: str) -> bool:
        return name not in self._parts and self._checkpoint.is_mapped(name)

    def stored_name(self, name: str) -> str:
        return self._checkpoint.stored_name(name)

    def stored_bytes(self, name: str) -> int:
        """Of all parts."""
        return sum(self._checkpoint.stored_bytes(part) for part in self._parts.get(name, {"": name}).values())

    def stored(self, name: str) -> Sequence[Tensor]:
        """All parts."""
        if name not in self._parts:
            return self._checkpoint.stored(name)
        return [self._checkpoint.raw(part) for part in self._parts[name].values()]

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Collection[str] = ()) -> None:
        """As all sources, and of what the weights are stored as first: all parts there, in dtype and shape."""
        problems = [
            f"{self.stored_name(name)}: {problem}"
            for name in sorted(self._parts.keys() & expected.keys())
            for problem in self._problems(name, expected[name])
        ]
        stacked = [self.stored_name(name) for name in sorted(self._names) if _STACKED.search(name)]
        if stacked:
            problems.append(f"experts that are quantised as one tensor are not supported: {listed(stacked)}")
        if problems:
            raise CheckpointError(f"{self.folder}: quantised weights: {listed(problems)}")
        super().check(expected, [*optional, *self._zero_biases(expected)])

    def _problems(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        if name in self._twice:
            yield "stored in floats and quantised: expected it once"
        parts = self._read(name)
        needed = self._scheme.needed(parts)
        absent = [suffix for suffix in needed if suffix not in parts]
        if absent:
            yield f"missing {', '.join(absent)}, has {', '.join(parts)}"
            return
        wrong = list(_wrong_dtypes(parts, {**self._scheme.optional(), **needed}))
        yield from wrong
        if len(shape) != 2:
            yield f"expected a plain tensor {list(shape)}, got a quantised one"
        elif not wrong:
            yield from self._scheme.problems(parts, (shape[0], shape[1]))

    def _zero_biases(self, expected: Collection[str]) -> list[str]:
        """Biases that the model has not: early AutoGPTQ saved zeros for each quantised weight."""
        biases = (name.removesuffix("weight") + "bias" for name in self._parts)
        return [n for n in biases if n in self._names and n not in expected and not self._checkpoint.raw(n).any()]

    def _read(self, name: str) -> Parts:
        """The parts of a weight, mapped, by suffix."""
        found = {suffix: self._checkpoint.raw(part) for suffix, part in self._parts[name].items()}
        # The format does not align data, and a part may be viewed as another dtype.
        return {suffix: part.clone() if part.data_ptr() % 8 else part for suffix, part in found.items()}


def _wrong_dtypes(parts: Parts, dtypes: Dtypes) -> Iterator[str]:
    """Of each part that may not be there, or not in its dtype."""
    for suffix, part in parts.items():
        if suffix not in dtypes:
            yield f"{suffix}: expected none beside {', '.join(dtypes)}"
        elif part.dtype not in dtypes[suffix]:
            yield f"{suffix}: expected {' or '.join(map(str, dtypes[suffix]))}, got {part.dtype}"


def _group(scheme: Scheme, checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """The parts of each quantised weight by suffix, all by the model's own names."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in sorted(checkpoint.names):
        for suffix in scheme.suffixes:
            if name.endswith(f".{suffix}"):
                found[name.removesuffix(suffix) + "weight"][suffix] = name
    is_plain = {name: parts.keys() == {"weight"} and checkpoint.dtype(name) in DTYPES for name, parts in found.items()}
    return {name: parts for name, parts in found.items() if not is_plain[name]}
