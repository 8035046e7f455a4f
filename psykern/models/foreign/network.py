"""The library's model as a function from tokens to what its head takes, and from that to logits.

Rows leave a forward at the output embedding: a hook takes what it is given, and lets it compute none. What stands
behind it, soft caps or scales, is the model's own code too: a forward of one token, in which a hook puts logits that
were computed elsewhere in the place of the output embedding's own.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from psykern.models.foreign.interface import NAME, Call, Link
from psykern.models.foreign.probe import attends_through, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True, eq=False)
class _Tap:
    """What the hooks do in the forward in hand."""

    rows: Tensor | None = None  # [m] int64, that are taken at the head; None: the head is left alone
    taken: Tensor | None = None  # [m, D]
    instead: Tensor | None = None  # [r, V], what the head gives
    sums: Tensor | None = None  # [L] fp32, what each layer's output is added to

    def before_head(self, head: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.rows is None and self.instead is None:
            return None
        if self.rows is not None:
            self.taken = given[0].reshape(-1, given[0].shape[-1]).index_select(0, self.rows)
        return (given[0][..., :0, :], *given[1:])

    def behind_head(self, head: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if self.instead is None:
            return None
        return self.instead.reshape(*(1,) * (out.dim() - 2), *self.instead.shape)

    def behind(self, index: int, out: Any) -> None:
        if self.sums is not None:
            hidden = out if isinstance(out, Tensor) else out[0]
            self.sums[index] += hidden.sum(dtype=torch.float32)


class Network:
    """See the module. One thread at a time."""

    def __init__(self, model: PreTrainedModel, *, by_definition: bool) -> None:
        """``by_definition``: the library's own attention is the function that defines it, for what a faster one may
        leave out: sdpa knows no soft caps, and older versions of the library choose it all the same."""
        self._model = model.requires_grad_(False)
        self._own = "eager" if by_definition else model.config.get_text_config()._attn_implementation
        self._link, self._tap = Link.into(model), _Tap()
        self.head: nn.Linear = model.get_output_embeddings()
        self.head.register_forward_pre_hook(self._tap.before_head)
        self.head.register_forward_hook(self._tap.behind_head)
        self.attend_by(psykern=False)
        for i, (_, layer) in enumerate(layers_of(model)):
            layer.register_forward_hook(lambda module, given, out, i=i, tap=self._tap: tap.behind(i, out))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def attend_by(self, psykern: bool) -> None:
        """From now on by psykern's attention, or by the one that the library chose."""
        attends_through(self._model, NAME if psykern else self._own)

    def hidden(
        self,
        token_ids: Tensor,
        rows: Tensor,
        *,
        positions: Tensor | None = None,
        call: Call | None = None,
        sums: Tensor | None = None,
    ) -> Tensor:
        """What the head takes of ``rows`` [m] int64 of one forward over token_ids [n]: [m, D].

        ``positions`` [n], where they do not count from 0; ``call``: what psykern's attention does; to ``sums`` [L] the
        sum of each layer's output is added.
        """
        self._tap.rows, self._tap.sums = rows, sums
        try:
            self._forward(token_ids, positions, call)
            assert self._tap.taken is not None, "the output embedding was not called"
            return self._tap.taken
        finally:
            self._tap.rows = self._tap.taken = self._tap.sums = None

    def finished(self, logits: Tensor) -> Tensor:
        """``logits`` [r, V] fp32 of the head, which may be changed, with all that the model does to them."""
        self._tap.instead = logits
        try:
            one = torch.zeros(1, dtype=torch.int64, device=logits.device)
            return self._forward(one, None, None).reshape(logits.shape).float()
        finally:
            self._tap.instead = None

    def plain(self, token_ids: Tensor) -> Tensor:
        """[n, V] fp32 logits, as the library gives them."""
        return self._forward(token_ids, None, None)[0].float()

    def non_finite(self, prefix: str) -> list[str]:
        """Names of the tensors below ``prefix`` that hold a NaN or an infinity."""
        named = self._model.named_parameters()
        return [name for name, tensor in named if name.startswith(prefix) and not torch.isfinite(tensor).all()]

    def _forward(self, token_ids: Tensor, positions: Tensor | None, call: Call | None) -> Tensor:
        more: dict[str, Tensor] = {} if positions is None else {"position_ids": positions[None].long()}
        with torch.inference_mode(), nullcontext() if call is None else self._link.during(call):
            logits: Tensor = self._model(input_ids=token_ids[None].long(), use_cache=False, **more).logits
        return logits
