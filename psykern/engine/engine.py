"""Runs plans: wave by wave, as ``run_wave`` computes one, and their scores in order.

    lay out ─► launch ─► collect ─► give

While a device computes one wave, a thread lays out the next, the host launches it, and the scores of the last go where
they belong: also from one plan to the next. On a CPU nothing is in flight.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from psykern.core.errors import InterruptedRun
from psykern.core.stages import ahead
from psykern.core.types import NOTHING_MORE, Targeted, TargetScores, Wanted
from psykern.engine.budgets import Budgets, cost
from psykern.engine.checks import check_finite, check_fits, memory_errors
from psykern.engine.extend import Extension, without_pages
from psykern.engine.foreign import PathTokens, run_foreign_wave
from psykern.engine.pages import LANDING_ROWS, Pages, suitable_bytes
from psykern.engine.plan import Plan, Wave
from psykern.engine.readout import Readout
from psykern.engine.store import AllLayers, OneLayer, Store
from psykern.engine.watch import DeviceClock, Watch
from psykern.engine.wave import Launched, run_wave
from psykern.models.batch import Scratch
from psykern.models.foreign.model import ForeignModel
from psykern.models.model import Model
from psykern.models.slots import free_bytes


class Planned(Protocol):
    """What :meth:`Engine.pairs` takes: a plan, and whom to tell how far it is."""

    @property
    def plan(self) -> Plan: ...
    @property
    def progress(self) -> Callable[[float], None]:
        """Told the share of the plan's rows that is done, from 0 to 1."""


T = TypeVar("T", bound=Planned)
_FEW_ROWS = 1024  # computing so many takes about as long as making a layer's weights
_STOPPED = "stopped as asked; nothing of it is left"


