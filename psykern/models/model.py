"""A checkpoint opened for scoring: what its layers are made of, and their weights, one layer at a time.

``Model.layer`` gives a :class:`Layer`, which computes a batch; ``embed`` and ``score`` are what comes before the layers
and behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from psykern import kernels
from psykern.kernels.compute import Compute
from psykern.models.adapters import Adapter, Merged
from psykern.models.batch import Scratch
from psykern.models.checkpoint import widen
from psykern.models.head import head_logits
from psykern.models.layer import Layer, LayerSpec
from psykern.models.readahead import ReadAhead
from psykern.models.rope import RotaryTables
from psykern.models.slots import Layout, Slots, free_bytes, share_layouts
from psykern.models.source import Source
from psykern.models.spec import EMBEDDING, FINAL_NORM
from psykern.models.weights import Base

RESIDENT_SHARE = 0.7  # of the free memory: weights beyond that are streamed, the rest is for waves
_HELD_SHARE = 0.4  # of the free memory: layers that are made anew, kept for small waves
_STREAMED_SLOTS = 2  # one is computed with while the other is filled


class Model:
    """See the module.

    On a CPU the layers are the mapped file itself, whatever dtype it has: kernels widen or round weights where they use
    them. (``reference`` gets one layer's copy where the dtype is not that of ``compute``.) What no file has as it is,
    as quantised weights, is made anew for each wave, a layer at a time. On a device layers are in slots
    (:mod:`.slots`), all at once where they fit beside the embedding and the head.
    """

    def __init__(
        self, base: Path | Base, compute: Compute, *, adapter: Path | None = None, num_slots: int | None = None
    ) -> None:
        """``base``: a folder, or one that is open. ``adapter``: folder of one that is merged. ``num_slots``: layers
        that are held at once; None: on a device as many as fit, on a CPU none. Raises ``CheckpointError`` where a
        folder's config, tensors or shapes are not as they must be.
        """
        self.base = base = Base.open(base) if isinstance(base, Path) else base
        opened = None if adapter is None else Adapter.open(adapter)
        self.spec = base.spec if opened is None else opened.untied(base.spec)
        self.compute = compute
        self._source = base.source if opened is None else Merged.of(opened, base.source, base.spec)
        self._ahead = ReadAhead(self._parts())
        self._read = partial(_read_layer, self._source, self.spec.layers, self._ahead)
        self._tables = RotaryTables(compute.device, self.spec.max_positions)
        self._outside: dict[str, Tensor] = {}  # embedding, head and final norm on a device
        self._is_mapped = all(map(self._source.is_mapped, self._names()))
        self._holds, self._held = False, dict[int, Mapping[str, Tensor]]()  # by layer; see :meth:`hold`
        self._slots = self._make_slots(num_slots)
        self._layers: dict[int, tuple[Layer, int]] = {}  # that stay, and for how many positions
        if compute.device.type != "cpu":  # now, so that what is free afterwards is free
            for name in self.spec.outside():
                self._on_device(name)

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations where they are computed."""
        return self.compute.dtype

    @property
    def changes(self) -> tuple[str, ...]:
        """What was done to the weights on their way from the files."""
        return self._source.changes

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    @property
    def is_resident(self) -> bool:
        """All layers stay where they are computed with: nothing is copied for a further wave."""
        return self._is_mapped or self._holds if self._slots is None else self._slots.is_resident

    def hold(self) -> None:
        """From now on what is made anew of a layer is kept, where that takes no more than 40 % of what is free. For
        waves of few rows, whose layers take longer to make than to compute."""
        if self._is_mapped or self._holds or self._slots is not None:
            return
        made = (name for name in self._names() if not self._source.is_mapped(name))
        needed = sum(math.prod(self._source.shape(name)) for name in made) * self.dtype.itemsize
        self._holds = needed <= _HELD_SHARE * (free_bytes(self.device) or 0)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] token ids on the model's device to [N, D] in the compute dtype."""
        self._leave_layers()  # none is entered yet
        return self._on_device(EMBEDDING)[token_ids.long()].to(self.dtype)

    def layer(self, index: int, num_positions: int) -> Layer:
        """Layer ``index`` with rotary tables for at least ``num_positions`` positions.

        Its weights are valid until the next layer is asked for: that one may take their place.
        """
        if self._slots is None:
            self._ahead.entered(index)
        known, covered = self._layers.get(index, (None, 0))
        if known is not None and num_positions <= covered:
            return known
        covered = max(num_positions, min(self.spec.max_positions, 1 << (num_positions - 1).bit_length()))
        layer = self.spec.layers[index].layer(self.tensors(index), self._tables, covered, self.compute.backend)
        if self.is_resident:
            self._layers[index] = layer, covered
        return layer

    def tensors(self, index: int) -> Mapping[str, Tensor]:
        """The weights of layer ``index`` by their names within it, as :meth:`layer` has them."""
        if self._slots is not None:
            return self._slots.layer(index)
        if index in self._held:
            return self._held[index]
        layer = self.spec.layers[index]
        tensors = {name: self._tensor(layer.prefix + name) for name in layer.tensors()}
        if self._holds:
            self._held[index] = tensors
        return tensors

    def _tensor(self, name: str) -> Tensor:
        """A mapped one as the file has it, which kernels take; one that is made anew as it is computed with."""
        tensor = self._source.tensor(name)
        return tensor if self._source.is_mapped(name) else tensor.to(self.dtype)

    def score(self, hidden: Tensor, token_offsets: Tensor, token_ids: Tensor) -> kernels.OptionLogprobs:
        """Final norm and head of hidden [R, D] for the tokens wanted of each row, as ``kernels.option_logprobs``."""
        backend = self.compute.backend
        return kernels.option_logprobs(self.final_norm(hidden), self.head(), token_offsets, token_ids, backend=backend)

    def final_norm(self, hidden: Tensor) -> Tensor:
        weight = widen(self._on_device(FINAL_NORM), self.dtype)
        return kernels.add_rms_norm(hidden, None, weight, self.spec.eps, backend=self.compute.backend)[0]

    def head(self) -> Tensor:
        """The head's weight [V, D], on a CPU in the checkpoint's own dtype: ``option_logprobs`` widens it by tiles."""
        self._leave_layers()
        return self._on_device(self.spec.head_name)

    def logits(self, normed: Tensor, out: Tensor) -> None:
        """Of all tokens behind rows [r, D] that are normed, to ``out`` [r, V] fp32."""
        head_logits(normed, self.head(), out, self.compute.backend)

    def scratch(self, rows: int) -> Scratch:
        """Room for batches of up to ``rows`` rows."""
        mixer = max(layer.mixer.scratch for layer in self.spec.layers)
        ffn = max(layer.ffn.scratch for layer in self.spec.layers)
        shapes = ((rows, self.spec.hidden_size), (rows * mixer,), (rows * ffn,))
        return Scratch(*(torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes))

    def non_finite_tensors(self, layer: int) -> list[str]:
        """Names of the tensors of one layer that hold a NaN or an infinity; layer -1: those outside the layers."""
        if layer < 0:
            names = list(self.spec.outside())
        else:
            of_layer = self.spec.layers[layer]
            names = [of_layer.prefix + name for name in of_layer.tensors()]
        bad = (name for name in names if not torch.isfinite(self._source.tensor(name)).all())
        return [self._source.stored_name(name) for name in bad]

    def _parts(self) -> list[list[Tensor]]:
        """What is read from the files layer by layer, in a wave's order; on a CPU what is behind the layers too, and
        with the first layer what is before them."""
        layers = [
            [tensor for name in layer.tensors() for tensor in self._source.stored(layer.prefix + name)]
            for layer in self.spec.layers
        ]
        if self.device.type != "cpu":
            return layers
        layers[0].extend(self._source.stored(EMBEDDING))
        return [*layers, list(self._source.stored(self.spec.head_name))]

    def _leave_layers(self) -> None:
        if self.device.type == "cpu":
            self._ahead.entered(self.num_layers)

    def _names(self) -> list[str]:
        """Of all tensors of the layers."""
        return [layer.prefix + name for layer in self.spec.layers for name in layer.tensors()]

    def _make_slots(self, num_slots: int | None) -> Slots | None:
        layers = self.spec.layers
        if num_slots is None and self.device.type == "cpu":
            if self.compute.backend == "cpu" or all(self._source.dtype(name) == self.dtype for name in self._names()):
                return None
            layouts = share_layouts((layer.tensors(), {}) for layer in layers)  # nothing is fused, as without slots
            return self._make_slots_of(layouts, 1)
        layouts = share_layouts((layer.tensors(), layer.fused()) for layer in layers)
        if num_slots is None:
            needed = max(layout.size for layout in layouts) * self.dtype.itemsize * len(layers) + self._outside_bytes()
            num_slots = len(layers) if needed <= RESIDENT_SHARE * (free_bytes(self.device) or 0) else _STREAMED_SLOTS
        return self._make_slots_of(layouts, num_slots)

    def _make_slots_of(self, layouts: Sequence[Layout], num_slots: int) -> Slots:
        # No method as the source: slots that hold their model keep a device's memory until a garbage collection.
        return Slots(self._read, layouts, num_slots=num_slots, device=self.device, dtype=self.dtype)

    def _outside_bytes(self) -> int:
        """Of the embedding and the head on a device."""
        names = {EMBEDDING, self.spec.head_name}
        return sum(math.prod(self._source.shape(n)) * self._dtype_outside(n).itemsize for n in names)

    def _on_device(self, name: str) -> Tensor:
        """A tensor outside the layers: on a CPU as it is stored, to a device copied once, and what is made is made
        once."""
        if self.device.type == "cpu" and self._source.is_mapped(name):
            return self._source.tensor(name)
        if name not in self._outside:
            self._outside[name] = self._source.tensor(name).to(self.device, self._dtype_outside(name))
        return self._outside[name]

    def _dtype_outside(self, name: str) -> torch.dtype:
        """Of a tensor outside the layers. Tensor cores multiply half precision with its like alone; fp32 takes either,
        and a head in half precision is half the bytes."""
        return self._source.dtype(name) if self.dtype == torch.float32 else self.dtype


def _read_layer(source: Source, layers: tuple[LayerSpec, ...], ahead: ReadAhead, index: int) -> dict[str, Tensor]:
    """Layer ``index`` as the source has it, by the names within a layer."""
    ahead.entered(index)
    layer = layers[index]
    return {name: source.tensor(layer.prefix + name) for name in layer.tensors()}
