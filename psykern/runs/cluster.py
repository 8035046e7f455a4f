"""One run on many devices and machines, with Ray: an actor for each GPU, or for each group of CPU cores.

The driver reads and encodes the units and hands them out, the longest of those that are ready first; each actor loads
the model once and writes the parts of its units to the run's folder, which all machines must reach. An actor that is
lost is replaced, and its unit goes to another. What a part holds depends on its unit alone, so the records equal those
of one process that has as many threads (torch's matrix products may round otherwise on more of them).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from psykern.core.clock import Clock
from psykern.core.errors import BackendError, PsykernError
from psykern.core.folder import Folder
from psykern.core.settings import Settings
from psykern.core.stages import ahead
from psykern.core.types import EncodedUnit
from psykern.data.dataset import Dataset
from psykern.models.checkpoint import at_revision
from psykern.runs.job import Options, Run, RunJob, recipe_of
from psykern.runs.manifest import Counts, Recipe
from psykern.runs.progress import Progress
from psykern.runs.run import feed_of
from psykern.scoring.language import load_language
from psykern.scoring.loading import load
from psykern.scoring.units import with_unit_tokens

_READY = 2  # units a worker that are encoded ahead, to choose the longest from
_QUEUED = 2  # units that a worker has at most: the next is there when one is done
_ATTEMPTS = 3  # workers that a unit may cost before it is taken to be what kills them
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Workers:
    """Where and how wide a run is spread."""

    address: str | None = None  # of a Ray cluster; None: the one that this machine is part of, else a new one here
    count: int | None = None  # actors; None: as many as the cluster has room for now
    cpus: int | None = None  # cores of an actor; None: all of its share on a machine of GPUs, else 2


def score_on_cluster(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: Settings | None = None,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    workers: Workers | None = None,
    resume: bool = True,
    cache: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
) -> Run:
    """:func:`psykern.score` by the actors of a Ray cluster; arguments and errors are the same.

    ``model`` and ``adapter`` must be the same folder or hub id on every machine, ``out`` a folder or fsspec URL that
    all reach. Raises BackendError where Ray is not installed, and for one GPU of several (``cuda:1``).
    """
    model, settings, workers, clock = (
        at_revision(model, revision),
        settings or Settings(),
        workers or Workers(),
        Clock(),
    )
    if settings.device.startswith("cuda:"):
        raise BackendError(
            f"device: expected auto, cpu or cuda, as Ray gives each worker its GPU, got {settings.device}"
        )
    options = Options(resume=resume, cache=cache, stop=stop, quiet=quiet)
    ray = _ray()
    Folder.at(out).create()
    with ExitStack() as stack:
        if not ray.is_initialized():
            _connect(ray, workers.address)
            stack.callback(ray.shutdown)
        _, language = load_language(model, adapter=adapter, implementation=settings.implementation, clock=clock)
        with clock("hash"):
            dataset = Dataset.find(data)
        pool = _Pool(ray, workers, (str(model), adapter and str(adapter), settings, dataset, str(out)))
        stack.callback(pool.close)
        recipe = pool.start()
        settings = replace(settings, unit_tokens=recipe.unit_tokens)
        feed = feed_of(dataset, language, settings, recipe, options, clock)
        with clock("scan"):
            units = feed.units()
        job = RunJob.open(out, recipe, settings, resume=resume)
        job.folder.check_parts(units)
        if job.recipe.date != recipe.date:
            feed = feed_of(dataset, language, settings, job.recipe, options, clock)
        wanted = [unit for unit in units if not job.folder.has(unit)]
        with Progress(sum(unit.characters for unit in wanted), quiet=quiet) as progress, clock("run"):
            done = pool.score(feed.encoded(wanted), job.recipe, progress, stop)
        job.folder.look_again()
        job.check_stopped(units, wanted, stop)
        return job.finish(units, done, clock, None)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise BackendError("a cluster needs Ray: pip install 'psykern[ray]'") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise BackendError(f"ray: no cluster at {address or 'this machine'}: {str(error).splitlines()[0]}") from error


class _Worker:
    """An actor: a model, and the parts that it writes."""

    def __init__(self, model: str, adapter: str | None, settings: Settings, dataset: Dataset, out: str) -> None:
        self._scorer = load(
            model,
            adapter=adapter,
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,
            implementation=settings.implementation,
            chat=settings.condition == "chat",
        )
        self._settings = with_unit_tokens(settings, self._scorer.model.compute)
        self._dataset = dataset
        self._out = out

    def recipe(self) -> Recipe:
        """Of a run that begins on this machine."""
        return recipe_of(self._scorer, self._dataset, self._out, self._settings, Clock())

    def score(self, unit: EncodedUnit, recipe: Recipe) -> Counts | PsykernError:
        """Writes the unit's part, with the budgets of ``recipe``; an error that the user can act on is given back, not
        raised, to keep its class."""
        try:
            job = RunJob.open(self._out, self.recipe(), self._settings)  # refuses where this machine's model is another
            job = replace(job, recipe=recipe)
            with Progress(unit.info.characters, quiet=True) as progress:
                return job.score(self._scorer, iter([unit]), progress, Clock())
        except PsykernError as error:
            return error


@dataclass(slots=True)
class _Task:
    """A unit in an actor's hands."""

    unit: EncodedUnit
    worker: Any
    update: Callable[[float], None]


