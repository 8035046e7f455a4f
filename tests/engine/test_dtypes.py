"""16-bit arithmetic on a CPU: as far from fp64 as its resolution, and as ``transformers`` in the same dtype."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from support.exactness import in_fp64, token_logprobs

from psykern.core.settings import Dtype
from psykern.core.types import TokenTree
from psykern.engine.engine import Engine
from psykern.engine.plan import plan
from psykern.kernels import Backend
from psykern.kernels.compute import DTYPES, Compute
from psykern.models.model import Model

RMS = {"bfloat16": 0.1, "float16": 0.1 / 8}  # nats; fp16 has 8 times bf16's resolution


def whole(ids: np.ndarray) -> TokenTree:
    """All tokens but the first are scored."""
    nothing, offsets = np.empty(0, np.int32), np.zeros(1, np.int64)
    return TokenTree(ids, np.array([[1, len(ids)]], np.int32), nothing, nothing, offsets, nothing)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo3-yarn"])
def test_16_bits_are_as_near_as_they_can_be(name: str, dtype: Dtype, backend: Backend, tmp_path: Path) -> None:
    oracle = make_model(tmp_path, **CONFIGS[name])
    texts = [np.random.default_rng(seed).integers(0, 320, 150, dtype=np.int32) for seed in range(3)]
    planned = plan([whole(ids) for ids in texts], wave_tokens=200, batch_tokens=64)
    model = Model(tmp_path, Compute.resolve("cpu", dtype, backend))
    assert model.dtype == DTYPES[dtype]
    got = Engine(model).run(planned).logprob
    true = np.concatenate([token_logprobs(in_fp64(oracle), ids) for ids in texts])
    own = np.concatenate([token_logprobs(copy.deepcopy(oracle).to(DTYPES[dtype]), ids) for ids in texts])
    error, theirs = (float(np.sqrt(np.mean((of - true) ** 2))) for of in (got, own))
    assert 1e-4 < error < min(RMS[dtype], 1.5 * theirs), (error, theirs)


def test_what_16_bits_cannot_hold_is_named(tmp_path: Path) -> None:
    """The largest number of fp16 is 65,504; bf16 goes as far as fp32."""
    from psykern import NonFiniteError

    model = make_model(tmp_path, **CONFIGS["llama"])
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 1e5
    model.save_pretrained(tmp_path)
    planned = plan([whole(np.array([1, 7, 3], np.int32))], wave_tokens=8, batch_tokens=8)
    assert np.isfinite(Engine(Model(tmp_path, Compute.resolve("cpu", "bfloat16"))).run(planned).logprob).all()
    with pytest.raises(NonFiniteError, match="scores are not finite; this began in the embedding"):
        Engine(Model(tmp_path, Compute.resolve("cpu", "float16"))).run(planned)