class Engine:
    """Computes with one model; it keeps the arrays that a layer needs from plan to plan.

    Several threads may use it: their waves take turns, as a layer's weights and those arrays serve one wave at a time.
    """

    def __init__(self, model: Model | ForeignModel, *, session_bytes: int | None = None) -> None:
        """``session_bytes``: for the keys and values that :meth:`extend` keeps; None: what ``pages`` finds suitable."""
        self.model = model
        self.most_in_flight = 0 if model.device.type == "cpu" else 1  # waves computed while the host goes on
        self._scratch: Scratch | None = None
        self._clock = DeviceClock()
        self._lock = threading.RLock()
        self._session_bytes = session_bytes
        self._pages: Pages | None = None  # of the first extension on

    @property
    def idle_share(self) -> float | None:
        """How much of its time the device waited in the last :meth:`pairs` or :meth:`run`; see ``DeviceClock``."""
        return self._clock.idle_share

    def run(
        self,
        plan: Plan,
        progress: Callable[[float], None] = lambda share: None,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> TargetScores:
        """The scores of every target of ``plan``; raises what :meth:`pairs` raises, and InterruptedRun where ``stop``
        held."""
        for _, scores in self.pairs([_Alone(plan, progress)], stop=stop):
            return scores
        raise InterruptedRun(_STOPPED)

    def pairs(
        self, items: Iterable[T], *, stop: Callable[[], bool] = lambda: False
    ) -> Generator[tuple[T, TargetScores], None, None]:
        """Each of ``items`` with the scores of its plan, in order.

        ``items`` is read in a thread, ahead of the scores. ``stop`` is asked before each wave; once it holds, no other
        is computed, and a plan of which waves are missing is not given. Closing the generator ends the thread.

        Raises ``NonFiniteError`` (naming the layer) where a score is not finite, ``OutOfMemoryError`` where a wave does
        not fit the memory.
        """
        store, clock = self._store(), DeviceClock()
        begun: deque[_Run[T]] = deque()
        in_flight: deque[tuple[_Run[T], Launched]] = deque()
        self._clock = clock
        with ahead(_laid_out(items, self.model.spec.vocab_size)) as steps:
            for step in steps:
                if isinstance(step, _Run):
                    begun.append(step)
                elif stop():
                    break
                else:
                    in_flight.append((begun[-1], self._launch(begun[-1], step, store)))
                self._collect(in_flight, clock, self.most_in_flight)
                yield from _complete(begun)
        self._collect(in_flight, clock, 0)
        yield from _complete(begun)

    def extend(
        self,
        trees: Sequence[Targeted],
        budgets: Budgets,
        *,
        wanted: Wanted = NOTHING_MORE,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[TargetScores]:
        """The scores of each of ``trees``. Keys and values of their sequences are kept, as far as there is memory, and
        used where a sequence begins like one of before. Several threads take turns. ``stop`` is asked before each wave.
        Raises what :meth:`pairs` raises, and InterruptedRun where ``stop`` held."""
        if isinstance(self.model, ForeignModel) and self.model.spec.mode == "whole":  # nothing could be kept
            return without_pages(trees, partial(self.run, stop=stop), budgets, wanted)
        with self._lock, self.model.compute.current():
            if self._pages is None:
                self._pages = self._make_pages(budgets)
            return Extension(self._pages, partial(self._run_with, stop), budgets, wanted).of(trees)

    def _store(self) -> Store | PathTokens:
        """Of a plan, or one plan after the other."""
        if not isinstance(self.model, ForeignModel):
            return OneLayer(self.model)
        return AllLayers(self.model) if self.model.spec.mode == "shared" else PathTokens()

    def _make_pages(self, budgets: Budgets) -> Pages:
        num_bytes = suitable_bytes(self.model) if self._session_bytes is None else self._session_bytes
        return Pages(self.model, num_bytes, min(LANDING_ROWS, budgets.wave_tokens))

    def _run_with(self, stop: Callable[[], bool], plan: Plan, store: Store | PathTokens | None) -> TargetScores:
        """Wave by wave, each waited for."""
        run = _Run.of(_Alone(plan, lambda share: None), self.model.spec.vocab_size)
        store = self._store() if store is None else store
        for wave in plan.waves():
            if stop():
                raise InterruptedRun(_STOPPED)
            launched = self._launch(run, wave, store)
            launched.wait()
            check_finite(launched.sums, self.model)
            run.put(launched)
        return run.scores

    def _launch(self, run: _Run[T], wave: Wave, store: Store | PathTokens) -> Launched:
        plan = run.item.plan
        watch = Watch(self.model.device, lambda share: run.tell(share * len(wave.token_ids)))
        with self._lock, self.model.compute.current(), memory_errors(plan), torch.inference_mode():
            if wave.index == 0 and not isinstance(store, Pages):  # whose waves are bounded, and small most often
                needed = cost(plan, self.model.spec, self.model.dtype).wave_bytes
                check_fits(plan, needed, free_bytes(self.model.device))
            if isinstance(self.model, ForeignModel):
                return run_foreign_wave(self.model, wave, store, watch)
            assert not isinstance(store, PathTokens)
            if isinstance(store, Pages) or plan.num_computed <= _FEW_ROWS:
                self.model.hold()
            rows = min(plan.batch_tokens, plan.max_wave_rows)
            if self._scratch is None or self._scratch.rows < rows:
                self._scratch = self.model.scratch(rows)
            return run_wave(self.model, wave, store, self._scratch, watch)

    def _collect(self, in_flight: deque[tuple[_Run[T], Launched]], clock: DeviceClock, most: int) -> None:
        """Waits for all waves but the ``most`` latest, and puts their scores where they belong."""
        while len(in_flight) > most:
            run, launched = in_flight.popleft()
            launched.wait()
            clock.add(launched.spans)
            check_finite(launched.sums, self.model)
            run.put(launched)


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """A plan that nothing comes with."""

    plan: Plan
    progress: Callable[[float], None]


@dataclass(slots=True, eq=False)
class _Run(Generic[T]):
    """A plan and what has come of it."""

    item: T
    scores: TargetScores  # zeros where none has come
    readout: Readout  # its arrays are those of the scores
    rows_done: int = 0

    @classmethod
    def of(cls, item: T, vocab_size: int) -> _Run[T]:
        n = item.plan.num_targets
        readout = Readout.room(item.plan.wanted, n, vocab_size)
        more = {field.name: getattr(readout, field.name) for field in fields(Readout)}
        scores = TargetScores(np.zeros(n, np.float32), np.zeros(n, np.bool_), np.zeros(n, np.float32), **more)
        return cls(item, scores, readout)

    @property
    def is_complete(self) -> bool:
        """At once, where the plan has no target: then it has no wave."""
        return self.rows_done == self.item.plan.num_computed

    def put(self, launched: Launched) -> None:
        """The scores of a wave that has arrived."""
        ids = launched.wave.target_ids
        self.scores.logprob[ids] = launched.logprob.numpy()
        self.scores.is_argmax[ids] = launched.is_argmax.numpy()
        self.scores.entropy[ids] = launched.entropy.numpy()
        self.readout.put(ids, launched.readout)
        self.rows_done += len(launched.wave.token_ids)
        self.tell(0)

    def tell(self, rows: float) -> None:
        """Of the wave in hand ``rows`` are done too."""
        self.item.progress((self.rows_done + rows) / self.item.plan.num_computed)


def _laid_out(items: Iterable[T], vocab_size: int) -> Iterator[_Run[T] | Wave]:
    """Each plan, and after it its waves."""
    for item in items:
        yield _Run.of(item, vocab_size)
        yield from item.plan.waves()


def _complete(begun: deque[_Run[T]]) -> Iterator[tuple[T, TargetScores]]:
    """Takes those from the front to which nothing is missing."""
    while begun and begun[0].is_complete:
        run = begun.popleft()
        yield run.item, run.scores
