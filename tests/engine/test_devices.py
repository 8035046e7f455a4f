"""A wave on a device, without one: torch's ``meta`` device stands for it, whose tensors have shapes and no numbers.

It is shown that no operation is given tensors of two devices, and that between the upload of a wave and its scores
nothing asks the device for a number, for which the host would wait. What is computed is not shown here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from support.groups import random_group
from torch import Tensor
from torch.overrides import TorchFunctionMode

from psykern.core.types import TargetScores
from psykern.engine.engine import Engine
from psykern.engine.plan import plan
from psykern.kernels import dispatch, reference
from psykern.kernels.compute import Compute
from psykern.models.model import Model

WAITS = {"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "__bool__", "__int__", "__index__"}
META = torch.device("meta")


class LikeADevice(TorchFunctionMode):
    """Of each call of torch in this thread it checks the devices. Uploads to ``meta`` are torch's own; what comes back
    is an array of ones."""

    def __torch_function__(
        self, called: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(called, "__name__", "")
        tensors = list(_tensors([*args, *kwargs.values()]))
        kinds = {tensor.device.type for tensor in tensors if tensor.dim()}
        if name == "pin_memory":
            return args[0]
        if name == "to" and kinds == {"meta"} and args[1] == "cpu":
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        assert len(kinds) < 2, f"{name} of tensors on {sorted(kinds)}"
        assert not (name in WAITS and any(t.device == META for t in tensors)), f"the host waits for {name}"
        return called(*args, **kwargs)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        found += [value] if isinstance(value, Tensor) else _tensors(value) if isinstance(value, (list, tuple)) else []
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """In place of the reference, whose loops ask for numbers of its inputs; a kernel does not."""
    assert q.device == k.device == v.device == others[-1].device
    return others[-1]


def score(hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    assert hidden.device == weight.device == token_offsets.device == token_ids.device
    lse, entropy = hidden.new_empty((2, len(hidden)), dtype=torch.float32)
    logits = hidden.new_empty(len(token_ids), dtype=torch.float32)
    return lse, logits, hidden.new_empty(len(hidden), dtype=torch.int64), entropy


def run(folder: Path, dtype: torch.dtype, num_slots: int | None) -> TargetScores:
    with LikeADevice():
        engine = Engine(Model(folder, Compute(META, dtype, "reference"), num_slots=num_slots))
        group = random_group(np.random.default_rng(5), 10, 320, 3)
        for wave_tokens in (4096, 64):  # one wave, and many that carry prefixes
            scores = engine.run(plan(group, wave_tokens=wave_tokens, batch_tokens=512, min_share=4))
        return scores


@pytest.mark.parametrize("num_slots", [None, 2], ids=["resident", "streamed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", ["qwen3", "olmo3", "qwen2-window"])
def test_a_wave_stays_on_its_device_and_nobody_waits_for_it(
    family: str, dtype: torch.dtype, num_slots: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "is_traced", lambda x: False)  # the reference itself runs on this device
    monkeypatch.setattr(reference, "prefix_attention", attend)
    monkeypatch.setattr(reference, "option_logprobs", score)
    make_model(tmp_path, dtype=torch.bfloat16, **CONFIGS[family])
    assert run(tmp_path, dtype, num_slots).logprob.all()


def test_a_wait_and_a_tensor_left_behind_are_seen() -> None:
    x, here = torch.empty(3, device=META), torch.ones(3)
    with LikeADevice():
        with pytest.raises(AssertionError, match="the host waits for item"):
            x.sum().item()
        with pytest.raises(AssertionError, match=r"on \['cpu', 'meta'\]"):
            torch.add(x, here)
