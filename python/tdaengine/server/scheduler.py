"""Who computes when: the one place that knows how requests share the engine.

Each answer under way has a thread that takes tokens from it. The engine computes the next tokens of
all that ask at about the same time in one step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from .faults import ApiError


class Work(Protocol):
    """What one thread computes, as events; `cancel`, from any thread, ends it within a step.

    cache_bytes: of the KV cache that it has meanwhile.
    """

    cache_bytes: int

    def __iter__(self) -> Iterator[Any]: ...

    def cancel(self) -> None: ...


_END = object()


class Places:
    """For so many works at a time, whose caches take so many bytes together: given strictly in the
    order of asking, so that a work with a large cache is not overtaken for ever by small ones."""

    def __init__(self, count: int, most_bytes: float) -> None:
        """most_bytes: may be infinite."""
        self._free, self.most_bytes = count, most_bytes
        self._turns: deque[tuple[asyncio.Future[None], int]] = deque()  # of those that wait
        self.bytes = 0  # given

    def are_free(self, cache_bytes: int) -> bool:
        return not self._turns and self._fits(cache_bytes)

    async def take(self, cache_bytes: int) -> None:
        """As soon as it is this one's turn."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.append((turn, cache_bytes))
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._give()  # to those behind
            else:  # it came at the same moment
                self.give_back(cache_bytes)
            raise

    def give_back(self, cache_bytes: int) -> None:
        self._free += 1
        self.bytes -= cache_bytes
        self._give()

    def _fits(self, cache_bytes: int) -> bool:
        return self._free > 0 and self.bytes + cache_bytes <= self.most_bytes

    def _give(self) -> None:
        while self._turns:
            turn, cache_bytes = self._turns[0]
            if not turn.cancelled():
                if not self._fits(cache_bytes):
                    return
                self._free -= 1
                self.bytes += cache_bytes
                turn.set_result(None)
            self._turns.popleft()


class Scheduler:
    """First come, first served: `parallel` works at a time, with caches of at most `cache_memory`
    bytes together, of which each alone needs no more. Of the requests for which there is no place
    `most_waiting` wait.

    A request of several works stands in the queue once: with each place that it gets it goes back
    to the end, until all its works have one. So it uses all places that nobody else wants, and
    does not keep others waiting until it is done.
    """

    def __init__(
        self, parallel: int, most_waiting: int, cache_memory: float = float("inf")
    ) -> None:
        self._most_waiting = most_waiting
        self.places = Places(parallel, cache_memory)
        self._threads = ThreadPoolExecutor(parallel, "tdaengine-work")
        self._mean_seconds = 1.0  # of late works, for Retry-After
        self.waiting = 0  # requests
        self.running = 0  # works

    def gauges(self) -> list[tuple[str, str, Callable[[], float]]]:
        """For metrics: name, text, function."""
        places = self.places
        return [
            (
                "queue_length",
                "Requests that wait, for a further answer, too.",
                lambda: self.waiting,
            ),
            ("running", "Answers being computed.", lambda: self.running),
            ("cache_bytes", "Of the KV caches of these answers.", lambda: places.bytes),
            ("cache_limit_bytes", "The most they may have.", lambda: places.most_bytes),
        ]

    @contextlib.asynccontextmanager
    async def run(self, works: Sequence[Work]) -> AsyncIterator[AsyncIterator[Any]]:
        """The events of all `works` as they come; leaving early cancels them. Enters with the first
        one's turn. Raises ApiError 429 if too many wait already."""
        self._check_queue(works[0])
        events: asyncio.Queue[Any] = asyncio.Queue()
        await self._start(works[0], events)
        others = asyncio.ensure_future(self._start_each(works[1:], events))
        try:
            yield _until_end(events, len(works))
        finally:
            others.cancel()
            for work in works:
                work.cancel()

    def _check_queue(self, work: Work) -> None:
        if self.waiting >= self._most_waiting and not self.places.are_free(work.cache_bytes):
            seconds = self._mean_seconds * (self.waiting + 1) / max(1, self.running)
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
            await self.places.take(work.cache_bytes)
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
            traceback.clear_frames(error.__traceback__)  # which may hold the cache
            tell(error)
        finally:
            tell(_END)
            with contextlib.suppress(RuntimeError):
                seconds = time.monotonic() - started
                loop.call_soon_threadsafe(self._finish, seconds, work.cache_bytes)

    def _finish(self, seconds: float, cache_bytes: int) -> None:
        """A thread has ended: until then, whoever has left, its place is taken."""
        self._mean_seconds += 0.2 * (seconds - self._mean_seconds)
        self.running -= 1
        self.places.give_back(cache_bytes)


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
