"""Reading, working and consuming at the same time, in order, with bounded memory and no thread left behind."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from typing import Generic, TypeVar

from edgeseg.closing import Closing
from edgeseg.machine.cpu import this_cpu

A = TypeVar("A")
B = TypeVar("B")

# Each holds an image, of any size.
MAX_THREADS = 4
# How long closing waits for a thread that is inside someone else's code (a camera driver, a user's generator).
JOIN_TIMEOUT_S = 5.0


class Pipe(Generic[A]):
    """A bounded queue between two threads that either side can end.

    Args:
        capacity: items held at most.
        newest_wins: a full pipe drops its oldest item instead of making the producer wait.
    """

    def __init__(self, capacity: int, *, newest_wins: bool = False) -> None:
        self._items: deque[A] = deque()
        self._capacity = capacity
        self._newest_wins = newest_wins
        self._changed = threading.Condition()
        self._finished = False
        self._closed = False
        self._error: BaseException | None = None
        self.dropped = 0

    def put(self, item: A) -> bool:
        """Add an item, waiting for room; false when nobody will take it any more."""
        with self._changed:
            if self._newest_wins and len(self._items) >= self._capacity:
                self._items.popleft()
                self.dropped += 1
            while len(self._items) >= self._capacity and not self._closed:
                self._changed.wait()
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def finish(self, error: BaseException | None = None) -> None:
        """Say that no item follows; ``error`` is raised at the taker after the last item."""
        with self._changed:
            self._finished, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Say that no item will be taken; wakes both sides."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Pipe[A]:
        return self

    def __next__(self) -> A:
        """The next item, each for one taker, whatever thread it is in."""
        with self._changed:
            while not self._items and not self._finished and not self._closed:
                self._changed.wait()
            if not self._items:
                error, self._error = self._error, None
                if error is not None and not self._closed:
                    raise error
                raise StopIteration
            item = self._items.popleft()
            self._changed.notify_all()
            return item


class Overlapped(Generic[B], Closing):
    """Iterate over what ``work`` makes of ``items``, in order, one step ahead of the consumer.

    One thread draws from ``items``, another runs ``work``, and the consumer's own thread uses the results, so the
    three overlap. Nothing starts before the first result is asked for. An exception in either thread is raised at the
    consumer, after the results that came before it. Breaking off, an exception at the consumer (Ctrl-C too) or dropping
    the object ends both threads; :meth:`close` or a ``with`` block says when.

    Args:
        items: drawn from in a thread of its own, and closed there if it has a ``close``.
        work: called with the iterator of all items, returns the generator of the results.
        ahead: items waiting at each of the two hand-overs.
        newest_wins: when ``work`` cannot keep up, drop older items instead of making the source wait.
    """

    def __init__(
        self,
        items: Iterable[A],
        work: Callable[[Iterator[A]], Generator[B, None, None]],
        *,
        ahead: int = 2,
        newest_wins: bool = False,
    ) -> None:
        inbox: Pipe[A] = Pipe(1 if newest_wins else ahead, newest_wins=newest_wins)
        outbox: Pipe[B] = Pipe(ahead)
        # The threads know the pipes but not this object: when the consumer drops it, they can be ended.
        self._threads = (
            threading.Thread(target=_draw, args=(items, inbox), name="edgeseg-read", daemon=True),
            threading.Thread(target=_work, args=(inbox, work, outbox), name="edgeseg-work", daemon=True),
        )
        self._inbox = inbox
        self._results = outbox
        self._starting = threading.Lock()
        self._started = threading.Event()
        self._end = weakref.finalize(self, _end, items, (inbox, outbox), self._threads, self._started)

    @property
    def dropped(self) -> int:
        """Items dropped so far because newer ones came in."""
        return self._inbox.dropped

    def __iter__(self) -> Overlapped[B]:
        return self

    def __next__(self) -> B:
        try:
            if not self._started.is_set() and self._end.alive:
                with self._starting:  # two threads may take results
                    if not self._started.is_set():
                        self._started.set()
                        for thread in self._threads:
                            thread.start()
            return next(self._results)
        except BaseException:  # the end, an error of a thread, or Ctrl-C while waiting
            self.close()
            raise

    def close(self) -> None:
        """End both threads and close the source; harmless when done already."""
        self._end()


def parallel_threads(most: int | None = None) -> int:
    """One per core, 4 or ``most`` at most; 2 on a single core, where one may wait for a disk or a GPU."""
    return min(max(2, this_cpu().cores), MAX_THREADS, most or MAX_THREADS)


def in_parallel(
    items: Iterable[A], work: Callable[[A], B], *, ahead: int = 1, most: int | None = None
) -> Generator[B, None, None]:
    """Yield ``work(item)`` for each of ``items``, in order, from :func:`parallel_threads` threads, ``most`` of them.

    No more items than ``ahead`` times the threads are drawn before the result asked for, and no more results held. With
    1 a thread that is done waits for a slower item before its own; more where results are small. An exception of
    ``work`` is raised in its item's turn; then, and when the generator is closed, what has begun is waited for and
    nothing else begins.
    """
    threads = parallel_threads(most)
    with ThreadPoolExecutor(threads, "edgeseg-parallel") as pool:
        yield from in_order(pool, items, work, ahead * threads)


def in_order(pool: Executor, items: Iterable[A], work: Callable[[A], B], held: int) -> Generator[B, None, None]:
    """:func:`in_parallel` in the workers of ``pool``, which ends with it: ``held`` items at a time, done ones included."""
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) == held:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(items: Iterable[A], inbox: Pipe[A]) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if not inbox.put(item):
                break
    except BaseException as exc:
        error = exc
    finally:
        try:
            _close(items)
        except BaseException as exc:
            error = error or exc
        inbox.finish(error)


def _work(inbox: Pipe[A], work: Callable[[Iterator[A]], Generator[B, None, None]], outbox: Pipe[B]) -> None:
    try:
        # Closed here, not when it is collected: it may hold what only this thread gives back.
        with closing(work(iter(inbox))) as results:
            for result in results:
                if not outbox.put(result):
                    break
    except BaseException as exc:
        outbox.finish(exc)
    else:
        outbox.finish()


def _end(
    items: Iterable[A],
    pipes: tuple[Pipe[A], Pipe[B]],
    threads: tuple[threading.Thread, ...],
    started: threading.Event,
) -> None:
    for pipe in pipes:
        pipe.close()
    if not started.is_set():  # nobody else closes the source
        _close(items)
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join(JOIN_TIMEOUT_S)


def _close(items: object) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        close()
