"""The published study's checkpoints: family, generation, size, kind of post-training, and whose base each has.

Names and pairs are those of the study's own scripts (repository ``marcelbinz/Psych-201``, ``0_analyses/plotting``,
commit c63dea1); where the maker published no base of the same size, the study's choice stands (Qwen3-VL-32B against
Qwen3-14B-Base). A kind of "base" means pretrained only. Other models are described in a YAML file:

    my-model-7b-chat:          # the hub id or folder, or its last part; with @REVISION for that one alone
      family: My model         # the panel it is drawn in
      generation: My model 2   # d is averaged over pairs of one generation
      size: 7.2                # billions of weights
      kind: instruction        # base, instruction, reasoning, vision, code, math, human, or a word of your own
      base: my-model-7b        # its name; left out for a base model
      name: My model 7B chat   # what the report calls it, and what another's base can name; by default as above
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psykern.core.errors import ComparisonError
from psykern.core.hub import split_revision

BASE = "base"


@dataclass(frozen=True, slots=True)
class StudyModel:
    """What a figure needs to know of a model."""

    name: str  # last part of its hub id, or what a YAML file calls it
    family: str
    generation: str
    size: float | None  # billions of weights; None: not known, so it is in no figure over sizes
    kind: str
    base: str | None  # name of the model it was post-trained from; None: it is a base model, or that is not known
    published: bool = False  # one of the study's own checkpoints


@dataclass(frozen=True, slots=True)
class Published:
    """A published number, to be set beside one's own."""

    group_by: str  # "kind", "generation" or "domain"
    group: str
    d: float


# Means of Cohen's d over the study's pairs, from its text and figures.
PUBLISHED = (
    Published("kind", "instruction", 0.11),
    Published("kind", "reasoning", 0.14),
    Published("kind", "vision", 0.07),
    Published("generation", "Qwen2", 0.02),
    Published("generation", "Qwen2.5", 0.04),
    Published("generation", "Qwen3", 0.13),
    Published("generation", "Qwen3.5", 0.16),
    Published("domain", "games", 0.06),
    Published("domain", "categorization", 0.07),
    Published("domain", "reinforcement learning", 0.08),
    Published("domain", "risky choice", 0.08),
    Published("domain", "memory", 0.09),
    Published("domain", "reasoning", 0.12),
    Published("domain", "psycholinguistics", 0.18),
)
# NLL (nats, the study's aggregate) that the study printed; Qwen3's are read off a figure.
PUBLISHED_NLL = {
    "Qwen2.5-72B": 1.557,
    "Qwen3-0.6B-Base": 1.92,
    "Qwen3-1.7B-Base": 1.81,
    "Qwen3-4B-Base": 1.71,
    "Qwen3-8B-Base": 1.68,
    "Qwen3-14B-Base": 1.63,
}


def _sizes(text: str) -> Iterator[tuple[str, float]]:
    for size in text.split():
        yield f"{size}B", float(size.partition("-")[0].rstrip("B"))


def _model(name: str, family: str, generation: str, size: float, kind: str, base: str | None = None) -> StudyModel:
    return StudyModel(name, family, generation, size, kind, base, published=True)


def _qwen_to_2_5() -> Iterator[StudyModel]:
    qwen = {"Qwen1.5": "0.5 1.8 4 7 14 32 72", "Qwen2": "0.5 1.5 7 72", "Qwen2.5": "0.5 1.5 3 7 14 32 72"}
    for family, sizes in qwen.items():
        suffix = "Chat" if family == "Qwen1.5" else "Instruct"
        for b, size in _sizes(sizes):
            yield _model(f"{family}-{b}", family, family, size, BASE)
            yield _model(f"{family}-{b}-{suffix}", family, family, size, "instruction", f"{family}-{b}")
    for line, kind, sizes in (("Coder", "code", "0.5 1.5 3 7 14 32"), ("Math", "math", "1.5 7 72")):
        generation = f"Qwen2.5-{line}"
        for b, size in _sizes(sizes):
            yield _model(f"{generation}-{b}", "Qwen2.5", generation, size, kind, f"Qwen2.5-{b}")
            instruct = f"{generation}-{b}-Instruct"
            yield _model(instruct, "Qwen2.5", generation, size, "instruction", f"{generation}-{b}")
    for b, size in _sizes("3 7 32 72"):
        yield _model(f"Qwen2.5-VL-{b}-Instruct", "Qwen2.5", "Qwen2.5-VL", size, "vision", f"Qwen2.5-{b}")
    for b, size in _sizes("1.5 7 14 32"):
        name = f"DeepSeek-R1-Distill-Qwen-{b}"
        yield _model(name, "Qwen2.5", "R1-Distill-Qwen", size, "reasoning", f"Qwen2.5-{b}")


def _qwen_from_3() -> Iterator[StudyModel]:
    for family, with_base, without in (("Qwen3", "0.6 1.7 4 8 14 30B-A3", "32"), ("Qwen3.5", "0.8 2 4 9", "27")):
        for b, size in _sizes(with_base):
            yield _model(f"{family}-{b}-Base", family, family, size, BASE)
            yield _model(f"{family}-{b}", family, family, size, "reasoning", f"{family}-{b}-Base")
        for b, size in _sizes(without):
            yield _model(f"{family}-{b}", family, family, size, "reasoning")
    for b, size, base in (("2B", 2, "1.7B"), ("4B", 4, "4B"), ("8B", 8, "8B"), ("32B", 32, "14B")):
        for suffix in ("Instruct", "Thinking"):
            yield _model(f"Qwen3-VL-{b}-{suffix}", "Qwen3", "Qwen3-VL", size, "vision", f"Qwen3-{base}-Base")


