"""Caches of answers under way, within a limit of memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from serving import Server, serving
from test_server_life import leave

from tdaengine import Engine, GenerateOptions
from tdaengine.server.scheduler import Places, Scheduler
from tdaengine.server.work import Choice, Generating

ROOM = 3000  # tokens that fit; the prompt "a" is `PROMPT` of them
PROMPT = 2


@pytest.fixture
def server(folder: Path, engine: Engine) -> Iterator[Server]:
    assert len(engine.tokenizer.encode("a")) == PROMPT
    options = ("--cache-memory", str(ROOM * engine.kv_bytes_per_token), "--max-context", "200000")
    with serving(folder, "--name", "tiny", *options) as server:
        yield server


def ask(server: Server, tokens: int, **fields):
    """An answer whose cache has room for so many tokens and whose length is all that is left."""
    asked = {"model": "tiny", "prompt": "a", "temperature": 0, **fields}
    return server.client.completions.create(
        **asked, max_tokens=tokens - PROMPT, extra_body={"ignore_eos": True}
    )


def body(tokens: int) -> dict:
    return {"model": "tiny", "prompt": "a", "max_tokens": tokens - PROMPT, "ignore_eos": True}


def test_eight_clients_at_once_stay_within_the_limit(server: Server, engine: Engine):
    limit = ROOM * engine.kv_bytes_per_token
    assert server.metric("cache_limit_bytes") == limit
    seen: list[tuple[float, float]] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            seen.append((server.metric("cache_bytes"), server.metric("running")))

    watching = threading.Thread(target=watch)
    watching.start()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: ask(server, 1400), range(8)))
    is_over.set()
    watching.join()
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert all(answer.usage.completion_tokens == 1400 - PROMPT for answer in answers)
    each = 1400 * engine.kv_bytes_per_token
    assert {bytes for bytes, _ in seen} <= {0, each, 2 * each}
    assert max(seen) == (2 * each, 2)  # of 3000 tokens
    server.wait_for("running", 0)
    assert server.metric("cache_bytes") == 0


def test_small_ones_do_not_overtake_a_large_one(server: Server, engine: Engine):
    stream = ask(server, 2000, stream=True)
    next(iter(stream))
    order: list[int] = []

    def answer(tokens: int) -> None:
        ask(server, tokens)
        order.append(tokens)

    # 1000 are free: the second and the third could go at once, but for the first.
    threads = [threading.Thread(target=answer, args=(n,)) for n in (2900, 900, 101)]
    for i, thread in enumerate(threads):
        thread.start()
        server.wait_for("queue_length", i + 1)
    assert server.metric("running") == 1
    stream.close()
    for thread in threads:
        thread.join()
    assert order[0] == 2900 and len(order) == 3
    assert server.metric("queue_length") == 0


def test_a_client_that_leaves_makes_room_at_once(server: Server, engine: Engine):
    stream = ask(server, 2900, stream=True)
    next(iter(stream))
    large = leave(server, body(200))
    server.wait_for("queue_length", 1)
    small = leave(server, body(90))
    server.wait_for("queue_length", 2)
    large.close()  # in the queue, where it held the other up
    assert b"200 OK" in small.recv(100)
    small.close()
    assert server.metric("queue_length") == 0
    endless = leave(server, body(ROOM))
    server.wait_for("queue_length", 1)
    stream.close()  # while it is computed
    server.wait_for("queue_length", 0)
    endless.close()
    server.wait_for("running", 0)
    assert server.metric("cache_bytes") == 0
    assert {line["level"] for line in server.log()} == {"info"}


def test_what_never_fits_is_refused_at_once(server: Server, engine: Engine):
    stream = ask(server, ROOM, stream=True)
    next(iter(stream))
    of_token = engine.kv_bytes_per_token
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, ROOM + 1)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    assert f"a KV cache of {(ROOM + 1) * of_token} bytes" in caught.value.message
    assert f"at most the {ROOM * of_token} bytes of --cache-memory" in caught.value.message
    assert server.metric("queue_length") == 0
    stream.close()
    # Without max_tokens an answer has what fits.
    chat = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], extra_body={"ignore_eos": True}
    )
    assert chat.usage.total_tokens == ROOM
    assert chat.choices[0].finish_reason == "length"


def test_answers_of_one_request_wait_for_each_other(server: Server):
    whole = ask(server, 1600, n=2)
    assert whole.usage.completion_tokens == 2 * (1600 - PROMPT)


def test_an_answer_that_has_ended_holds_no_cache(engine: Engine):
    options = GenerateOptions(max_new_tokens=3)
    work = Generating(engine, Choice(0, [1, 2], options, [], None), with_stats=False)
    assert work.cache_bytes == 5 * engine.kv_bytes_per_token
    events = iter(work)
    next(events)
    stream = weakref.ref(work._stream)
    assert stream() is not None
    assert list(events) and stream() is None


def test_an_answer_that_fails_holds_no_cache():
    class Cache:
        pass

    class Failing:
        cache_bytes = 7

        def __iter__(self):
            cache = Cache()
            self.cache = weakref.ref(cache)
            yield 1
            raise ValueError("failed")

        def cancel(self) -> None:
            pass

    async def run() -> None:
        scheduler, work = Scheduler(1, 0, 10), Failing()
        with pytest.raises(ValueError, match="failed") as caught:
            async with scheduler.run([work]) as events:
                async for _ in events:
                    pass
        while scheduler.running:
            await asyncio.sleep(0.001)
        assert scheduler.places.bytes == 0
        assert work.cache() is None and caught.value.__traceback__ is not None

    asyncio.run(run())


def test_places_are_never_lost_whoever_leaves():
    chance = random.Random(5)
    places, got, running = Places(4, 100), set(), set()

    async def one(number: int, size: int) -> None:
        await places.take(size)
        got.add(number)
        running.add((number, size))
        assert len(running) <= 4
        # Others that were given theirs may not run yet.
        assert sum(each for _, each in running) <= places.bytes <= 100
        try:
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
        finally:
            running.remove((number, size))
            places.give_back(size)

    async def all_of_them() -> None:
        tasks: list[asyncio.Task[None]] = []
        for number in range(3000):
            tasks.append(asyncio.ensure_future(one(number, chance.randrange(1, 101))))
            while chance.random() < 0.4:
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(asyncio.wait_for(all_of_them(), 60))
    assert 1000 < len(got) < 3000
    assert places.bytes == 0 and not running
    assert places.are_free(100)
