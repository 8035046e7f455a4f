"""How a scorer ends: closed by several, dropped, with its process, and in a fork of that."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

import psykern
from psykern import PsykernError, Settings, demo

CONTEXT = "You see a red light. You press <<"
ROWS = [{"text": f"You see {i}. You press <<A>>."} for i in range(40)]


def test_one_that_is_dropped_takes_its_model_and_thread_along() -> None:
    before = set(threading.enumerate())
    scorer = psykern.load(demo.MODEL, device="cpu")
    scorer.choose(CONTEXT, ["A", "B"])
    scorer.session(CONTEXT).choose(["A", "B"])
    model = weakref.ref(scorer.model)
    del scorer
    gc.collect()
    assert model() is None
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name == "psykern"] == []


def test_several_threads_may_close_it() -> None:
    for _ in range(5):
        scorer, barrier = psykern.load(demo.MODEL, device="cpu"), threading.Barrier(4)
        scorer.choose(CONTEXT, ["A", "B"])

        def close(scorer: psykern.Scorer = scorer, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            scorer.close()

        with ThreadPoolExecutor(4) as pool:
            for closing in [pool.submit(close) for _ in range(4)]:
                closing.result(10)


def test_a_closed_one_can_be_shown_and_a_stream_of_its_records_ends() -> None:
    scorer = psykern.load(demo.MODEL, device="cpu")
    model = weakref.ref(scorer.model)
    stream = scorer.score(ROWS, Settings(unit_tokens=20), stream=True)
    next(stream)
    assert repr(scorer) == f"<Scorer of {demo.MODEL}>"
    scorer.close()
    assert repr(scorer) == f"<Scorer of {demo.MODEL}, closed>"
    with pytest.raises(PsykernError, match="the scorer is closed"):
        list(stream)
    gc.collect()
    assert model() is None


def _use_in_fork(scorer: psykern.Scorer, errors: multiprocessing.SimpleQueue[str]) -> None:
    for use in (lambda: scorer.choose(CONTEXT, ["A", "B"]), lambda: scorer.score(ROWS), scorer.close):
        try:
            use()
        except PsykernError as error:
            errors.put(str(error))
        else:
            errors.put("")


def test_a_fork_is_refused_whatever_was_under_way() -> None:
    fork = multiprocessing.get_context("fork")
    with psykern.load(demo.MODEL, device="cpu") as scorer:
        scorer.choose(CONTEXT, ["A", "B"])
        errors = fork.SimpleQueue()
        with scorer._queue._changed, scorer.engine._lock:  # held for ever in the fork
            process = fork.Process(target=_use_in_fork, args=(scorer, errors))
            process.start()
        process.join(60)
        assert process.exitcode == 0
        told = [errors.get() for _ in range(3)]
        assert all("of which this is a fork; load the model in this one" in error for error in told[:2])
        assert told[2] == "", "it may be closed"
        scorer.choose(CONTEXT, ["A", "B"])


PROGRAM = f"""
import threading, time, psykern
scorer = psykern.load({str(demo.MODEL)!r}, device="cpu")
def ask(i):
    while True:
        scorer.choose(str(i) + {CONTEXT!r} * 30, ["A", "B"])
for i in range(20):
    threading.Thread(target=ask, args=(i,), daemon=True).start()
time.sleep(0.3)
"""


def test_a_process_ends_in_peace_while_something_is_computed_and_something_waits() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