def _llama() -> Iterator[StudyModel]:
    for prefix, generation, sizes in (
        ("Meta-Llama-3", "Llama 3", "8 70"),
        ("Llama-3.1", "Llama 3.1", "8 70"),
        ("Llama-3.2", "Llama 3.2", "1 3"),
    ):
        for b, size in _sizes(sizes):
            yield _model(f"{prefix}-{b}", "Llama 3", generation, size, BASE)
            yield _model(f"{prefix}-{b}-Instruct", "Llama 3", generation, size, "instruction", f"{prefix}-{b}")
    for b, size in _sizes("8 70"):
        name = f"DeepSeek-R1-Distill-Llama-{b}"
        yield _model(name, "Llama 3", "R1-Distill-Llama", size, "reasoning", f"Llama-3.1-{b}")
    for b, size, base in (("11B", 11, "8B"), ("90B", 90, "70B")):
        for name in (f"Llama-3.2-{b}-Vision", f"Llama-3.2-{b}-Vision-Instruct"):
            yield _model(name, "Llama 3", "Llama 3.2 Vision", size, "vision", f"Llama-3.1-{base}")
    for name in ("Llama-3.1-Centaur-70B", "Llama-3.1-Centaur-70B-adapter"):
        yield _model(name, "Llama 3", "Centaur", 70, "human", "Llama-3.1-70B")


def _olmo() -> Iterator[StudyModel]:
    for base, size in (("Olmo-3-1025-7B", 7), ("Olmo-3-1125-32B", 32)):
        yield _model(base, "OLMo 3", "OLMo 3", size, BASE)
    for generation, b, size, suffixes in (
        ("3", "7B", 7, ("Instruct", "Think")),
        ("3", "32B", 32, ("Think",)),
        ("3.1", "32B", 32, ("Instruct", "Think")),
    ):
        for suffix in suffixes:
            kind = "instruction" if suffix == "Instruct" else "reasoning"
            base = "Olmo-3-1025-7B" if b == "7B" else "Olmo-3-1125-32B"
            yield _model(f"Olmo-{generation}-{b}-{suffix}", "OLMo 3", f"OLMo {generation}", size, kind, base)


STUDY_MODELS: dict[str, StudyModel] = {
    model.name.lower(): model for family in (_qwen_to_2_5, _qwen_from_3, _llama, _olmo) for model in family()
}

_FIELDS = ("family", "generation", "size", "kind", "base", "name")


def model_name(model_id: str) -> str:
    """The last part of a hub id or folder, with the revision: ``Qwen/Qwen3-8B@main`` → ``Qwen3-8B@main``; of a model
    with an adapter, ``Qwen/Qwen3-8B + me/tuned``, those of both: ``Qwen3-8B+tuned``."""
    base, plus, adapter = model_id.rpartition(" + ")
    if plus:
        return f"{model_name(base)}+{model_name(adapter)}"
    whole, revision = split_revision(model_id)
    name = whole.rstrip("/").rpartition("/")[2] or whole
    return name if revision is None else f"{name}@{revision}"


def find_model(model_id: str, described: dict[str, StudyModel]) -> StudyModel | None:
    """What is known of a model: as ``described`` (from :func:`read_models`), else from the study's table. Revisions of
    which nothing else is said are one model. A model with an adapter may go by the adapter's name alone, in the study's
    table only where that says that it is one: ``Llama-3.1-Centaur-70B-adapter``."""
    base, _, adapter = model_id.rpartition(" + ")
    if base:
        alone = model_name(adapter).lower()
        known = STUDY_MODELS.get(alone) if alone.endswith("-adapter") else None
        names = (model_id.lower(), model_name(model_id).lower(), adapter.lower(), alone)
        return next((described[of] for of in names if of in described), known)
    whole, _ = split_revision(model_id)
    name = model_name(whole).lower()
    name = name.removeprefix("meta-") if name.startswith("meta-llama-3.1") else name  # those checkpoints' older name
    names = (model_id.lower(), model_name(model_id).lower(), whole.lower(), name)
    return next((described[of] for of in names if of in described), None) or STUDY_MODELS.get(name)


def read_models(path: Path) -> dict[str, StudyModel]:
    """Models by lower-case name from the YAML file ``path``, as above. Raises ComparisonError, naming the entry."""
    import yaml

    try:
        entries: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ComparisonError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ComparisonError(f"{path}: expected names of models with their fields, got {type(entries).__name__}")
    return {str(name).lower(): _described(f"{path}: {name}", str(name), fields) for name, fields in entries.items()}


def _described(where: str, name: str, fields: Any) -> StudyModel:
    if not isinstance(fields, dict):
        raise ComparisonError(f"{where}: expected fields ({', '.join(_FIELDS)}), got {fields!r}")
    unknown = sorted(map(str, set(fields) - set(_FIELDS)))
    if unknown:
        raise ComparisonError(f"{where}: expected the fields {', '.join(_FIELDS)}, got {', '.join(unknown)}")
    for field in ("family", "kind"):
        if not isinstance(fields.get(field), str):
            raise ComparisonError(f"{where}: {field}: expected a text, got {fields.get(field)!r}")
    size = fields.get("size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int | float) or not size > 0):
        raise ComparisonError(f"{where}: size: expected billions of weights, got {size!r}")
    base = fields.get("base")
    return StudyModel(
        name=str(fields.get("name") or model_name(name)),
        family=fields["family"],
        generation=str(fields.get("generation") or fields["family"]),
        size=None if size is None else float(size),
        kind=fields["kind"],
        base=None if base is None else model_name(str(base)),
    )
