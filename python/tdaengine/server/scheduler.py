"""Who computes when: the one place that knows how requests share the engine.

Each answer under way has a thread that takes tokens from it. The engine computes the next tokens of
all that ask at about the same time in one step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from .faults import ApiError


class Work(Protocol):
    """What one thread computes, as events; `cancel`, from any thread, ends it within a step."""

    def __iter__(self) -> Iterator[Any]: ...

    def cancel(self) -> None: ...


_END = object()


class Scheduler:
    """First come, first served: `parallel` works at a time, of the requests for which there is no
    place `most_waiting` wait.

    A request of several works stands in the queue once: with each place that it gets it goes back
    to the end, until all its works have one. So it uses all places that nobody else wants, and
    does not keep others waiting until it is done.
    """

    def __init__(self, parallel: int, most_waiting: int) -> None:
        self._parallel, self._most_waiting = parallel, most_waiting
        self._slots = asyncio.Semaphore(parallel)
        self._threads = ThreadPoolExecutor(parallel, "tdaengine-work")
        self._mean_seconds = 1.0  # of late works, for Retry-After
        self.waiting = 0  # requests
        self.running = 0  # works

    @contextlib.asynccontextmanager
    async def run(self, works: Sequence[Work]) -> AsyncIterator[AsyncIterator[Any]]:
        """The events of all `works` as they come; leaving early cancels them. Enters with the first
        one's turn. Raises ApiError 429 if too many wait already."""
        self._check_queue()
        events: asyncio.Queue[Any] = asyncio.Queue()
        await self._start(works[0], events)
        others = asyncio.ensure_future(self._start_each(works[1:], events))
        try:
            yield _until_end(events, len(works))
        finally:
            others.cancel()
            for work in works:
                work.cancel()

    def _check_queue(self) -> None:
        if self._slots.locked() and self.waiting >= self._most_waiting:
            seconds = self._mean_seconds * (self.waiting + 1) / self._parallel
            raise ApiError(
                429,
                f"queue: found {self.waiting} requests waiting, expected fewer than "
                f"{self._most_waiting}; come back later",
                code="queue_full",
                headers={"Retry-After": str(min(max(1, round(seconds)), 60))},
            )

    async def _start_each(self, works: Sequence[Work], events: asyncio.Queue[Any]) -> None:
        for work in works:
            await self._start(work, events)

    async def _start(self, work: Work, events: asyncio.Queue[Any]) -> None:
        """As soon as there is a place for it."""
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        self._threads.submit(self._compute, work, events, asyncio.get_running_loop())

    def _compute(
        self, work: Work, events: asyncio.Queue[Any], loop: asyncio.AbstractEventLoop
    ) -> None:
        """In a thread."""

        def tell(event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed has no one to tell
                loop.call_soon_threadsafe(events.put_nowait, event)

        started = time.monotonic()
        try:
            for event in work:
                tell(event)
        except Exception as error:
            tell(error)
        finally:
            tell(_END)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._finish, time.monotonic() - started)

    def _finish(self, seconds: float) -> None:
        """A thread has ended: until then, whoever has left, its place is taken."""
        self._mean_seconds += 0.2 * (seconds - self._mean_seconds)
        self.running -= 1
        self._slots.release()


async def _until_end(events: asyncio.Queue[Any], works: int) -> AsyncIterator[Any]:
    """Until so many works have ended. Raises what one raised."""
    while works:
        event = await events.get()
        if event is _END:
            works -= 1
            continue
        if isinstance(event, Exception):
            raise event
        yield event
        # Else many events at once would keep everyone waiting, those who listen for a client that
        # leaves included.
        await asyncio.sleep(0)
