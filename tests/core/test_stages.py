"""Stages that overlap: order, bounds, errors and early leaving."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from psykern.core.stages import ahead, behind


def test_ahead_gives_all_items_in_order() -> None:
    with ahead(range(100), depth=3) as items:
        assert list(items) == list(range(100))


def test_ahead_computes_in_another_thread_while_the_caller_works() -> None:
    """The second item is there before the first is done with."""
    made = [threading.Event() for _ in range(2)]
    threads = set()

    def source() -> Iterator[int]:
        for i in range(2):
            threads.add(threading.current_thread())
            made[i].set()
            yield i

    with ahead(source()) as items:
        assert next(items) == 0
        assert made[1].wait(5)
    assert threading.current_thread() not in threads


def test_ahead_holds_a_bounded_number_of_items() -> None:
    made = 0

    def source() -> Iterator[int]:
        nonlocal made
        while True:
            made += 1
            yield made

    with ahead(source(), depth=2) as items:
        assert next(items) == 1
        time.sleep(0.2)
        assert made <= 1 + 2 + 1  # taken, waiting, in hand


def test_an_error_ahead_comes_where_its_item_would_have() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with ahead(source(), depth=5) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="broken"):
            next(items)


def test_leaving_ahead_early_closes_the_source_and_its_thread() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    with pytest.raises(KeyError), ahead(source()) as items:
        next(items)
        raise KeyError
    assert closed.is_set()
    assert threading.active_count() == before


def test_who_waits_for_an_item_of_what_was_left_is_told_that_there_is_none() -> None:
    waits = threading.Event()

    def source() -> Iterator[int]:
        waits.wait()
        yield 0

    with ahead(source()) as items:
        waiter = threading.Thread(target=lambda: list(items))
        waiter.start()
        waits.set()
    waiter.join(5)
    assert not waiter.is_alive()


def test_ctrl_c_while_it_is_left_leaves_no_thread_that_waits() -> None:
    before, go = set(threading.enumerate()), threading.Event()

    def source() -> Iterator[int]:
        yield 0
        go.wait(30)

    def join(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ahead(source()) as items, ahead(items) as others:
        next(others)
        for thread in set(threading.enumerate()) - before:
            thread.join = join  # type: ignore[method-assign]
    go.set()
    left = set(threading.enumerate()) - before
    for thread in left:
        threading.Thread.join(thread, 5)
    assert not any(thread.is_alive() for thread in left)


def test_ctrl_c_while_it_is_entered_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before, start = set(threading.enumerate()), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), ahead(itertools.count()):
        pass
    for thread in set(threading.enumerate()) - before:
        thread.join(1)
    assert set(threading.enumerate()) <= before


def test_behind_does_all_work_in_order_before_it_is_left() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.001)
        done.append(item)

    with behind(work) as put:
        for i in range(50):
            put(i)
    assert done == list(range(50))


def test_behind_holds_the_caller_back() -> None:
    go = threading.Event()

    def work(_: int) -> None:
        go.wait(5)

    with behind(work, depth=1) as put:
        caller = threading.Thread(target=lambda: [put(i) for i in range(5)])
        caller.start()
        caller.join(0.2)
        assert caller.is_alive()
        go.set()
        caller.join(5)
        assert not caller.is_alive()


def test_an_error_behind_is_raised_and_stops_the_work() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise OSError("disk full")
        done.append(item)

    with pytest.raises(OSError, match="disk full"), behind(work, depth=10) as put:
        for i in range(5):
            put(i)
    assert done == [0]


def test_the_callers_own_error_is_the_one_that_is_raised_and_what_was_put_is_done() -> None:
    done: list[int] = []
    with pytest.raises(KeyError), behind(done.append, depth=10) as put:
        put(1)
        put(2)
        raise KeyError
    assert done == [1, 2]
