"""Ragged arrays against plain lists."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from psykern.core import csr

LISTS = {
    "nothing": [],
    "one-empty": [[]],
    "empty-at-the-ends": [[], [3, 1], [], [], [2], []],
    "usual": [[5], [4, 4], [7, 0, 2]],
}
each = pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)


def ragged(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([len(of) for of in lists], np.int64)
    return np.array([value for of in lists for value in of], np.int64), csr.offsets_of(counts)


@each
def test_offsets_say_where_each_list_is(lists: list[list[int]]) -> None:
    values, offsets = ragged(lists)
    assert offsets.dtype == np.int64
    assert [values[i:j].tolist() for i, j in itertools.pairwise(offsets.tolist())] == lists


@each
def test_places_count_within_each_list(lists: list[list[int]]) -> None:
    counts = np.array([len(of) for of in lists], np.int64)
    assert csr.places(counts).tolist() == [place for of in lists for place in range(len(of))]


def test_members_are_those_of_each_span_in_order() -> None:
    owner, member = csr.members(np.array([7, 3, 3, 0], np.int32), np.array([9, 3, 4, 2], np.int32))
    assert owner.tolist() == [0, 0, 2, 3, 3]
    assert member.tolist() == [7, 8, 3, 0, 1]


@each
def test_reduce_gives_zero_where_a_list_is_empty(lists: list[list[int]]) -> None:
    values, offsets = ragged(lists)
    assert csr.reduce(np.add, values, offsets).tolist() == [sum(of) for of in lists]
    assert csr.reduce(np.maximum, values, offsets).tolist() == [max(of, default=0) for of in lists]
    means = csr.reduce(np.add, values > 2, offsets, dtype=np.float64)
    assert means.dtype == np.float64 and means.tolist() == [sum(v > 2 for v in of) for of in lists]


def test_take_gives_lists_in_the_order_asked_for() -> None:
    values, offsets = ragged(LISTS["empty-at-the-ends"])
    taken, bounds = csr.take(values, offsets, np.array([4, 0, 1, 1]))
    assert taken.tolist() == [2, 3, 1, 3, 1] and bounds.tolist() == [0, 1, 1, 3, 5]


def test_concatenate_takes_nothing_too() -> None:
    assert csr.concatenate([], np.int32).dtype == np.int32
    joined = csr.concatenate((np.full((n, 2), n, np.int64) for n in (1, 0, 2)), np.int32)
    assert joined.dtype == np.int32 and joined.tolist() == [[1, 1], [2, 2], [2, 2]]
