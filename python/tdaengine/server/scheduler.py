"""Who computes when: the one place that knows how requests share the engine.

Each request under way has a thread that takes tokens from it. The engine computes the next tokens
of all that ask at about the same time in one step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from .faults import ApiError


class Work(Protocol):
    """A request's computing, as events; `cancel`, from any thread, ends it within a step."""

    def __iter__(self) -> Iterator[Any]: ...

    def cancel(self) -> None: ...


_END = object()


class Scheduler:
    """First come, first served: `parallel` at a time, of the others `most_waiting` wait."""

    def __init__(self, parallel: int, most_waiting: int) -> None:
        self._parallel, self._most_waiting = parallel, most_waiting
        self._slots = asyncio.Semaphore(parallel)
        self._threads = ThreadPoolExecutor(parallel, "tdaengine-work")
        self._mean_seconds = 1.0  # of late work, for Retry-After
        self.waiting = 0
        self.running = 0

    @contextlib.asynccontextmanager
    async def run(self, work: Work) -> AsyncIterator[AsyncIterator[Any]]:
        """The events of `work` as they come; leaving early cancels it. Raises ApiError 429 if too
        many wait already."""
        await self._turn()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def tell(event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed has no one to tell
                loop.call_soon_threadsafe(events.put_nowait, event)

        def compute() -> None:
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

        self._threads.submit(compute)
        try:
            yield _until_end(events)
        finally:
            work.cancel()

    async def _turn(self) -> None:
        if self._slots.locked() and self.waiting >= self._most_waiting:
            seconds = self._mean_seconds * (self.waiting + 1) / self._parallel
            raise ApiError(
                429,
                f"queue: found {self.waiting} requests waiting, expected fewer than "
                f"{self._most_waiting}; come back later",
                code="queue_full",
                headers={"Retry-After": str(min(max(1, round(seconds)), 60))},
            )
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1

    def _finish(self, seconds: float) -> None:
        """A thread has ended: until then, whoever has left, its slot is taken."""
        self._mean_seconds += 0.2 * (seconds - self._mean_seconds)
        self.running -= 1
        self._slots.release()


async def _until_end(events: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    """Raises what the work raised."""
    while (event := await events.get()) is not _END:
        if isinstance(event, Exception):
            raise event
        yield event
        # Else many events at once would keep everyone waiting, those who listen for a client that
        # leaves included.
        await asyncio.sleep(0)
