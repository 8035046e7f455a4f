"""The bookkeeping of pages against what it must mean: a row that is found for a token was given to that token behind
exactly these tokens, and what is in use is there."""

from __future__ import annotations

import numpy as np
import pytest

from psykern.engine.page_tree import PageTree


class Rows:
    """Plain Python: what the rows of a store hold. A token is known by all tokens up to it."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.tree = PageTree(num_pages, page_tokens)
        self.holds: dict[int, tuple[int, ...]] = {}

    def match(self, tokens: list[int]) -> int:
        past = self.tree.match(np.array(tokens, np.int32))
        rows = [row for begin, end in past.key_ranges for row in range(begin, end)]
        assert len(rows) == past.length <= len(tokens)
        assert [self.holds[row] for row in rows] == [tuple(tokens[: k + 1]) for k in range(past.length)]
        assert all(a[1] != b[0] for a, b in zip(past.key_ranges, past.key_ranges[1:], strict=False)), "merged"
        return past.length

    def insert(self, tokens: list[int], known: int) -> None:
        rows = self.tree.insert(np.array(tokens, np.int32)).tolist()
        assert len(rows) == len(tokens) - known
        assert all(0 <= row < self.tree.num_pages * self.tree.page_tokens for row in rows)
        for k, row in enumerate(rows, known):
            self.holds[row] = tuple(tokens[: k + 1])


def grown(rng: np.random.Generator, held: list[list[int]], vocabulary: int) -> list[int]:
    """A sequence that begins like an earlier one, or like nothing."""
    base = held[rng.integers(len(held))] if held and rng.random() < 0.9 else []
    cut = len(base) if rng.random() < 0.5 else int(rng.integers(len(base) + 1))
    return base[:cut] + rng.integers(vocabulary, size=rng.integers(0, 12)).tolist()


def common(one: list[int], two: list[int]) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


@pytest.mark.parametrize("page_tokens", [1, 3, 8])
@pytest.mark.parametrize("vocabulary", [2, 50])
def test_with_room_everything_is_found_and_nothing_is_held_twice(page_tokens: int, vocabulary: int) -> None:
    rng = np.random.default_rng([page_tokens, vocabulary])
    rows, held = Rows(5000, page_tokens), list[list[int]]()
    for _ in range(300):
        tokens = grown(rng, held, vocabulary)
        rows.tree.tick()
        known = rows.match(tokens)
        assert known == max((common(tokens, other) for other in held), default=0)
        assert rows.tree.make_room(len(tokens) - known)
        rows.insert(tokens, known)
        assert rows.match(tokens) == len(tokens)
        held.append(tokens)
    assert len(rows.holds) == len({tuple(tokens[: k + 1]) for tokens in held for k in range(len(tokens))})


@pytest.mark.parametrize("num_pages", [0, 1, 4, 20])
def test_what_is_given_up_is_gone_and_what_is_in_use_stays(num_pages: int) -> None:
    rng = np.random.default_rng(num_pages)
    rows, held = Rows(num_pages, 4), list[list[int]]()
    given_up = refused = 0
    for _ in range(400):
        rows.tree.tick()
        in_use: list[tuple[list[int], int]] = []
        for _ in range(rng.integers(1, 4)):  # sequences of one call
            tokens = grown(rng, held, 3)[-30:]
            known = rows.match(tokens)
            in_use.append((tokens[:known], known))
            free = rows.tree.num_free
            if not rows.tree.make_room(len(tokens) - known):
                refused += 1
                continue
            given_up += rows.tree.num_free > free
            in_use.append((tokens, len(tokens)))
            held = [*held[-8:], tokens]
        for tokens, known in in_use:
            if known == len(tokens) and tokens in held:
                rows.insert(tokens, rows.match(tokens))
        for tokens, known in in_use:
            assert rows.match(tokens) >= known
    assert refused if num_pages < 20 else given_up > 50


def test_what_was_used_last_stays() -> None:
    rows = Rows(3, 4)
    for first in (10, 20, 30):
        rows.tree.tick()
        assert rows.tree.make_room(4)
        rows.insert([first] * 4, 0)
    rows.tree.tick()
    assert rows.match([10] * 4) == 4
    rows.tree.tick()
    assert rows.tree.make_room(1)
    rows.insert([40], 0)
    assert [rows.match([first] * 4) for first in (10, 20, 30)] == [4, 0, 4]


def test_the_end_of_a_path_goes_before_what_it_hangs_on() -> None:
    rows = Rows(3, 4)
    rows.tree.tick()
    assert rows.tree.make_room(12)
    rows.insert(list(range(12)), 0)
    rows.tree.tick()
    assert rows.tree.make_room(4)
    assert rows.match(list(range(12))) == 8


def test_what_is_not_enough_is_not_given_up_and_one_path_goes_before_another() -> None:
    rows = Rows(7, 4)
    for first in (0, 100):  # three pages each
        rows.tree.tick()
        assert rows.tree.make_room(12)
        rows.insert(list(range(first, first + 12)), 0)
    rows.tree.tick()
    assert rows.match(list(range(4))) == 4, "in use, while what comes behind is not"
    assert not rows.tree.make_room(28)
    assert (rows.tree.num_free, rows.match(list(range(100, 112)))) == (1, 12)
    rows.tree.tick()
    assert rows.tree.make_room(12)
    assert rows.match(list(range(12))) == 4
    assert rows.match(list(range(100, 112))) == 12


def test_promises_of_one_tick_add_up() -> None:
    rows = Rows(3, 4)
    assert rows.tree.make_room(5)
    assert not rows.tree.make_room(5)
    assert rows.tree.make_room(4)
    rows.tree.tick()
    assert rows.tree.make_room(12)
