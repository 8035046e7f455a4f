"""What a model of the library is made of, found by sending a few tokens through it on the meta device.

No table of architectures: the model calls the attention that it is given, and what it calls it with says whether
psykern's can stand there, or the library's own with the keys of earlier rows. Where neither can, the reason is kept in
words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from psykern.core.errors import CheckpointError
from psykern.models.foreign.interface import NAME, Link, Mask, own_attention, window_of
from psykern.models.foreign.library import max_positions, on_meta, quiet, read_config
from psykern.models.foreign.spec import NO_KEYS, ForeignLayer, ForeignMixer, ForeignSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 4
_LENGTH_ROPES = ("dynamic", "longrope")  # their angles follow from the length of the whole text
# What psykern's attention has not, and the library's own function does: soft caps on logits, sinks.
_CHANGES = {"softcap": "soft caps on attention logits", "s_aux": "attention sinks"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What one call of the attention was given."""

    module: nn.Module
    mixer: ForeignMixer
    num_heads: int
    problem: str | None  # why no earlier rows could be read there


@dataclass(slots=True, eq=False)
class _Recording:
    """A call that computes nothing and notes what it is given."""

    positions: int
    seen: list[Seen] = field(default_factory=list)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, more: dict[str, Any]) -> Tensor:
        window, problem = self._window(mask, module, more)
        change = next((why for name, why in _CHANGES.items() if more.get(name) is not None), None)
        is_own = change is not None and own_attention(module) is not None
        problem = problem or (None if is_own else change)
        if k.shape[-1] != q.shape[-1] or v.shape != k.shape:
            problem = problem or "keys and values of different sizes"
        if more.get("position_bias") is not None:
            problem = problem or "position biases"
        if k.shape[2] != q.shape[2]:
            problem = problem or "attention to what is no earlier token"
        self.seen.append(Seen(module, ForeignMixer(k.shape[1], k.shape[3], window, is_own), q.shape[1], problem))
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])

    def _window(self, mask: object, module: nn.Module, more: dict[str, Any]) -> tuple[int | None, str | None]:
        if isinstance(mask, Mask):
            try:
                return window_of(mask, self.positions), None
            except Exception as error:  # the function is the library's
                return None, str(error) if isinstance(error, ValueError) else "a mask that cannot be followed"
        if mask is not None:
            return None, "a mask of its own"
        causal = more.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if causal is None else causal
        return None, None if is_causal else "attention that is not causal"


def read_foreign_spec(folder: Path) -> ForeignSpec:
    """Of a model folder, without its weights. Raises CheckpointError for what cannot be computed at all."""
    config = read_config(folder)
    try:
        model = on_meta(config)
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot make this model: {error}") from error
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise CheckpointError(f"{folder}: {config.model_type} has no output embedding: expected a linear layer")
    layers = layers_of(model)
    seen, failed = _send_through(model, max_positions(config))
    reason = _mixes(config, layers) or failed or _reason(layers, seen)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return ForeignSpec(
        model_type=config.model_type,
        vocab_size=head.out_features,
        hidden_size=head.in_features,
        max_positions=max_positions(config),
        mode="shared" if reason is None else "whole",
        reason=reason,
        layers=tuple(
            _layer(config, name, layer, seen[i] if reason is None else None, head.in_features)
            for i, (name, layer) in enumerate(layers)
        ),
        shapes=shapes,
    )


def layers_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder's layers by name, in order: its longest list of modules that is not within another."""
    decoder = next((name for name, module in model.named_modules() if module is model.get_decoder()), "")
    best: list[tuple[str, nn.Module]] = [("", model)]
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer, _ in best if outer)
        is_list = isinstance(module, nn.ModuleList) and name.startswith(decoder)
        if is_list and not is_inside and len(module) >= len(best):
            best = [(f"{name}.{i}", layer) for i, layer in enumerate(module)]
    return best


def _send_through(model: PreTrainedModel, positions: int) -> tuple[list[Seen], str | None]:
    """What the attention was called with, and why that could not be found."""
    link = Link.into(model)
    recording = _Recording(min(positions, 2**20))
    if not attends_through(model, NAME):
        return [], "its attention cannot be replaced"
    ids = torch.zeros((1, _TOKENS), dtype=torch.int64, device="meta")
    try:
        with quiet(), _autocast_there(), _passing_over(model), _Ones(), link.during(recording), torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:
        return recording.seen, f"it cannot be followed without weights ({type(error).__name__})"
    return recording.seen, None


