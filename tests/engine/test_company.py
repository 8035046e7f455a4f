"""On a CPU no score depends on its company: equal to the bit whatever is computed beside it, in which order, with which
budgets, shared or not, on how many threads, in one plan or extended piece by piece.

All of it is psykern's own arithmetic there, whose sums have one order. (Other backends take vendors' products, which
may round otherwise with other numbers of rows.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import CONFIGS, make_model
from support.groups import encoded, random_group

from psykern.core.types import EncodedTranscript, TargetScores, Wanted
from psykern.engine.budgets import Budgets
from psykern.engine.engine import Engine
from psykern.engine.plan import plan, scores_of_each
from psykern.kernels.compute import Compute
from psykern.models.model import Model

WANTED = Wanted(rank=True, top_k=3)
# The last two are longer than a block of keys and share a front that ends within the second.
_FRONT = np.random.default_rng(6).integers(320, size=400).tolist()
GROUP = [
    *random_group(np.random.default_rng(5), 6, 320, options=3),
    *(encoded([*_FRONT, *([token] * 290)], [(100, 101), (380, 420), (600, 690)]) for token in (7, 8)),
]


@pytest.fixture(
    scope="module",
    params=[("qwen3", "float32"), ("olmo3-yarn", "float32"), ("llama", "bfloat16"), ("qwen3-moe", "float32")],
    ids=str,
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    name, dtype = request.param
    folder = tmp_path_factory.mktemp(name)
    make_model(folder, **CONFIGS[name])
    return Engine(Model(folder, Compute.resolve("cpu", dtype)))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scores(
    engine: Engine, group: list[EncodedTranscript], *, wave: int = 4096, batch: int = 512, share: int = 4
) -> list[TargetScores]:
    of = plan(group, wave_tokens=wave, batch_tokens=batch, min_share=share, wanted=WANTED)
    return list(scores_of_each(group, engine.run(of)))


def assert_equal(got: TargetScores, want: TargetScores) -> None:
    for field in fields(TargetScores):
        one, other = getattr(got, field.name), getattr(want, field.name)
        assert (one is None) is (other is None)
        assert one is None or one.tobytes() == other.tobytes(), field.name


@pytest.mark.usefixtures("threads")
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(st.integers(0, len(GROUP) - 1), min_size=1, max_size=6, unique=True),
    wave=st.integers(1, 600),
    batch=st.integers(1, 300),
    share=st.sampled_from([1, 4, 10**6]),
    num_threads=st.integers(1, 3),
)
def test_company_does_not_change_a_bit(
    engine: Engine, members: list[int], wave: int, batch: int, share: int, num_threads: int
) -> None:
    torch.set_num_threads(1)
    alone = {i: scores(engine, [GROUP[i]])[0] for i in members}
    torch.set_num_threads(num_threads)
    together = scores(engine, [GROUP[i] for i in members], wave=wave, batch=batch, share=share)
    for i, got in zip(members, together, strict=True):
        assert_equal(got, alone[i])


@settings(max_examples=5, deadline=None)
@given(members=st.lists(st.integers(0, len(GROUP) - 1), min_size=1, max_size=4), batch=st.integers(1, 100))
def test_what_is_extended_is_what_is_planned(engine: Engine, members: list[int], batch: int) -> None:
    """Keys and values of before are used where a sequence goes on, wherever their pages stand."""
    for i in members:
        got = engine.extend([GROUP[i]], Budgets(wave_tokens=512, batch_tokens=batch), wanted=WANTED)
        assert_equal(got[0], scores(engine, [GROUP[i]])[0])
