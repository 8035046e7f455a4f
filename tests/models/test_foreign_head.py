"""When a head of transformers is a product with one weight and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.foreign_folders import make_foreign

from psykern.kernels.compute import Compute
from psykern.models.foreign.head import OwnLogits, PlainHead
from psykern.models.foreign.model import ForeignModel
from psykern.models.weights import ModelFolder

SIZES: dict[str, Any] = {
    **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("cap", "head"), [(None, PlainHead), (300.0, OwnLogits)], ids=["none", "far above the logits"])
def test_a_soft_cap_shows_however_small_the_logits_are(
    cap: float | None, head: type, dtype: Any, tmp_path: Path
) -> None:
    make_foreign(tmp_path, model_type="gemma2", final_logit_softcapping=cap, **SIZES)
    model = ForeignModel(ModelFolder(tmp_path), Compute.resolve("cpu", dtype))
    assert isinstance(model._head, head)


def test_half_precision_rounds_no_logit(tmp_path: Path) -> None:
    made = make_foreign(tmp_path, model_type="cohere", logit_scale=0.3, **SIZES)
    model = ForeignModel(ModelFolder(tmp_path), Compute.resolve("cpu", "bfloat16"))
    hidden = torch.randn(7, SIZES["hidden_size"]).bfloat16()
    logits = torch.empty(7, SIZES["vocab_size"])
    model.logits(hidden, logits)
    expected = 0.3 * (hidden.double() @ made.get_output_embeddings().weight.bfloat16().double().T)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-6)
