"""The queue on its own: what is computed together, in which order, and whose fault and whose cancelling is whose."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from psykern import InterruptedRun, PsykernError
from psykern.scoring.queue import Queue, give_up


@dataclass(eq=False)
class Doubling:
    """Doubles numbers, one batch at a time; waits for ``gate`` first. Negative numbers are refused."""

    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    batches: list[list[int]] = field(default_factory=list)
    stopped: list[list[int]] = field(default_factory=list)

    def compute(self, items: Sequence[int], stop: Callable[[], bool]) -> list[int]:
        self.batches.append(list(items))
        self.begun.set()
        while not self.gate.wait(0.001):
            if stop():
                self.stopped.append(list(items))
                raise InterruptedRun("nobody waits")
        if any(item < 0 for item in items):
            raise ValueError(f"negative: {items}")
        return [2 * item for item in items]


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue(most_tokens=100, window=0.01)
    yield queue
    queue.close()


@pytest.fixture
def doubling() -> Doubling:
    open_gate = Doubling()
    open_gate.gate.set()
    return open_gate


def busy(queue: Queue) -> tuple[Doubling, object]:
    """A batch that is being computed until its gate is opened."""
    first = Doubling()
    request = queue.submit(first, 0, 1, patient=False)
    assert first.begun.wait(10)
    return first, request


def test_a_caller_gets_its_own_result(queue: Queue, doubling: Doubling) -> None:
    assert [queue.result(doubling, item, 1) for item in (1, 2, 3)] == [2, 4, 6]
    assert doubling.batches == [[1], [2], [3]]


def test_what_arrives_meanwhile_is_one_batch_in_order(queue: Queue, doubling: Doubling) -> None:
    first, _ = busy(queue)
    requests = [queue.submit(doubling, item, 10) for item in range(7)]
    first.gate.set()
    assert [request.future.result(10) for request in requests] == [0, 2, 4, 6, 8, 10, 12]
    assert doubling.batches == [[0, 1, 2, 3, 4, 5, 6]]


def test_a_batch_ends_at_the_limit_of_tokens_and_nobody_overtakes(queue: Queue, doubling: Doubling) -> None:
    first, _ = busy(queue)
    requests = [queue.submit(doubling, item, tokens) for item, tokens in enumerate((60, 30, 20, 5, 1000))]
    first.gate.set()
    for request in requests:
        request.future.result(10)
    assert doubling.batches == [[0, 1], [2, 3], [4]]  # 3 would have fitted the first batch; 4 is more than the limit


def test_other_kinds_wait_their_turn(queue: Queue, doubling: Doubling) -> None:
    other = Doubling()
    other.gate.set()
    order: list[int] = []
    first, _ = busy(queue)
    requests = [queue.submit(kind, item, 1) for item, kind in enumerate((doubling, other, doubling, other))]
    for request in requests:
        request.future.add_done_callback(lambda future: order.append(future.result()))
    first.gate.set()
    for request in requests:
        request.future.result(10)
    assert doubling.batches == [[0, 2]]
    assert other.batches == [[1, 3]]
    assert order == [0, 4, 2, 6]  # the kind of the one that waited longest goes first


def test_the_fault_of_one_is_not_that_of_others(queue: Queue, doubling: Doubling) -> None:
    first, _ = busy(queue)
    requests = [queue.submit(doubling, item, 1) for item in (5, -1, 7)]
    first.gate.set()
    assert requests[0].future.result(10) == 10
    assert requests[2].future.result(10) == 14
    with pytest.raises(ValueError, match=r"negative: \[-1\]"):
        requests[1].future.result(10)


def test_a_waiting_request_can_be_cancelled(queue: Queue, doubling: Doubling) -> None:
    first, _ = busy(queue)
    requests = [queue.submit(doubling, item, 1) for item in (1, 2, 3)]
    give_up(requests[1])
    first.gate.set()
    assert [requests[i].future.result(10) for i in (0, 2)] == [2, 6]
    with pytest.raises(CancelledError):
        requests[1].future.result(10)
    assert doubling.batches == [[1, 3]]


def test_a_batch_stops_only_where_nobody_waits_for_any_of_it(queue: Queue) -> None:
    shut = Doubling()
    requests = [queue.submit(shut, item, 1) for item in (1, 2)]
    assert shut.begun.wait(10)
    give_up(requests[0])
    time.sleep(0.05)
    assert shut.stopped == []
    give_up(requests[1])
    with pytest.raises(InterruptedRun):
        requests[1].future.result(10)
    assert shut.stopped[0] == [1, 2]


def test_threads_wait_for_each_other(queue: Queue, doubling: Doubling) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda item: queue.result(doubling, item, 1), range(200))) == [2 * i for i in range(200)]
    assert len(doubling.batches) < 100
    assert sorted(item for batch in doubling.batches for item in batch) == list(range(200))


def test_a_caller_that_is_alone_does_not_wait() -> None:
    queue, doubling = Queue(most_tokens=100, window=5.0), Doubling()
    doubling.gate.set()
    start = time.monotonic()
    assert queue.result(doubling, 3, 1) == 6
    assert time.monotonic() - start < 2.0
    queue.close()


def test_asyncio_tasks_are_merged_and_cancelled(queue: Queue, doubling: Doubling) -> None:
    async def many() -> list[int | BaseException]:
        tasks = [asyncio.create_task(queue.wait(doubling, item, 1)) for item in range(30)]
        await asyncio.sleep(0)
        tasks[4].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(many())
    assert isinstance(results.pop(4), asyncio.CancelledError)
    assert results == [2 * item for item in range(30) if item != 4]
    assert doubling.batches == [[item for item in range(30) if item != 4]]


def test_a_task_that_is_cancelled_while_it_is_computed_stops_it(queue: Queue) -> None:
    shut = Doubling()

    async def one() -> None:
        task = asyncio.create_task(queue.wait(shut, 1, 1))
        while not shut.begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(one())
    queue.close()
    assert shut.stopped == [[1]]


def test_closing_ends_what_is_in_hand_and_fails_the_rest(queue: Queue, doubling: Doubling) -> None:
    first, request = busy(queue)
    waiting = queue.submit(doubling, 1, 1)
    closing = threading.Thread(target=queue.close)
    closing.start()
    with pytest.raises(PsykernError, match="closed"):
        waiting.future.result(10)
    first.gate.set()
    closing.join(10)
    assert request.future.result(10) == 0  # type: ignore[attr-defined]
    with pytest.raises(PsykernError, match="closed"):
        queue.result(doubling, 1, 1)
    queue.close()


def test_python_may_end_while_something_is_computed() -> None:
    """As after Ctrl-C: a thread that is ended in C++ would end the process by SIGABRT."""
    script = (
        "import threading, psykern\n"
        "from psykern import demo\n"
        "scorer = psykern.load(demo.MODEL, device='cpu', wave_tokens=2000)\n"
        "texts = [f'{i} ' + 'You press J. You win. ' * 100 for i in range(300)]\n"
        "begun, compute = threading.Event(), scorer.engine._launch\n"
        "scorer.engine._launch = lambda *of: begun.set() or compute(*of)\n"
        "threading.Thread(target=scorer.surprisal, args=[texts], daemon=True).start()\n"
        "assert begun.wait(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "terminate" in ended.stderr) == (0, False), ended.stderr
