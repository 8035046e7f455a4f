"""Layers in slots: what is fused, what is streamed, and what happens out of turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from torch import Tensor

from psykern.core.settings import Dtype
from psykern.kernels.compute import Compute
from psykern.models.model import Model
from psykern.models.slots import Layout, Slots, share_layouts

SHAPES: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj.weight": (8, 6),
    "self_attn.q_proj.bias": (8,),
    "self_attn.k_proj.weight": (4, 6),
    "self_attn.k_proj.bias": (4,),
    "self_attn.v_proj.weight": (4, 6),
    "self_attn.v_proj.bias": (4,),
    "mlp.gate_proj.weight": (5, 6),
    "mlp.up_proj.weight": (5, 6),
    "mlp.down_proj.weight": (6, 5),
    "input_layernorm.weight": (6,),
}
FUSED: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.kv_proj": ("self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
LAYOUT = Layout.of(SHAPES, FUSED)
NUM_LAYERS = 5
CPU = torch.device("cpu")


def read(index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def slots(num_slots: int) -> Slots:
    return Slots(read, [LAYOUT] * NUM_LAYERS, num_slots=num_slots, device=CPU, dtype=torch.float32)


def test_projections_of_one_input_are_one_matrix() -> None:
    tensors = LAYOUT.tensors(torch.arange(LAYOUT.size, dtype=torch.float32))
    for fused, parts in {"qkv_proj": "qkv", "kv_proj": "kv"}.items():
        for kind in ("weight", "bias"):
            apart = [tensors[f"self_attn.{part}_proj.{kind}"] for part in parts]
            assert torch.equal(tensors[f"self_attn.{fused}.{kind}"], torch.cat(apart))
    gate_up = torch.cat([tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]])
    assert torch.equal(tensors["mlp.gate_up_proj.weight"], gate_up)
    assert "mlp.gate_up_proj.bias" not in tensors


def test_no_two_tensors_overlap_and_all_begin_aligned() -> None:
    assert set(LAYOUT.names) == set(SHAPES)
    taken = torch.zeros(LAYOUT.size)
    for name in SHAPES:
        LAYOUT.tensors(taken)[name].add_(1)
    assert taken.max() == 1
    for name in ("self_attn.q_proj.weight", "self_attn.q_proj.bias", "mlp.gate_proj.weight", "input_layernorm.weight"):
        assert LAYOUT.views[name][0] % 128 == 0


@pytest.mark.parametrize("num_slots", [1, 2, 3, NUM_LAYERS, NUM_LAYERS + 1])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4] * 3, [3], [4, 0, 4, 0], [2, 2, 1, 0, 3], [0, 3, 1, 4, 4, 2]])
def test_every_layer_is_the_one_asked_for(num_slots: int, order: list[int]) -> None:
    held = slots(num_slots)
    assert held.is_resident == (num_slots >= NUM_LAYERS)
    for index in order:
        tensors = held.layer(index)
        for name, expected in read(index).items():
            assert torch.equal(tensors[name], expected.float())


WIDE = SHAPES | {"mlp.gate_proj.weight": (50, 6), "mlp.up_proj.weight": (50, 6), "mlp.down_proj.weight": (6, 50)}


def test_layers_of_a_kind_share_a_layout() -> None:
    narrow, wide, again, apart = share_layouts(
        [(SHAPES, FUSED), (WIDE, FUSED), (dict(SHAPES), dict(FUSED)), (SHAPES, {})]
    )
    assert again is narrow
    assert (narrow.size, wide.size) == (LAYOUT.size, Layout.of(WIDE, FUSED).size)
    assert narrow.size < wide.size
    assert "mlp.gate_up_proj.weight" in narrow.views and "mlp.gate_up_proj.weight" not in apart.views


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_slot_has_room_for_the_largest_kind_of_layer(num_slots: int) -> None:
    """Layers 1 and 2 are wide; a slot takes layers of both kinds, in turn."""
    kinds = [SHAPES, WIDE, WIDE, SHAPES]

    def by_kind(index: int) -> dict[str, Tensor]:
        return {name: torch.full(shape, index + i / 100) for i, (name, shape) in enumerate(kinds[index].items())}

    layouts = share_layouts((shapes, FUSED) for shapes in kinds)
    held = Slots(by_kind, layouts, num_slots=num_slots, device=CPU, dtype=torch.float32)
    for index in [0, 1, 2, 3] * 3:
        tensors = held.layer(index)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in by_kind(index).items())
        assert tensors["mlp.up_proj.weight"].untyped_storage().nbytes() == 4 * layouts[1].size
        assert tensors["mlp.gate_up_proj.weight"].shape == (2 * kinds[index]["mlp.up_proj.weight"][0], 6)


def test_a_resident_layer_is_read_once() -> None:
    asked: list[int] = []

    def counted(index: int) -> dict[str, Tensor]:
        asked.append(index)
        return read(index)

    held = Slots(counted, [LAYOUT] * 3, num_slots=3, device=CPU, dtype=torch.float32)
    for index in [0, 1, 2] * 4:
        held.layer(index)
    assert asked == [0, 1, 2]


def test_an_error_of_reading_is_raised_where_the_layer_is_asked_for() -> None:
    def broken(index: int) -> dict[str, Tensor]:
        if index == 1:
            raise OSError("the disk is gone")
        return read(index)

    held = Slots(broken, [LAYOUT] * 3, num_slots=2, device=CPU, dtype=torch.float32)
    held.layer(0)
    with pytest.raises(OSError, match="the disk is gone"):
        held.layer(1)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_maps_its_weights_and_copies_none(dtype: Dtype, stored: torch.dtype, tmp_path: Path) -> None:
    make_model(tmp_path, dtype=stored, **CONFIGS["llama"])
    mapped = Model(tmp_path, Compute.resolve("cpu", dtype))
    assert mapped.is_resident and mapped.layer(0, 1).mixer.fused is None
    one, two = mapped.tensors(0), mapped.tensors(0)
    assert all(one[name].data_ptr() == two[name].data_ptr() for name in one)


def test_the_reference_gets_one_layer_widened(tmp_path: Path) -> None:
    make_model(tmp_path, dtype=torch.bfloat16, **CONFIGS["llama"])
    widened = Model(tmp_path, Compute.resolve("cpu", backend="reference"))
    assert not widened.is_resident and widened.layer(0, 1).mixer.fused is None
    name = "mlp.up_proj.weight"
    assert widened.tensors(0)[name].data_ptr() == widened.tensors(1)[name].data_ptr()
