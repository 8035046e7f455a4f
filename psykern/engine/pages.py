"""Keys and values that stay: of all layers, in pages, and behind them the rows in which a wave computes its own.

What is held is what ``page_tree`` says. A wave reads pages where its key ranges name them and writes *landing* rows;
when its scores have been found good, those that are to stay are copied to pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from psykern.core.errors import OutOfMemoryError
from psykern.engine.page_tree import PAGE_TOKENS, PageTree
from psykern.engine.plan import Wave
from psykern.engine.upload import upload
from psykern.models.batch import LayerState
from psykern.models.decoder import Decoder, DecoderSpec
from psykern.models.slots import free_bytes

LANDING_ROWS = 4096  # at most: prompts are computed in waves of these, and one step of many sessions is one of them
_SHARE = {"cpu": 0.4, "cuda": 0.25}  # of the free memory; a CPU's is taken page by page, as it is written to
_MOST_TOKENS = 262_144  # a hundred participants of a long experiment
_LEAST_TOKENS = 4096  # or as many as the model takes


def row_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Of a token's keys and values in all layers."""
    return sum(2 * layer.mixer.kv_size for layer in spec.layers) * dtype.itemsize


def suitable_bytes(model: Decoder) -> int:
    """For pages, where nobody says: 40 % of what is free on a CPU, a quarter on a device, but no more than 262,144
    tokens need, and no less than a text as long as the model takes, or one of 4,096 tokens."""
    row = row_bytes(model.spec, model.dtype)
    free = free_bytes(model.device)
    suitable = row * _MOST_TOKENS if free is None else min(int(free * _SHARE[model.device.type]), row * _MOST_TOKENS)
    return max(suitable, row * min(model.spec.max_positions, _LEAST_TOKENS))


class Pages:
    """A ``Store``; see the module. Its rows are those of the pages, then the landing rows."""

    def __init__(self, model: Decoder, num_bytes: int, landing_rows: int) -> None:
        """``num_bytes``: for pages; the landing rows come on top."""
        num_pages = num_bytes // (row_bytes(model.spec, model.dtype) * PAGE_TOKENS)
        self.num_rows = num_pages * PAGE_TOKENS  # without the landing rows
        self.landing_rows = landing_rows
        rows = self.num_rows + landing_rows
        shapes = [(2, rows, *layer.mixer.kv_shape) for layer in model.spec.layers]
        try:
            self._layers = [torch.empty(shape, dtype=model.dtype, device=model.device) for shape in shapes]  # K and V
        except (MemoryError, RuntimeError) as error:  # torch raises the latter, or one of its kind
            raise OutOfMemoryError(
                f"session_bytes: {num_bytes / 2**20:,.0f} MiB for the keys and values of sessions, and those of "
                f"{landing_rows:,} tokens in hand, are not to be had: {str(error).splitlines()[0]}; lower it"
            ) from error
        self.tree = PageTree(num_pages)
        self._states = [LayerState(*layer) for layer in self._layers]
        self._device = model.device

    def enter(self, layer: int, wave: Wave) -> LayerState:
        return self._states[layer]

    def leave(self, layer: int, wave: Wave) -> None:
        """Everything is where it was computed: nobody else writes the landing rows before :meth:`keep`."""

    def keep(self, sequences: Sequence[np.ndarray], landed: Sequence[np.ndarray]) -> None:
        """Holds the tokens of ``sequences``, each [T] int32; ``landed``: of each the last tokens' landing rows, counted
        from the first, [n] int64, at least of those that are not held. Room for these must have been made."""
        try:
            to = [self.tree.insert(token_ids) for token_ids in sequences]
            behind = [rows[len(rows) - len(new) :] for rows, new in zip(landed, to, strict=True)]
            source = upload(np.concatenate(behind) + self.num_rows, self._device)
            target = upload(np.concatenate(to), self._device)
            for layer in self._layers:
                layer.index_copy_(1, target, layer.index_select(1, source))
        except BaseException:  # what the tree says would not be true
            self.tree.clear()
            raise
