"""Whether psykern's attention gives what the library's own gives: asked of the weights themselves when they are loaded.

Two short sequences with a common beginning are computed as the library has it, and then as one token tree. Whatever
lets rows see others in another way, as a convolution or a token shift does, shows there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psykern.kernels import Segments
from psykern.models.batch import Batch
from psykern.models.foreign.network import Network
from psykern.models.foreign.spec import ForeignSpec

_LEAST = 2e-4  # nats of a token, root mean square: what rounding in fp32 may come to; another attention is far beyond
_COMMON, _OWN, _MOST = 8, 4, 48  # tokens of the common beginning, and of each sequence alone; of both, at most


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Two sequences of ``common + own`` tokens, as a token tree, and what the library makes of them."""

    token_ids: Tensor  # [c + 2 n] int64: what is common, then the rest of either
    positions: Tensor  # [c + 2 n] int32
    common: int  # c
    rows: Tensor  # [2, c + n] int64, of each sequence in the tree
    expected: Tensor  # [2, c + n, V] fp32 log-probabilities
    tolerance: float

    @classmethod
    def of(cls, network: Network, spec: ForeignSpec) -> Trial:
        windows = [layer.mixer.window for layer in spec.layers]
        past_windows = [window + 1 for window in windows if window is not None and window < _MOST - _OWN]
        common = max(1, min(max([_COMMON, *past_windows]), spec.max_positions - _OWN))
        places = torch.arange(common + 2 * _OWN)
        token_ids = ((places * 7919 + 11) % spec.vocab_size).to(network.device)
        rows = torch.stack([places[: common + _OWN], torch.cat((places[:common], places[common + _OWN :]))])
        logits = torch.stack([network.plain(token_ids[own.to(network.device)]) for own in rows])
        positions = torch.cat((places[: common + _OWN], places[common : common + _OWN])).int().to(network.device)
        largest = float(logits[logits.isfinite()].abs().max())
        tolerance = max(_LEAST, largest * torch.finfo(network.head.weight.dtype).eps)  # half precision rounds logits
        return cls(token_ids, positions, common, rows.to(network.device), logits.log_softmax(-1), tolerance)

    @property
    def places(self) -> Tensor:
        """[c + n] int64, of one sequence's tokens in it."""
        return torch.arange(self.rows.shape[1], device=self.rows.device)

    @property
    def batch(self) -> Batch:
        """The tree as one, its rows the store's."""
        c, end = self.common, len(self.token_ids)
        segments = Segments(
            positions=self.positions.cpu(),
            query_offsets=torch.tensor([0, c, c + _OWN, end], dtype=torch.int32),
            range_offsets=torch.tensor([0, 1, 3, 5], dtype=torch.int32),
            key_ranges=torch.tensor([[0, c], [0, c], [c, c + _OWN], [0, c], [c + _OWN, end]], dtype=torch.int32),
        )
        return Batch.of_all(self.positions, 0, segments)

    @property
    def is_causal(self) -> bool:
        """Whether what stands behind changes nothing."""
        one, two = self.expected[:, : self.common]
        return self._agree(one, two)

    def fits(self, logprobs: Tensor) -> bool:
        """``logprobs`` of both sequences, [2, c + n, V]."""
        return self._agree(logprobs, self.expected)

    def _agree(self, one: Tensor, two: Tensor) -> bool:
        errors = torch.where(one == two, 0.0, one - two)  # tokens that cannot be have -inf
        return bool(errors.square().mean().sqrt() <= self.tolerance)  # NaN is none
