"""What ``adapter_config.json`` of a PEFT LoRA adapter says, strictly read.

The rule: psykern scores what peft would compute with the adapter, or refuses it. A key that would change the arithmetic
and is not obeyed here is an error that names it, and so is one that nobody here knows, unless it is null, false or
empty. Modules are named as the adapter's own tensors name them, as patterns are written for those names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psykern.models.checkpoint import read_config
from psykern.models.fields import Fields

CONFIG = "adapter_config.json"

_OBEYED = {
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
}
# They say how the adapter was trained, saved or begun, or what its tensors say too (bias); fan_in_fan_out is of Conv1D,
# and peft unsets it for the linear modules that psykern's families have.
_HARMLESS = {
    "auto_mapping",
    "peft_version",
    "task_type",
    "inference_mode",
    "lora_dropout",
    "bias",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "ensure_weight_tying",
    "runtime_config",
}
_REFUSED: Mapping[str, str] = {
    "layer_replication": "layers that are there several times are not computed",
    "trainable_token_indices": "single trained rows of the embedding are not merged",
    "target_parameters": "changes of parameters that are no module's weight are not merged",
    "alora_invocation_tokens": "an adapter that acts from certain tokens on cannot be merged",
    "alora_invocation_string": "an adapter that acts from a certain text on cannot be merged",
    "use_qalora": "changes of pooled inputs are not merged",
    "megatron_config": "Megatron's modules are not merged",
    "arrow_config": "adapters that are mixed by a router cannot be merged",
    "use_bdlora": "block-diagonal changes are not merged",
    "kasa_config": "it changes the base's weights",
    "monteclora_config": "random changes cannot be merged",
    "velora_config": "what it does to a change is not computed",
}
_KEEPING_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")  # init_lora_weights that leave the base as it is


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Of one adapter. Made by :meth:`read`."""

    base: str | None  # folder or hub id of the model that it was trained on
    revision: str | None  # of that
    rank: int
    alpha: float
    ranks: Mapping[str, int]  # of the modules that a pattern names
    alphas: Mapping[str, float]
    is_rank_stabilised: bool
    has_magnitudes: bool  # DoRA
    has_bias: bool  # of its own, on top of the low-rank change
    targets: str | tuple[str, ...]  # one pattern, or ends of names
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]  # whose modules are targets; none: all
    layers_patterns: tuple[str, ...]  # what stands before a layer's number; none: anything
    saved: tuple[str, ...]  # modules whose tensors it holds whole

    @classmethod
    def read(cls, folder: Path) -> LoraConfig:
        """Raises ``CheckpointError`` for what cannot be read or is not obeyed."""
        c = Fields(read_config(folder, CONFIG), str(folder / CONFIG))
        _check(c)
        layers = c.get("layers_to_transform")
        ranks, alphas = _patterns(c, "rank_pattern"), _patterns(c, "alpha_pattern")
        config = cls(
            base=_text(c, "base_model_name_or_path"),
            revision=_text(c, "revision"),
            rank=c.or_else({"r": 8}).positive("r"),
            alpha=c.or_else({"lora_alpha": 8}).number("lora_alpha"),
            ranks={key: ranks.positive(key) for key in ranks.values},
            alphas={key: alphas.number(key) for key in alphas.values},
            is_rank_stabilised=c.boolean("use_rslora"),
            has_magnitudes=c.boolean("use_dora"),
            has_bias=c.boolean("lora_bias"),
            targets=_names(c, "target_modules"),
            excluded=_names(c, "exclude_modules"),
            layers=_numbers(c, [layers] if isinstance(layers, int) else layers or []),
            layers_patterns=_as_tuple(_names(c, "layers_pattern")),
            saved=_as_tuple(_names(c, "modules_to_save")),
        )
        _check_patterns(c, config)
        return config

    def rank_of(self, module: str) -> int:
        return self.ranks.get(_matching(self.ranks, module), self.rank)

    def scale(self, module: str) -> float:
        """What the product B A of a module is multiplied with."""
        rank, alpha = self.rank_of(module), self.alphas.get(_matching(self.alphas, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def is_target(self, module: str) -> bool:
        """Whether peft gives the module a low-rank change."""
        is_saved = any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved)
        if is_saved or self._ends(self.excluded, module):
            return False
        if self.targets == "all-linear":
            return not module.endswith(("embed_tokens", "lm_head"))
        if not self._ends(self.targets, module):
            return False
        return isinstance(self.targets, str) or module in self.targets or self._is_in_layers(module)

    def is_saved(self, module: str) -> bool:
        """Whether ``modules_to_save`` names it. peft asks for the end of a name, ``norm`` is ``q_norm`` too."""
        return module.endswith(self.saved)

    @staticmethod
    def _ends(names: str | tuple[str, ...], module: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return module in names or any(module.endswith(f".{name}") for name in names)

    def _is_in_layers(self, module: str) -> bool:
        """Of the first numbered part of the name."""
        if not self.layers:
            return True
        befores = [rf"(?:^|.*?\.){before}" for before in self.layers_patterns] or [r".*?\.[^.]*"]
        found = next((m for before in befores if (m := re.match(rf"{before}\.(\d+)\.", module))), None)
        return found is not None and int(found[1]) in self.layers


def _check(c: Fields) -> None:
    if c.get("peft_type") != "LORA":
        raise c.error(f"peft_type: expected 'LORA', got {c.get('peft_type')!r}; other adapters are not merged")
    for key, value in c.values.items():
        if key in _REFUSED and value not in (None, False) and value != [] and value != {}:
            raise c.error(f"{key}: {_REFUSED[key]}; merge the adapter with peft and score that model")
        is_known = key in _OBEYED or key in _HARMLESS or key in _REFUSED
        if not is_known and value is not None and value is not False and value not in ("", [], {}):
            raise c.error(f"{key}: not known here, and it may change what the adapter does: got {value!r:.80}")
    init = c.get("init_lora_weights", True)
    if not any(init is keeping or (isinstance(init, str) and init == keeping) for keeping in _KEEPING_BASE):
        raise c.error(
            f"init_lora_weights: {init!r:.80} changes the base's weights too; save the adapter with peft's "
            "path_initial_model_for_weight_conversion, which makes it one of the unchanged base"
        )


def _check_patterns(c: Fields, config: LoraConfig) -> None:
    patterns = [*config.ranks, *config.alphas, *config.saved, *config.layers_patterns]
    patterns += [names for names in (config.targets, config.excluded) if isinstance(names, str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise c.error(f"{pattern!r:.80} is no regular expression: {error}") from error


def _matching(patterns: Mapping[str, Any], module: str) -> str:
    """The first of ``patterns`` that is the end of the module's name, from a dot on."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _patterns(c: Fields, key: str) -> Fields:
    return Fields(c.mapping(key) or {}, f"{c.name}: {key}")


def _text(c: Fields, key: str) -> str | None:
    value = c.get(key)
    if value is not None and not isinstance(value, str):
        raise c.error(f"{key}: expected a text, got {value!r:.80}")
    return value or None


def _names(c: Fields, key: str) -> str | tuple[str, ...]:
    value = c.get(key) or []
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise c.error(f"{key}: expected names of modules, got {value!r:.80}")
    return tuple(value)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _numbers(c: Fields, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise c.error(f"layers_to_transform: expected numbers of layers, got {values!r:.80}")
    return tuple(values)
