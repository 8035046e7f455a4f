"""Decoder-only transformers of the study's families, described by a small table and computed one layer at a time.

``ModelConfig`` reads ``config.json``; ``Model`` hands out the weights of one layer; ``decoder_layer`` computes that
layer for one batch of a wave. There is one decoder: the families differ in where norms stand, in biases, in rotary
embeddings and in sliding windows, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from psykern import kernels
from psykern.models.checkpoint import Checkpoint, widen
from psykern.models.config import ModelConfig
from psykern.models.layer import Layer
from psykern.models.names import expected_tensors
from psykern.models.rope import Rope
from psykern.models.slots import Layout, Slots, free_bytes

_RESIDENT_SHARE = 0.7  # of the free memory: weights beyond that are streamed, the rest is for waves
_STREAMED_SLOTS = 2  # one is computed with while the other is filled


class Model:
    """A checkpoint opened for scoring: weights are handed out one layer at a time.

    On a CPU the layers are the mapped file itself, or one layer's copy where they are stored in another dtype. On a
    device they are in slots (:mod:`.slots`), all at once where they fit beside the embedding and the head.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, num_slots: int | None = None) -> None:
        """``num_slots``: layers that are held at once; None: on a device as many as fit, on a CPU none where the
        stored dtype is ``dtype``. Raises ``CheckpointError`` where the folder's config, tensors or shapes are not as
        they must be.
        """
        self.config = ModelConfig.read(folder)
        self.device = device
        self.dtype = dtype
        self._checkpoint = Checkpoint.open(folder)
        optional = ["*.rotary_emb.inv_freq", *(["lm_head.weight"] if self.config.tied_head else [])]
        shapes = expected_tensors(self.config)
        self._checkpoint.check(shapes, optional)
        prefix = "model.layers.0."
        self._shapes = {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}
        self._tables: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._outside: dict[str, Tensor] = {}  # embedding, head and final norm on a device
        self.is_fused = device.type != "cpu" or num_slots is not None  # on a CPU two products are as fast as one
        self._slots = self._make_slots(num_slots)
        if device.type != "cpu":  # now, so that what is free afterwards is free
            for name in shapes:
                if not name.startswith("model.layers."):
                    self._on_device(name)

    def _make_slots(self, num_slots: int | None) -> Slots | None:
        on_cpu = self.device.type == "cpu"
        if num_slots is None and on_cpu and all(t.dtype == self.dtype for t in self._stored(0).values()):
            return None
        layout = Layout.of(self._shapes)
        if num_slots is None and on_cpu:
            num_slots = 1
        elif num_slots is None:
            outside = ("model.embed_tokens.weight", "lm_head.weight")
            stored = (self._checkpoint.tensor(name) for name in outside if name in self._checkpoint.names)
            needed = sum(tensor.numel() * self._dtype_on_device(tensor).itemsize for tensor in stored)
            needed += layout.size * self.dtype.itemsize * self.config.num_layers
            free = free_bytes(self.device) or 0
            num_slots = self.config.num_layers if needed <= _RESIDENT_SHARE * free else _STREAMED_SLOTS
        # No method as the source: slots that hold their model keep a device's memory until a garbage collection.
        return Slots(
            partial(_stored_layer, self._checkpoint, tuple(self._shapes)),
            layout,
            num_layers=self.config.num_layers,
            num_slots=num_slots,
            device=self.device,
            dtype=self.dtype,
        )

    def _stored(self, index: int) -> dict[str, Tensor]:
        return _stored_layer(self._checkpoint, self._shapes, index)

    @property
    def is_resident(self) -> bool:
        """All layers stay where they are computed with: nothing is copied for a further wave."""
        return self._slots is None or self._slots.is_resident

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] token ids on the model's device to [N, D] in the compute dtype."""
        return self._on_device("model.embed_tokens.weight")[token_ids.long()].to(self.dtype)

    def layer(self, index: int, num_positions: int) -> Layer:
        """Layer ``index`` with rotary tables for at least ``num_positions`` positions.

        Its tensors are valid until the next layer is asked for: that one may take their place.
        """
        cos, sin = self._rotary_tables(self.config.ropes[index], num_positions)
        tensors = self._stored(index) if self._slots is None else self._slots.layer(index)
        return Layer(self.config, tensors, self.config.windows[index], cos, sin, self.is_fused)

    def final_norm(self, hidden: Tensor, backend: kernels.Backend) -> Tensor:
        weight = widen(self._on_device("model.norm.weight"), self.dtype)
        return kernels.add_rms_norm(hidden, None, weight, self.config.rms_norm_eps, backend=backend)[0]

    def head(self) -> Tensor:
        """The head's weight [V, D], on a CPU in the checkpoint's own dtype: ``option_logprobs`` widens it by tiles."""
        return self._on_device("model.embed_tokens.weight" if self.config.tied_head else "lm_head.weight")

    def non_finite_tensors(self, layer: int) -> list[str]:
        """Names of the tensors of one layer that hold a NaN or an infinity; layer -1: those outside the layers."""
        prefix = f"model.layers.{layer}."
        names = [
            n for n in expected_tensors(self.config) if (n.startswith(prefix) if layer >= 0 else "layers" not in n)
        ]
        return [n for n in names if not torch.isfinite(self._checkpoint.tensor(n)).all()]

    def _on_device(self, name: str) -> Tensor:
        """A tensor outside the layers: on a CPU as it is stored, to a device copied once."""
        stored = self._checkpoint.tensor(name)
        if self.device.type == "cpu":
            return stored
        if name not in self._outside:
            self._outside[name] = stored.to(self.device, self._dtype_on_device(stored))
        return self._outside[name]

    def _dtype_on_device(self, stored: Tensor) -> torch.dtype:
        """Of a tensor outside the layers. Tensor cores multiply half precision with its like alone; fp32 takes either,
        and a head in half precision is half the bytes."""
        return stored.dtype if self.dtype == torch.float32 else self.dtype

    def _rotary_tables(self, rope: Rope, num_positions: int) -> tuple[Tensor, Tensor]:
        tables = self._tables.get(rope)
        if tables is None or len(tables[0]) < num_positions:
            # Twice as many as before: each time the host waits for the device.
            rows = max(num_positions, min(self.config.max_positions, 1 << (num_positions - 1).bit_length()))
            frequencies = torch.tensor(rope.inverse_frequencies, device=self.device)
            angles = torch.arange(rows, device=self.device)[:, None].float() * frequencies
            tables = self._tables[rope] = (angles.cos() * rope.scale, angles.sin() * rope.scale)
        return tables


def _stored_layer(checkpoint: Checkpoint, names: Iterable[str], index: int) -> dict[str, Tensor]:
    """Layer ``index`` as the file has it, by the names within a layer."""
    return {name: checkpoint.tensor(f"model.layers.{index}.{name}") for name in names}
