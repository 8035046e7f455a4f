"""What files call the tensors of a model: the names of ``transformers``, which wrappers and bare decoders change.

The rule: a file's names are the model's own behind what a wrapper put in front, by one table of prefixes. All tensors
of a checkpoint are named in one way; one tensor under two names is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

# What a stored name may begin with, and the model's own name there. The first that gives a name of the model counts.
PREFIXES: Mapping[str, str] = {
    "model.": "model.",
    "lm_head.": "lm_head.",
    "": "model.",  # saved from the decoder without its head
}
_WRAPPERS = re.compile(r"(?:_orig_mod\.|module\.)*")  # of torch.compile and of DataParallel, in any order


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Names:
    """The names that a model knows, and how files may spell them. By default none, so that each name is its own."""

    expected: Collection[str] = ()
    optional: Collection[str] = ()  # names or patterns of tensors that may be absent, or present and unused
    prefixes: Mapping[str, str] = field(default_factory=dict)
    twins: Mapping[str, str] = field(default_factory=dict)  # another name of a tensor, under which alone it may stand
    parts: Collection[str] = ()  # of quantised weights: what stands in place of their last word, "weight"

    def read(self, stored: Iterable[str]) -> Spelling:
        """What the ``stored`` names mean. Raises ValueError that names two tensors which are one, or are named in two
        ways."""
        known = {name: found for name in sorted(stored) if (found := self._find(name)) is not None}
        own: dict[str, str] = {}
        for name, (_, _, meant) in known.items():
            if own.setdefault(meant, name) != name:
                raise ValueError(f"{own[meant]} and {name} are one tensor, {meant}: expected it once")
        ways: dict[str, tuple[str, str]] = {}  # of each prefix of the model's own: the file's, and a name with it
        for name, (begin, own_begin, _) in known.items():
            for of, way in ((own_begin, begin), ("a wrapper's", _wrapper(name))):
                other, example = ways.setdefault(of, (way, name))
                if other != way:
                    raise ValueError(f"{example} and {name} are named in two ways: expected one for all tensors")
        for name, twin in self.twins.items():
            if name not in own and twin in own:
                own[name] = own.pop(twin)
        return Spelling({name: meant for meant, name in own.items()}, {of: way for of, (way, _) in ways.items()})

    def _find(self, name: str) -> tuple[str, str, str] | None:
        """The file's prefix, the model's own in its place, and the model's own name; None for a name it has not."""
        wrapper = _wrapper(name)
        for begin, own_begin in self.prefixes.items():
            if name.startswith(wrapper + begin):
                meant = own_begin + name.removeprefix(wrapper + begin)
                if self._knows(meant) or any(map(self._knows, self._wholes(meant))):
                    return wrapper + begin, own_begin, meant
        return None

    def _knows(self, name: str) -> bool:
        return name in self.expected or matches(name, self.optional)

    def _wholes(self, name: str) -> Iterator[str]:
        """Weights that it may be a part of."""
        return (name.removesuffix(part) + "weight" for part in self.parts if name.endswith(f".{part}"))


@dataclass(frozen=True, slots=True)
class Spelling:
    """How one checkpoint spells a model's names."""

    meaning: Mapping[str, str]  # of each stored name that the model knows: its own
    begins: Mapping[str, str]  # of each prefix of the model's own: that of the file

    def own(self, stored: str) -> str:
        """The model's name; a name that it has not stays as it is."""
        return self.meaning.get(stored, stored)

    def stored(self, own: str) -> str:
        """As the file has it, or would have it."""
        if (found := next((name for name, meant in self.meaning.items() if meant == own), None)) is not None:
            return found
        for own_begin, begin in self.begins.items():
            if own.startswith(own_begin):
                return begin + own.removeprefix(own_begin)
        return own


def _wrapper(name: str) -> str:
    found = _WRAPPERS.match(name)
    return found.group() if found else ""