class _Pool:
    """The actors, and who has what."""

    def __init__(self, ray: Any, workers: Workers, arguments: tuple[Any, ...]) -> None:
        self._ray = ray
        self._arguments = arguments
        self._gpus, self._cpus, self._count = _shape(ray, workers)
        self._starting: dict[Any, Any] = {}  # actors that load the model, by the reference of their recipe
        self._workers: list[Any] = []
        self._tasks: dict[Any, _Task] = {}  # by the reference of what they will give
        self._lost: dict[int, int] = {}  # by unit: actors that were lost with it
        self._failed_starts = 0

    def start(self) -> Recipe:
        """Starts the actors; gives the recipe of the first that is ready."""
        for _ in range(self._count):
            self._start_one()
        while not self._workers:
            ((reference, *_), _) = self._ray.wait(list(self._starting))
            recipe: Recipe | None = self._started(reference)
        assert recipe is not None
        return recipe

    def close(self) -> None:
        for worker in (*self._workers, *self._starting.values()):
            self._ray.kill(worker)

    def score(
        self, units: Iterator[EncodedUnit], recipe: Recipe, progress: Progress, stop: Callable[[], bool]
    ) -> Counts:
        """Hands out ``units`` until there are none, or ``stop`` holds and what was handed out is done."""
        done = Counts()
        ready: list[tuple[int, int, EncodedUnit]] = []  # a heap, longest first
        with ahead(units, depth=_READY * self._count) as incoming:
            exhausted = False
            while (not stop() and not exhausted) or self._tasks or (ready and not stop()):
                while not stop() and not exhausted and len(ready) < _READY * self._count:
                    unit = next(incoming, None)
                    exhausted = unit is None
                    if unit is not None:
                        heapq.heappush(ready, (-unit.info.characters, unit.info.index, unit))
                    if self._free_worker() is not None:
                        break
                while ready and not stop() and (worker := self._free_worker()) is not None:
                    self._hand_out(heapq.heappop(ready)[2], worker, recipe, progress)
                for task, result in self._finished():
                    if result is None:
                        heapq.heappush(ready, (-task.unit.info.characters, task.unit.info.index, task.unit))
                    else:
                        done += result
                        task.update(1.0)
        return done

    def _hand_out(self, unit: EncodedUnit, worker: Any, recipe: Recipe, progress: Progress) -> None:
        responses = sum(len(t.responses) for t in unit.transcripts)
        tokens = sum(len(t.token_ids) for t in unit.transcripts)
        update = progress.start(unit.info.characters, responses, tokens)
        self._tasks[worker.score.remote(unit, recipe)] = _Task(unit, worker, update)

    def _free_worker(self) -> Any:
        """The actor with the fewest units, if it can take one more."""
        if not self._workers:
            return None
        loads = {id(worker): 0 for worker in self._workers}
        for task in self._tasks.values():
            loads[id(task.worker)] = loads.get(id(task.worker), 0) + 1
        worker = min(self._workers, key=lambda worker: loads[id(worker)])
        return worker if loads[id(worker)] < _QUEUED else None

    def _finished(self) -> Iterator[tuple[_Task, Counts | None]]:
        """Tasks that are done, with what went through; None: the actor was lost and the unit is to be done again."""
        if not (self._tasks or self._starting):
            return
        finished, _ = self._ray.wait([*self._tasks, *self._starting], timeout=_POLL_SECONDS)
        for reference in finished:
            if reference in self._starting:
                self._started(reference)
                continue
            task = self._tasks.pop(reference)
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayActorError as error:
                self._replace(task, error)
                yield task, None
                continue
            if isinstance(result, PsykernError):
                raise result
            yield task, result

    def _replace(self, task: _Task, error: Exception) -> None:
        if task.worker in self._workers:
            self._workers.remove(task.worker)
            self._start_one()
        count = self._lost[task.unit.info.index] = self._lost.get(task.unit.info.index, 0) + 1
        if count >= _ATTEMPTS:
            raise PsykernError(
                f"unit {task.unit.info.index} of {task.unit.info.study}: {count} workers were lost with it, the last: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error

    def _start_one(self) -> None:
        actor = self._ray.remote(num_gpus=self._gpus, num_cpus=self._cpus, max_restarts=0)(_Worker)
        worker = actor.remote(*self._arguments)
        self._starting[worker.recipe.remote()] = worker

    def _started(self, reference: Any) -> Recipe | None:
        """The recipe of an actor that is ready; it takes units from now on. None: it did not come up, another is
        started in its place."""
        worker = self._starting.pop(reference)
        try:
            recipe: Recipe = self._ray.get(reference)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.RayTaskError) as error:
            self._failed_starts += 1
            if self._failed_starts >= _ATTEMPTS:
                reason = str(error).strip().splitlines()[-1]
                raise PsykernError(f"ray: {self._failed_starts} workers could not start, the last: {reason}") from error
            self._start_one()
            return None
        self._workers.append(worker)
        return recipe


def _shape(ray: Any, workers: Workers) -> tuple[int, int, int]:
    """GPUs and cores of an actor, and the number of actors."""
    room = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (int(sum(of.get(kind, 0) for of in room)) for kind in ("GPU", "CPU"))
    each = workers.cpus or (max(1, cpus // gpus) if gpus else min(2, max(1, cpus)))
    most = gpus or sum(int(of.get("CPU", 0)) // each for of in room)
    count = most if workers.count is None else workers.count
    if not 1 <= count <= most:
        raise BackendError(
            f"ray: expected 1 to {most} workers, as the cluster has {gpus} GPUs and {cpus} cores (a worker takes "
            f"{each}), got {count}"
        )
    return (1 if gpus else 0), each, count
