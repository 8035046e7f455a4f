"""Rotary embeddings against transformers' own modules: frequencies, scaling, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import YARN_ROPE, make_model
from support.configs import (
    OLD_LLAMA3,
    OLD_YARN,
    ROPES,
    THETA,
    assert_rope,
    read_both,
    ropes_of,
    rotary_of,
    write,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from psykern.kernels.compute import Compute
from psykern.models.families import read_spec
from psykern.models.model import Model

each_rope = pytest.mark.parametrize("parameters", ROPES.values(), ids=ROPES)


@each_rope
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "olmo2"])
@pytest.mark.parametrize("style", ["old", "new"])
def test_rope_equals_transformers(style: str, model_type: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    """Old: rope_theta beside rope_scaling. New: rope_parameters with both."""
    if style == "old":
        rope: dict[str, Any] = {"rope_theta": THETA, "rope_scaling": parameters}
    else:
        rope = {"rope_parameters": parameters | {"rope_theta": THETA}}
    spec, theirs = read_both(tmp_path, model_type=model_type, **rope)
    (ours,) = set(ropes_of(spec))
    assert_rope(ours, *rotary_of(theirs, "full_attention"))
    if parameters["rope_type"] != "default":  # transformers' table of functions has no entry for it
        assert_rope(ours, *ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, torch.device("cpu")))


@each_rope
def test_old_and_new_style_are_one_rope(parameters: dict[str, Any], tmp_path: Path) -> None:
    old = {"rope_theta": THETA, "rope_scaling": parameters}
    older = {"rope_theta": THETA, "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in parameters.items()}}
    new = {"rope_parameters": parameters | {"rope_theta": THETA}}
    ropes = {ropes_of(read_spec(write(tmp_path, model_type="qwen2", **rope))) for rope in (old, older, new)}
    assert len(ropes) == 1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": THETA, "rope_scaling": OLD_YARN},
        {"rope_theta": THETA, "rope_scaling": None},
        {
            "rope_parameters": {
                "full_attention": YARN_ROPE | {"rope_theta": THETA},
                "sliding_attention": {"rope_type": "default", "rope_theta": THETA},
            }
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 2e5, "factor": 3.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ],
    ids=["old-yarn", "old-default", "nested-yarn", "nested-two-thetas"],
)
def test_olmo3_scales_its_full_layers_only(rope: dict[str, Any], tmp_path: Path) -> None:
    spec, theirs = read_both(tmp_path, model_type="olmo3", sliding_window=16, **rope)
    assert theirs.layer_types == ["sliding_attention"] * 3 + ["full_attention"] + theirs.layer_types[4:]
    for i, kind in enumerate(theirs.layer_types):
        assert_rope(ropes_of(spec)[i], *rotary_of(theirs, kind))


def test_original_length_beside_the_rope_goes_before_that_within(tmp_path: Path) -> None:
    spec, theirs = read_both(
        tmp_path, model_type="llama", original_max_position_embeddings=128, rope_theta=THETA, rope_scaling=OLD_LLAMA3
    )
    assert_rope(ropes_of(spec)[0], *rotary_of(theirs, "full_attention"))


@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_rotary_tables_equal_transformers_and_grow(name: str, tmp_path: Path) -> None:
    """The tables of a layer: asked for few positions, then for more, then for few again."""
    oracle = make_model(tmp_path, model_type="llama", rope_parameters=ROPES[name] | {"rope_theta": THETA})
    model = Model(tmp_path, Compute.resolve("cpu"))
    for num_positions in (5, 300, 7):
        cos, sin = model.layer(1, num_positions).mixer.rotary
        assert len(cos) >= num_positions
        expected = oracle.model.rotary_emb(torch.zeros(1), torch.arange(len(cos))[None])
        for table, theirs in zip((cos, sin), expected, strict=True):
            torch.testing.assert_close(table, theirs[0, :, : cos.shape[1]], rtol=0, atol=1e-6)
