"""csr.py against lists of Python: empty lists first, last and in a row, and no list at all."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from psykern.core import csr

LISTS = {
    "mixed": [[], [5, 3], [], [], [7], [1, 2, 9], []],
    "no empty one": [[4], [5, 6]],
    "all empty": [[], []],
    "none": [],
}


@pytest.fixture(params=LISTS)
def lists(request: pytest.FixtureRequest) -> list[list[int]]:
    return LISTS[request.param]


def as_csr(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return csr.concatenate(map(np.array, lists), np.int32), csr.offsets_of(
        np.array([len(of) for of in lists], np.int64)
    )


def as_lists(values: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [values[a:b].tolist() for a, b in pairwise(offsets)]


def test_lists_come_back(lists: list[list[int]]) -> None:
    values, offsets = as_csr(lists)
    assert (values.dtype, offsets.dtype) == (np.int32, np.int64)
    assert as_lists(values, offsets) == lists


def test_places(lists: list[list[int]]) -> None:
    found = csr.places(np.array([len(of) for of in lists], np.int32))
    assert found.dtype == np.int64
    assert found.tolist() == [place for of in lists for place in range(len(of))]


def test_members(lists: list[list[int]]) -> None:
    spans = [(10 * i, 10 * i + len(of)) for i, of in enumerate(lists)]
    starts, ends = np.array(spans, np.int32).reshape(-1, 2).T
    owner, member = csr.members(starts, ends)
    assert list(zip(owner.tolist(), member.tolist(), strict=True)) == [
        (i, m) for i, s in enumerate(spans) for m in range(*s)
    ]


@pytest.mark.parametrize("step", [1, -1, 2], ids=["all", "backwards", "every other"])
def test_take(lists: list[list[int]], step: int) -> None:
    chosen = np.arange(len(lists))[::step]
    assert as_lists(*csr.take(*as_csr(lists), chosen)) == lists[::step]
    twice = csr.take(*as_csr(lists), np.concatenate([chosen, chosen]))
    assert as_lists(*twice) == lists[::step] * 2


def test_reduce(lists: list[list[int]]) -> None:
    values, offsets = as_csr(lists)
    assert csr.reduce(np.add, values, offsets).tolist() == [sum(of) for of in lists]
    assert csr.reduce(np.maximum, values, offsets).tolist() == [max(of, default=0) for of in lists]
    shares = csr.reduce(np.add, values > 4, offsets, np.float64)
    assert shares.dtype == np.float64
    assert shares.tolist() == [sum(value > 4 for value in of) for of in lists]


def test_reduce_ignores_values_behind_the_last_list() -> None:
    assert csr.reduce(np.add, np.array([1, 2, 100]), np.array([0, 1, 2])).tolist() == [1, 2]
