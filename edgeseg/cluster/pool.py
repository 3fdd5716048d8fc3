"""Workers on a Ray cluster: actors, each with an engine, that are given batches of images and may die at any moment.

Actors of Ray's core rather than a dataset of Ray Data. Nothing is to be moved between machines here: a worker reads an image
itself and writes its mask under a name of its own, where Ray Data passes pixels through its object store and names files by
block. It holds every path on the driver before the first is read, gives an image that kills its worker to another one for
ever, and skips and records whole blocks. And it needs pandas and pyarrow on every node.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

from edgeseg.backends import GPU_TARGETS
from edgeseg.cluster.plan import Image
from edgeseg.cluster.worker import Item, Job, Outcome, Worker
from edgeseg.errors import BuildError, EdgesegError, one_line
from edgeseg.runtime.overlap import MAX_THREADS

# A worker that has two batches never waits for the next one, nor for the last image of one.
_AT_ONCE = 2
# Workers that die before they have an engine, one after the other, will not get one.
_MOST_STILLBORN = 4
_WAIT_S = 30.0


@dataclass(frozen=True)
class Batch:
    """Images for one call of a worker.

    Attributes:
        images: what to do.
        overwrite: outputs that are there are ours.
        is_suspect: a worker that had these images has died; nothing else is done by the next one meanwhile.
        deaths: workers that have died since with this image alone.
    """

    images: tuple[Image, ...]
    overwrite: bool
    is_suspect: bool = False
    deaths: int = 0

    @property
    def items(self) -> tuple[Item, ...]:
        """What the worker must know."""
        return tuple(Item(image.place, image.source, image.name) for image in self.images)


@dataclass(frozen=True)
class Finished:
    """A batch is done: what became of each image; seconds it took."""

    batch: Batch
    outcomes: Sequence[Outcome]
    seconds: float


@dataclass(frozen=True)
class Lost:
    """The worker died that had the batch: some of its images may be done, nobody knows which."""

    batch: Batch
    reason: str


Event: TypeAlias = "Finished | Lost"


class Pool(Protocol):
    """Workers, as the run sees them."""

    def has_room(self, batch: Batch) -> bool:
        """Whether a worker can be given this batch now."""

    def give(self, batch: Batch) -> None:
        """Let a worker begin the batch."""

    def wait(self) -> list[Event]:
        """Wait for something to happen; an empty list for what concerns no batch. Raises what stops every worker."""


@dataclass(frozen=True)
class _Refusal:
    """An error of ours on its way back: Ray would wrap it."""

    error: EdgesegError
    node: str


@dataclass(frozen=True)
class _Answer:
    outcomes: list[Outcome]
    seconds: float


class _Actor:
    """Runs on the worker. Nothing is raised: an exception while an actor is made is hard to tell from its death."""

    def __init__(self, job: Job, files: list[Any]) -> None:
        self._job, self._files = job, files

    def start(self) -> _Refusal | None:
        """Load the engine; what is wrong with it here."""
        import ray

        try:
            self._worker = Worker(self._job, lambda number: ray.get(self._files[number]))
        except EdgesegError as exc:
            return _Refusal(exc, platform.node())
        return None

    def segment(self, items: tuple[Item, ...], overwrite: bool) -> _Answer | _Refusal:
        begin = time.perf_counter()
        try:
            outcomes = self._worker.segment(items, overwrite=overwrite)
        except EdgesegError as exc:
            return _Refusal(exc, platform.node())
        return _Answer(outcomes, time.perf_counter() - begin)


@dataclass(eq=False)
class _Hand:
    """An actor, and what it was given; ``is_ready`` when it has loaded the engine."""

    actor: Any
    starting: Any
    batches: dict[Any, Batch] = field(default_factory=dict)
    is_ready: bool = False


class RayPool:
    """Workers on the nodes of a cluster, spread over them; one that dies is replaced.

    Args:
        ray: the connected module.
        job: for the workers; its ``cores`` are chosen here.
        targets: of the engines: those for a GPU take one a worker.
        files: the content of each engine's folder by name; goes to each node once.
        workers: how many; ``None``: as many as the cluster has room for now.
        say: gets a line for a person when workers are waited for.
    """

    def __init__(
        self,
        ray: Any,
        job: Job,
        targets: Sequence[str],
        files: Sequence[Mapping[str, bytes]],
        workers: int | None,
        say: Callable[[str], None],
    ) -> None:
        self._ray, self._say = ray, say
        gpus = 0 if set(GPU_TARGETS).isdisjoint(targets) else 1
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores, fitting = shares(nodes, gpus, workers)
        self.workers = workers or fitting
        # A reference in a list stays one: only the worker that unpacks the engine fetches its content.
        self._make = partial(
            ray.remote(_Actor)
            .options(
                num_cpus=cores,
                num_gpus=gpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=_AT_ONCE,
                scheduling_strategy="SPREAD",
            )
            .remote,
            replace(job, cores=cores),
            [ray.put(dict(content)) for content in files],
        )
        self._hands: list[_Hand] = []
        self._stillborn = 0
        for _ in range(self.workers):
            self._hire()

    def close(self) -> None:
        """End all workers, whatever they do."""
        for hand in self._hands:
            self._ray.kill(hand.actor)
        self._hands = []

    def has_room(self, batch: Batch) -> bool:
        return self._free(batch) is not None

    def give(self, batch: Batch) -> None:
        hand = self._free(batch)
        assert hand is not None
        hand.batches[hand.actor.segment.remote(batch.items, batch.overwrite)] = batch

    def wait(self) -> list[Event]:
        starting = {hand.starting: hand for hand in self._hands if not hand.is_ready}
        given = {reference: hand for hand in self._hands for reference in hand.batches}
        references = [*given, *starting]
        ready, _ = self._ray.wait(references, num_returns=1, timeout=_WAIT_S)
        if ready:  # and all others that are
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        if not ready and len(starting) == len(self._hands):
            self._say(f"waiting for a worker: {len(starting)} asked for, none up; see: ray status")
        events: list[Event] = []
        for reference in ready:
            if reference in starting:
                self._started(starting[reference])
            else:
                events += self._answered(given[reference], reference)
        return events

    def _hire(self) -> None:
        actor = self._make()
        self._hands.append(_Hand(actor, actor.start.remote()))

    def _free(self, batch: Batch) -> _Hand | None:
        """The worker with the least to do, if it may have another batch."""
        hand = min((h for h in self._hands if h.is_ready), key=lambda hand: len(hand.batches), default=None)
        if hand is None:
            return None
        most = 0 if batch.is_suspect else _AT_ONCE - 1
        kept = any(other.is_suspect for other in hand.batches.values())
        return None if kept or len(hand.batches) > most else hand

    def _started(self, hand: _Hand) -> None:
        try:
            answer = self._ray.get(hand.starting)
        except self._ray.exceptions.RayTaskError:
            raise  # a bug
        except self._ray.exceptions.RayError as exc:
            self._stillborn += 1
            if self._stillborn >= _MOST_STILLBORN:
                raise BuildError(f"workers die before they have loaded the engine: {one_line(exc)}") from exc
            self._replace(hand)
            return
        self._stillborn = 0
        _raise_refusal(answer)
        hand.is_ready = True

    def _answered(self, hand: _Hand, reference: Any) -> list[Event]:
        if hand not in self._hands:
            return []  # it has died
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as exc:
            # Whatever else it had is lost as well.
            lost: list[Event] = [Lost(batch, one_line(exc)) for batch in hand.batches.values()]
            self._replace(hand)
            return lost
        batch = hand.batches.pop(reference)
        _raise_refusal(answer)
        return [Finished(batch, answer.outcomes, answer.seconds)]

    def _replace(self, hand: _Hand) -> None:
        # One that is merely out of reach must not go on where another takes over.
        self._ray.kill(hand.actor)
        self._hands.remove(hand)
        self._hire()


def shares(nodes: Sequence[Mapping[str, float]], gpus: int, workers: int | None) -> tuple[int, int]:
    """Cores of a worker, and how many such workers the nodes have room for.

    Args:
        nodes: resources of each, as Ray names them.
        gpus: of a worker, 0 or 1.
        workers: how many are asked for; ``None``: as many as there is room for.

    Returns:
        cores: as many as a run on one machine uses threads, where the nodes have them and enough workers have room.
        workers: at least one, for which a cluster that grows will make room.
    """
    places = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    places = [(cpu, gpu) for cpu, gpu in places if cpu and gpu >= gpus]
    if not places:
        return (MAX_THREADS if gpus else 1), 1
    cores = max(1, min(MAX_THREADS, *(cpu // gpu if gpus else cpu for cpu, gpu in places)))
    if workers is not None:
        cores = max(1, min(cores, sum(cpu for cpu, _ in places) // workers))
    room = sum(min(cpu // cores, gpu) if gpus else cpu // cores for cpu, gpu in places)
    return cores, max(1, room)


def _raise_refusal(answer: object) -> None:
    if isinstance(answer, _Refusal):
        answer.error.args = (f"{answer.error} (on node {answer.node})",)
        raise answer.error