def attends_through(model: PreTrainedModel, name: str) -> bool:
    """Sets the attention of this name; False where the model keeps its own."""
    try:
        with quiet():
            model.set_attn_implementation(name)
    except (ValueError, KeyError, AttributeError):
        return False
    return bool(model.config.get_text_config()._attn_implementation == name)


@contextmanager
def _autocast_there() -> Iterator[None]:
    """Within it the meta device has an autocast that does nothing: transformers 4 turns it off where angles are made,
    and torch knows none."""
    autocast = torch.autocast

    def known(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    with patch.object(torch, "autocast", known):
        yield


class _Ones(TorchDispatchMode):
    """Within it a number that is asked of a tensor without numbers is 1: as of a mask whose tokens are all there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


@contextmanager
def _passing_over(model: nn.Module) -> Iterator[None]:
    """Within it a module that cannot be computed without numbers, as a router cannot, gives what it was given."""

    def passing(forward: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except (NotImplementedError, RuntimeError):
                given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
                if given is None:
                    raise
                return given

        return computed

    inner = [module for name, module in model.named_modules() if re.search(r"\.\d+\.", name)]
    for module in inner:
        module.forward = passing(module.forward)
    try:
        yield
    finally:
        for module in inner:
            del module.forward


def _mixes(config: Any, layers: Sequence[tuple[str, nn.Module]]) -> str | None:
    """What makes a row depend on others in another way than by attention; None: nothing that is known."""
    if rope := next((kind for kind in _rope_types(config.to_dict()) if kind in _LENGTH_ROPES), None):
        return f"rotary angles that follow from the length of a text ({rope})"
    if (odd := next((i for i, (_, layer) in enumerate(layers) if _convolves(layer)), None)) is not None:
        return f"layer {odd} has a convolution over tokens"
    return None


def _reason(layers: Sequence[tuple[str, nn.Module]], seen: Sequence[Seen]) -> str | None:
    """Why psykern's attention cannot stand there; None: it can."""
    owners = {id(module): i for i, (_, layer) in enumerate(layers) for module in layer.modules()}
    counts = [0] * len(layers)
    for call in seen:
        if id(call.module) not in owners:
            return "attention outside its layers"
        counts[owners[id(call.module)]] += 1
    if (odd := next((i for i, count in enumerate(counts) if count != 1), None)) is not None:
        many = "no attention that can be replaced" if counts[odd] == 0 else "several attentions"
        return f"layer {odd} has {many}"
    return next((f"layer {i} has {call.problem}" for i, call in enumerate(seen) if call.problem), None)


def _convolves(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1 for module in layer.modules())


def _rope_types(config: dict[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _rope_types(value)
        elif key in ("rope_type", "type") and isinstance(value, str):
            yield value


def _layer(config: Any, name: str, layer: nn.Module, seen: Seen | None, hidden_size: int) -> ForeignLayer:
    shapes = {of: tuple(tensor.shape) for of, tensor in layer.named_parameters()}
    spread = _spread(config) if any("experts" in of for of in shapes) else 1.0
    products = sum(
        math.prod(shape) / (spread if "experts" in of else 1.0) for of, shape in shapes.items() if len(shape) > 1
    )
    widest = max((max(shape[-2:]) for shape in shapes.values() if shape), default=hidden_size)
    mixer, q_size = (NO_KEYS, 0) if seen is None else (seen.mixer, seen.num_heads * seen.mixer.head_dim)
    return ForeignLayer(
        prefix=f"{name}." if name else "",
        mixer=mixer,
        per_row=int(2 * products),
        per_visible_key=4 * q_size,
        most_memory=8 * hidden_size + 4 * widest + 4 * q_size,
        spread=spread,
        shapes=shapes,
    )


def _spread(config: Any) -> float:
    """Experts, by those that one row has."""
    text = config.get_text_config()
    counts = [
        next((n for name in names if isinstance(n := getattr(text, name, None), int) and n > 0), 1)
        for names in (("num_experts", "num_local_experts", "n_routed_experts"), ("num_experts_per_tok", "moe_k"))
    ]
    return max(1.0, counts[0] / counts[1])
