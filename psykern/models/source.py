"""Where a model's tensors come from, by the model's own names.

A checkpoint's mapped files are a source. What changes weights on their way is a source around another one: stacked
experts taken apart, quantised weights in floats, an adapter merged. Layers and slots know nothing of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from psykern.core.errors import CheckpointError
from psykern.models.names import matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_EXPECTED = "expected float32, bfloat16 or float16"
_QUANTISED = f"quantised weights without a quantization_config are not supported, {_EXPECTED}"
_WIDE = f"float64 weights are not supported, {_EXPECTED}; convert them, as model.to(torch.float32) does"
_COMPARED = 1 << 22  # numbers of two tensors at a time
_MAX_NAMED = 8  # problems spelled out in one message


class Source(ABC):
    """See the module. Threads may read one at the same time."""

    folder: Path  # of the model, for errors

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Of all tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Of what :meth:`tensor` gives."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """On the CPU, dense, not to be written to. Raises :class:`CheckpointError` for a name that is not there."""

    @abstractmethod
    def is_mapped(self, name: str) -> bool:
        """Whether the tensor is the file's own memory, which costs nothing to have; else it is made anew each time."""

    @abstractmethod
    def stored_name(self, name: str) -> str:
        """As the files have it, for errors."""

    @abstractmethod
    def stored_bytes(self, name: str) -> int:
        """Bytes that the files have of it."""

    def stored(self, name: str) -> Sequence[Tensor]:
        """The mapped tensors of the files that :meth:`tensor` reads, to be read ahead; none where that is not known."""
        return ()

    @property
    def changes(self) -> tuple[str, ...]:
        """What is done to the weights on their way from the files, for a run's manifest: nothing here."""
        return ()

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Collection[str] = ()) -> None:
        """Raises :class:`CheckpointError` unless the tensors are exactly the ``expected`` ones, with their shapes.

        ``optional`` holds names or patterns (``*.rotary_emb.inv_freq``) that may be absent, or present and unused.
        """
        counted = dict.fromkeys(sorted(name for name in self.names if name in expected or not matches(name, optional)))
        dtypes = {name: self.dtype(name) for name in counted}
        refused = {name: dtype for name, dtype in dtypes.items() if dtype not in DTYPES}
        missing = [self.stored_name(n) for n in expected if n not in counted and not matches(n, optional)]
        unused = [self.stored_name(name) for name in counted if name not in expected]
        misshaped = [
            f"{self.stored_name(name)} (expected {list(shape)}, got {list(self.shape(name))})"
            for name, shape in expected.items()
            if name in counted and self.shape(name) != shape
        ]
        problems = {
            **{
                why: [
                    f"{self.stored_name(name)} is {dtype}" for name, dtype in refused.items() if refusal(dtype) == why
                ]
                for why in (_QUANTISED, _WIDE)
            },
            "missing tensors": missing,
            "unused tensors": unused,
            "wrongly shaped tensors": misshaped,
        }
        found = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
        if found:
            raise CheckpointError(f"{self.folder}: weights do not fit the config: {'; '.join(found)}")

    def check_tied(self, head: str, embedding: str) -> None:
        """Raises :class:`CheckpointError` where both are there and differ: what the config ties is two weights then,
        and transformers scores with the head's own."""
        if head in self.names and not are_equal(self.tensor(head), self.tensor(embedding)):
            raise CheckpointError(
                f"{self.folder}: tie_word_embeddings is true, and {self.stored_name(head)} differs from "
                f"{self.stored_name(embedding)}: expected the same weights; set tie_word_embeddings to false to score "
                "with the former, as transformers does, or remove it"
            )


def are_equal(one: Tensor, two: Tensor) -> bool:
    """In shape and in every number."""
    if one.shape != two.shape:
        return False
    pairs = zip(one.reshape(-1, 1).split(_COMPARED), two.reshape(-1, 1).split(_COMPARED), strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def refusal(dtype: torch.dtype) -> str:
    """Why a dtype that is none of :data:`DTYPES` is refused."""
    return _WIDE if dtype == torch.float64 else _QUANTISED


def listed(names: Collection[str]) -> str:
    """The first few of ``names``."""
    if not names:
        return "none"
    more = len(names) - _MAX_NAMED
    return ", ".join(list(names)[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
