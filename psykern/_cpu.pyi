from collections.abc import Sequence
from typing import Any

import numpy as np

class PrefixTrie:
    def __init__(
        self,
        *,
        token_ids: np.ndarray,
        offsets: np.ndarray,
        lengths: np.ndarray,
        root: np.ndarray,
        root_base: np.ndarray,
        branch_sequence: np.ndarray,
        branch_parent: np.ndarray,
        branch_scored: np.ndarray,
        branch_offsets: np.ndarray,
        branch_token_ids: np.ndarray,
        min_share: int,
        wave_tokens: int,
        carried_price: float = 0.0,
    ) -> None: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def num_waves(self) -> int: ...
    @property
    def wave_starts(self) -> np.ndarray: ...
    @property
    def carried_rows(self) -> np.ndarray: ...
    @property
    def branch_target_rows(self) -> np.ndarray: ...
    def locate(self, sequence: np.ndarray, position: np.ndarray) -> np.ndarray: ...
    def positions_of(self, rows: np.ndarray) -> np.ndarray: ...
    def visible_keys(self, window: int) -> int: ...
    def wave(self, index: int, batch_tokens: int) -> dict[str, Any]: ...

# Outputs are written in place; arrays are used where they are.
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def multiplies_bf16(isa: str | None = None) -> bool: ...
def peak(dtype: str, num_blocks: int, *, num_threads: int, isa: str | None = None) -> float: ...
def linear(
    x: np.ndarray,
    parts: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray]],
    *,
    epilogue: str,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def expert_swiglu(
    x: np.ndarray,
    gates: Sequence[np.ndarray],
    ups: Sequence[np.ndarray],
    slots: np.ndarray,
    offsets: np.ndarray,
    out: np.ndarray,
    *,
    top_k: int,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def expert_linear(
    x: np.ndarray,
    weights: Sequence[np.ndarray],
    slots: np.ndarray,
    offsets: np.ndarray,
    out: np.ndarray,
    *,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def option_logprobs(
    hidden: np.ndarray,
    weight: np.ndarray,
    token_offsets: np.ndarray,
    token_ids: np.ndarray,
    lse: np.ndarray,
    logits: np.ndarray,
    argmax: np.ndarray,
    entropy: np.ndarray,
    *,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def prefix_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    query_offsets: np.ndarray,
    range_offsets: np.ndarray,
    key_ranges: np.ndarray,
    out: np.ndarray,
    *,
    softmax_scale: float,
    window: int | None = None,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def add_rms_norm(
    x: np.ndarray,
    residual: np.ndarray | None,
    weight: np.ndarray,
    normed: np.ndarray | None,
    summed: np.ndarray | None,
    *,
    eps: float,
    norm_first: bool,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def qk_norm_rope(
    x: np.ndarray,
    weight: np.ndarray | None,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    out: np.ndarray,
    *,
    eps: float,
    num_threads: int,
    isa: str | None = None,
) -> None: ...
def add_weighted(
    x: np.ndarray, weights: np.ndarray, total: np.ndarray, *, num_threads: int, isa: str | None = None
) -> None: ...
def silu_mul(
    gate: np.ndarray, up: np.ndarray, out: np.ndarray, *, num_threads: int, isa: str | None = None
) -> None: ...
