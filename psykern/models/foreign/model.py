"""A model that the library computes with its own modules, opened for scoring.

    shared   one forward for each batch of a wave, whose attention reads earlier rows: psykern's, or the library's own
             where a layer does what psykern's has not; common beginnings are computed once
    whole    one forward for each sequence, as the library has it

Which of both is said by the probe, and then by a trial with the weights themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from psykern.core.errors import CheckpointError, OutOfMemoryError
from psykern.kernels import OptionLogprobs
from psykern.kernels.compute import Compute
from psykern.models.batch import Batch, LayerState
from psykern.models.foreign.adapter import with_adapter
from psykern.models.foreign.check import Trial
from psykern.models.foreign.head import Head, head_of
from psykern.models.foreign.interface import Shared
from psykern.models.foreign.library import first_line, load_weights
from psykern.models.foreign.network import Network
from psykern.models.foreign.probe import read_foreign_spec
from psykern.models.foreign.spec import ForeignSpec
from psykern.models.weights import ModelFolder


class ForeignModel:
    """See the module. The whole model is on its device."""

    def __init__(self, base: ModelFolder, compute: Compute, *, adapter: Path | None = None) -> None:
        """Raises ``CheckpointError`` for what transformers cannot load or psykern cannot score, ``OutOfMemoryError``
        where the weights do not fit the device."""
        self.base, folder = base, base.folder
        self.compute = replace(compute, is_own=False)
        self.spec = read_foreign_spec(folder)
        try:
            model, unused = load_weights(folder, compute.dtype, compute.device)
            model = model if adapter is None else with_adapter(model, adapter)
            self._network = Network(model, by_definition=any(layer.mixer.is_own for layer in self.spec.layers))
            with compute.current():
                self._head, self.spec = self._checked()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise OutOfMemoryError(
                f"{folder}: with implementation 'transformers' the whole model is on {compute.device}, where it does "
                f"not fit: {str(error).splitlines()[0]}"
            ) from error
        self.changes = (f"tensors that transformers does not use: {', '.join(unused)}",) if unused else ()

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.compute.dtype

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    def batch(
        self,
        token_ids: Tensor,
        batch: Batch,
        rows: Tensor,
        states: Sequence[LayerState],
        sums: Tensor | None = None,
    ) -> Tensor:
        """What the head takes of ``rows`` [m] int64 of a batch of token_ids [n], [m, D].

        ``states``: each layer's store, where the batch's own rows are written. To ``sums`` [L] the sum of each layer's
        output is added.
        """
        mixers = [layer.mixer for layer in self.spec.layers]
        call = Shared(states, mixers, batch.store_row, batch.segments, self.compute.backend)
        return self._network.hidden(token_ids, rows, positions=batch.positions, call=call, sums=sums)

    def sequence(self, token_ids: Tensor, rows: Tensor, sums: Tensor | None = None) -> Tensor:
        """The same of ``rows`` of one sequence, token_ids [n], as the library computes it."""
        return self._network.hidden(token_ids, rows, sums=sums)

    def score(self, hidden: Tensor, token_offsets: Tensor, token_ids: Tensor) -> OptionLogprobs:
        """The head of what it takes, [R, D], for the tokens wanted of each row, as ``kernels.option_logprobs``."""
        return self._head.score(hidden, token_offsets, token_ids)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """It is behind the final norm."""
        return hidden

    def logits(self, normed: Tensor, out: Tensor) -> None:
        """Of all tokens behind rows [r, D], to ``out`` [r, V] fp32."""
        self._head.logits(normed, out)

    def non_finite_tensors(self, layer: int) -> list[str]:
        """Names of the tensors of one layer that hold a NaN or an infinity; layer -1: of all."""
        return self._network.non_finite(self.spec.layers[layer].prefix if layer >= 0 else "")

    def _checked(self) -> tuple[Head, ForeignSpec]:
        """The head, and the spec with the mode that gives what the library gives."""
        place = f"{self.base.folder}: {self.spec.model_type}"
        try:
            trial = Trial.of(self._network, self.spec)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the library's own forward
            raise CheckpointError(f"{place}: transformers cannot compute it: {first_line(error)}") from error
        if not trial.is_causal:
            raise CheckpointError(f"{place}: its tokens see later ones: expected a causal language model")
        whole = torch.stack([self.sequence(trial.token_ids[rows], trial.places) for rows in trial.rows])
        head = head_of(self._network, whole.flatten(0, 1), self.compute.backend)
        if not trial.fits(_logprobs(head, whole)):
            raise CheckpointError(f"{place}: its logits are not those of what its output embedding takes")
        if self.spec.mode == "whole":
            return head, self.spec
        self._network.attend_by(psykern=True)
        try:
            if trial.fits(_logprobs(head, self._as_tree(trial))):
                return head, self.spec
            why = "other scores than its own with psykern's attention"
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            why = f"psykern's attention cannot stand in it: {first_line(error)}"
        self._network.attend_by(psykern=False)
        return head, self.spec.as_whole(why)

    def _as_tree(self, trial: Trial) -> Tensor:
        """What the head takes of both sequences of a trial, [2, c + n, D], computed as one batch of a wave."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        shapes = [(len(trial.token_ids), *layer.mixer.kv_shape) for layer in self.spec.layers]
        states = [LayerState(like.new_empty(shape), like.new_empty(shape)) for shape in shapes]
        rows = torch.arange(len(trial.token_ids), device=self.device)
        return self.batch(trial.token_ids, trial.batch, rows, states)[trial.rows]


def _logprobs(head: Head, hidden: Tensor) -> Tensor:
    """[2, n, D] to [2, n, V]."""
    rows = hidden.flatten(0, 1)
    out = rows.new_empty((len(rows), head.vocab_size), dtype=torch.float32)
    head.logits(rows, out)
    return out.log_softmax(-1).unflatten(0, hidden.shape[:2])
