"""What files call the tensors of a model: the names of ``transformers``, which wrappers and bare decoders change.

The rule: a file's names are the model's own behind what a wrapper put in front, by one table of prefixes for a family.
All tensors of a checkpoint are named in one way; one tensor under two names is an error. Those of parts that a text
does not pass through, as the vision tower, are known by name and never mapped; any other name is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

# Of torch.compile, of DataParallel, and of PEFT where its model was merged but not unwrapped, in any order.
_WRAPPERS = re.compile(r"(?:_orig_mod\.|module\.|base_model\.model\.)*")


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Naming:
    """How the files of a family may name their tensors, behind a wrapper's prefix."""

    prefixes: Mapping[str, str]  # of a stored name: the model's own in its place; the first that gives one counts
    others: tuple[str, ...] = ()  # patterns of tensors of other parts


DECODER = Naming(
    {
        "model.": "model.",
        "lm_head.": "lm_head.",
        "": "model.",  # saved from the decoder without its head
    }
)
_WITH_VISION: Mapping[str, str] = {
    "model.language_model.": "model.",  # Qwen3-VL as published, others as transformers has them since 4.52
    "model.": "model.",  # Qwen2.5-VL as published, and as transformers 5 saves it; a language model saved with its head
    "language_model.model.": "model.",  # Llama 3.2 Vision as published (transformers' convert_mllama_weights_to_hf.py)
    "language_model.lm_head.": "lm_head.",  # the same; both are vLLM's own names too (``hf_to_vllm_mapper``)
    "language_model.": "model.",  # saved without the head (``conversion_mapping.py`` of transformers 5: MllamaModel)
    "lm_head.": "lm_head.",
    "": "model.",  # saved from the language model alone, without the head
}
# Multi-token prediction as Qwen names it since Qwen3-Next; transformers ignores ``^mtp.*`` on loading.
QWEN_VL = Naming(_WITH_VISION, ("visual.*", "model.visual.*", "mtp.*"))
MLLAMA = Naming(
    _WITH_VISION,
    ("vision_model.*", "model.vision_model.*", "multi_modal_projector.*", "model.multi_modal_projector.*"),
)


@dataclass(frozen=True, slots=True)
class Names:
    """The names that a model knows, and how files may spell them. By default none, so that each name is its own."""

    expected: Collection[str] = ()
    optional: Collection[str] = ()  # names or patterns of tensors that may be absent, or present and unused
    naming: Naming = field(default_factory=lambda: Naming({}))
    twins: Mapping[str, str] = field(default_factory=dict)  # another name of a tensor, under which alone it may stand
    parts: Collection[str] = ()  # of quantised weights: what stands in place of their last word, "weight"

    def wanted(self, stored: Iterable[str]) -> set[str]:
        """The ``stored`` names without those of other parts."""
        return {name for name in stored if not matches(name.removeprefix(_wrapper(name)), self.naming.others)}

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
        for begin, own_begin in self.naming.prefixes.items():
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
