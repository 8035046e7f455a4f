"""Where keys and values stay: of one layer while it is computed, and of what later waves need.

A wave names the rows of its store: ``num_carried`` rows that are known when it begins, and its own after them. Where
they are, and for how long, is the store's; ``run_wave`` takes any.
"""

from __future__ import annotations

from typing import Protocol

import torch

from psykern import kernels
from psykern.engine.plan import Wave
from psykern.engine.upload import upload
from psykern.models.batch import LayerState
from psykern.models.decoder import Decoder


class Store(Protocol):
    """For each wave every layer is entered and left once, in order: layer 0 begins a wave, the last layer ends it."""

    def enter(self, layer: int, wave: Wave) -> LayerState:
        """The layer's rows, the first ``wave.num_carried`` of them filled. The layer writes those of the wave's own
        tokens, batch by batch, and reads those that the wave's key ranges name. Valid until the layer is left."""

    def leave(self, layer: int, wave: Wave) -> None:
        """The wave's own rows are filled: what others will read is to be kept now, at least ``wave.keep_rows``."""


class OneLayer:
    """Rows of one layer at a time; what the next wave carries is kept for all layers.

    That is the least that memory can hold: the rows of a wave are wanted by nobody once their layer is done, but for
    the prefixes that go on in the next wave. Of one plan after the other, each from its first wave to its last.
    """

    def __init__(self, model: Decoder) -> None:
        self._num_layers, self._heads = model.num_layers, model.spec.layers[0].mixer.kv_shape
        self._empty = torch.empty(0, dtype=model.dtype, device=model.device)
        self._backend = model.compute.backend
        self._rows = self._empty  # [2, C + N, Hkv, Dh], keys and values of the layer in hand
        self._keep_rows = self._empty  # [C'] int64, wave.keep_rows
        self._carried = self._empty  # [L, 2, C, Hkv, Dh], from the wave before
        self._kept = self._empty  # [L, 2, C', Hkv, Dh], for the next wave

    def enter(self, layer: int, wave: Wave) -> LayerState:
        if layer == 0:
            self._begin(wave)
        if wave.num_carried:
            self._rows[:, : wave.num_carried] = self._carried[layer]
        return LayerState(*self._rows)

    def leave(self, layer: int, wave: Wave) -> None:
        kernels.gather_rows(self._rows, self._keep_rows, out=self._kept[layer], backend=self._backend)
        if layer + 1 == self._num_layers:
            self._rows = self._empty  # the head may have its memory
            self._carried, self._kept = self._kept, self._empty

    def _begin(self, wave: Wave) -> None:
        self._rows = self._empty.new_empty((2, wave.num_carried + len(wave.token_ids), *self._heads))
        self._keep_rows = upload(wave.keep_rows, self._empty.device)
        self._kept = self._empty.new_empty((self._num_layers, 2, len(wave.keep_rows), *self._heads))


class AllLayers:
    """Rows of all layers for the time of a wave, which passes through them batch by batch. Otherwise as
    :class:`OneLayer`."""

    def __init__(self, model: Decoder) -> None:
        self._heads = [layer.mixer.kv_shape for layer in model.spec.layers]
        self._empty = torch.empty(0, dtype=model.dtype, device=model.device)
        self._backend = model.compute.backend
        self._rows: list[torch.Tensor] = []  # [2, C + N, Hkv, Dh] of each layer
        self._carried: list[torch.Tensor] = []  # [2, C, Hkv, Dh] of each layer, from the wave before

    def enter(self, layer: int, wave: Wave) -> LayerState:
        if layer == 0:
            self._rows = []
        rows = self._empty.new_empty((2, wave.num_carried + len(wave.token_ids), *self._heads[layer]))
        if wave.num_carried:
            rows[:, : wave.num_carried] = self._carried[layer]
        self._rows.append(rows)
        return LayerState(*rows)

    def leave(self, layer: int, wave: Wave) -> None:
        if layer == 0:
            self._carried = []
        keep = upload(wave.keep_rows, self._empty.device)
        self._carried.append(kernels.gather_rows(self._rows[layer], keep, backend=self._backend))
        self._rows[layer] = self._empty
