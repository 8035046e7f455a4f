"""psykern's kernels on arrays of NumPy, JAX and CuPy: the log-probabilities of some tokens, without all logits.

No array is copied: the libraries share their memory with torch by DLPack. JAX has no 64-bit integers unless it is told
to, so that offsets are NumPy's there; libraries may be mixed, and results are of the first array's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from psykern import kernels
from psykern.integrations import arrays

ROWS, VOCABULARY, SIZE = 4, 1000, 64
OFFSETS = np.arange(0, 3 * ROWS + 1, 3)  # three tokens wanted of each row
IDS = np.random.default_rng(0).integers(VOCABULARY, size=3 * ROWS).astype(np.int32)


def with_numpy() -> Any:
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((ROWS, SIZE), dtype=np.float32)
    weight = rng.standard_normal((VOCABULARY, SIZE), dtype=np.float32)
    scores = arrays.call(kernels.option_logprobs, hidden, weight, OFFSETS, IDS)
    return scores.logits - np.repeat(scores.lse, 3)


def with_jax() -> Any:
    import jax

    hidden = jax.random.normal(jax.random.key(1), (ROWS, SIZE))
    weight = jax.random.normal(jax.random.key(2), (VOCABULARY, SIZE))
    scores = arrays.call(kernels.option_logprobs, hidden, weight, OFFSETS, IDS)
    return scores.logits - scores.lse.repeat(3)


def with_cupy() -> Any:
    import cupy

    if not cupy.is_available():
        raise ImportError("no GPU is found here")
    rng = cupy.random.default_rng(1)
    hidden = rng.standard_normal((ROWS, SIZE), dtype=cupy.float32)
    weight = rng.standard_normal((VOCABULARY, SIZE), dtype=cupy.float32)
    scores = arrays.call(kernels.option_logprobs, hidden, weight, cupy.asarray(OFFSETS), cupy.asarray(IDS))
    return scores.logits - scores.lse.repeat(3)


def main() -> None:
    for library, example in (("NumPy", with_numpy), ("JAX", with_jax), ("CuPy", with_cupy)):
        try:
            logprobs = example()
        except ImportError as error:
            print(f"{library}: {error}")
        else:
            print(f"{library}: {type(logprobs).__name__} of nats; the first row's: {logprobs[:3]}")


if __name__ == "__main__":
    main()
