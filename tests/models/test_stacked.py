"""Experts that a file has in one tensor a layer are those that a file has one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import CONFIGS, make_model
from support.groups import encoded

from psykern.core.errors import CheckpointError
from psykern.engine.engine import Engine
from psykern.engine.plan import plan
from psykern.kernels.compute import Compute
from psykern.models.experts import Experts
from psykern.models.model import Model

E, F, D = 8, 48, 64
LAYER = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    make_model(folder, **CONFIGS["qwen3-moe"])
    return folder


def stack(folder: Path, target: Path, *, transposed: bool) -> dict[str, torch.Tensor]:
    """The checkpoint with its experts stacked, written to ``target``."""
    tensors = load_file(folder / "model.safetensors")
    for begin in sorted({name.partition("experts.")[0] + "experts." for name in tensors if "experts." in name}):
        of = {
            part: torch.stack([tensors.pop(f"{begin}{expert}.{part}_proj.weight") for expert in range(E)])
            for part in ("gate", "up", "down")
        }
        both = {"gate_up_proj": torch.cat([of["gate"], of["up"]], dim=1), "down_proj": of["down"]}
        for name, weight in both.items():
            tensors[begin + name] = (weight.transpose(1, 2) if transposed else weight).contiguous()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors")
    return tensors


def experts(folder: Path, num_slots: int | None = None) -> tuple[Model, Experts]:
    model = Model(folder, Compute.resolve("cpu"), num_slots=num_slots)
    ffn = model.layer(1, 1).ffn
    assert isinstance(ffn, Experts)
    return model, ffn


@pytest.mark.parametrize("transposed", [False, True], ids=["as-computed", "as-Qwen3-VL"])
@pytest.mark.parametrize("num_slots", [None, 2], ids=["mapped", "slots"])
def test_stacked_experts_are_the_same(folder: Path, tmp_path: Path, transposed: bool, num_slots: int | None) -> None:
    stack(folder, tmp_path, transposed=transposed)
    (model, one), (_, other) = experts(tmp_path, num_slots), experts(folder)
    assert (num_slots is None and not transposed) == model.is_resident
    for mine, theirs in ((one.gates, other.gates), (one.ups, other.ups), (one.downs, other.downs)):
        assert len(mine) == E
        assert all(map(torch.equal, mine, theirs))


def test_stacks_of_one_file_are_not_copied(folder: Path, tmp_path: Path) -> None:
    stack(folder, tmp_path, transposed=False)
    _, ffn = experts(tmp_path)
    _, again = experts(tmp_path)
    assert ffn.gates[0].data_ptr() + 4 * F * D == ffn.ups[0].data_ptr()
    assert ffn.gates[1].data_ptr() - ffn.gates[0].data_ptr() == 4 * 2 * F * D
    assert again.gates[0].data_ptr() != ffn.gates[0].data_ptr()  # another mapping


def test_what_is_made_anew_is_kept_once_it_is_held_and_there_is_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack(folder, tmp_path, transposed=True)
    name, mapped = "mlp.experts.3.up_proj.weight", "mlp.gate.weight"
    model = Model(tmp_path, Compute.resolve("cpu"))
    assert model.tensors(1)[name].data_ptr() != model.tensors(1)[name].data_ptr()
    needed = 3 * 3 * E * F * D * 4
    for free, held in ((needed, False), (int(needed / 0.4) + 1, True)):
        monkeypatch.setattr("psykern.models.model.free_bytes", lambda device, free=free: free)
        model.hold()
        assert model.is_resident == held
        one, other = model.tensors(1), model.tensors(1)
        assert (one[name].data_ptr() == other[name].data_ptr()) == held
        assert one[mapped].data_ptr() == other[mapped].data_ptr()
    assert model.layer(1, 9).mixer.q is not model.layer(1, 99).mixer.q
    assert model.layer(1, 9).ffn.ups[3].data_ptr() == one[name].data_ptr()
    model = Model(folder, Compute.resolve("cpu"))
    model.hold()
    assert model.is_resident and not model._held, "what is mapped is not copied"


def test_small_plans_and_sessions_hold_what_is_made(folder: Path, tmp_path: Path) -> None:
    stack(folder, tmp_path, transposed=True)
    for rows, held in ((1500, False), (900, True)):
        engine = Engine(Model(tmp_path, Compute.resolve("cpu")))
        engine.run(
            plan([encoded([i % 320 for i in range(rows)], [(rows - 1, rows)])], wave_tokens=2048, batch_tokens=256)
        )
        assert engine.model.is_resident == held


def test_a_stack_without_the_other_is_named(folder: Path, tmp_path: Path) -> None:
    tensors = stack(folder, tmp_path, transposed=False)
    del tensors[f"{LAYER}down_proj"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{LAYER}gate_up_proj \[8, 96, 64\], {LAYER}down_proj is missing"):
        experts(tmp_path)


@pytest.mark.parametrize("sizes", [(E, D, F), (E, D, F + 1), (E + 1, F, D)], ids=["other-way", "wider", "more"])
def test_a_stack_of_another_shape_is_named(folder: Path, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    tensors = stack(folder, tmp_path, transposed=True)
    tensors[f"{LAYER}down_proj"] = torch.zeros(sizes)
    save_file(tensors, tmp_path / "model.safetensors")
    got = str(list(sizes)).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(
        CheckpointError, match=rf"expected \[8, 96, 64\] and \[8, 64, 48\], or .*{LAYER}down_proj {got}$"
    ):
        experts(tmp_path)


def test_an_expert_too_few_is_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{LAYER}7.up_proj.weight"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"missing tensors: {LAYER}7\.up_proj\.weight$"):
        experts(tmp_path)
