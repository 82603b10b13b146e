"""A limit on the KV caches of an engine: who waits, in which order, and what makes room."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from test_concurrency import Alarm, alarm, run_child  # noqa: F401  # a fixture

from tdaengine import Engine, OptionError, Stream

ROOM = 3000  # tokens that fit
PROMPT = [5, 6]


@pytest.fixture(scope="module")
def limited(folder: Path, engine: Engine) -> Engine:
    return Engine(
        folder,
        device="cpu",
        threads=1,
        max_context=200_000,
        cache_memory=ROOM * engine.kv_bytes_per_token,
    )


@pytest.fixture(autouse=True)
def nothing_is_left(limited: Engine):
    yield
    assert has_room(limited, ROOM)


def start(engine: Engine, tokens: int, **options) -> Stream:
    """Whose cache has room for so many tokens."""
    most = tokens - len(PROMPT)
    return engine.stream(PROMPT, max_new_tokens=most, ignore_eos=True, **options)


@contextlib.contextmanager
def held(engine: Engine, tokens: int) -> Iterator[Stream]:
    """One under way, to whatever end."""
    stream = start(engine, tokens)
    next(stream)
    try:
        yield stream
    finally:
        stream.cancel()


def has_room(engine: Engine, tokens: int) -> bool:
    """Within half a second."""
    stream = start(engine, tokens)
    timer = threading.Timer(0.5, stream.cancel)
    timer.start()
    next(stream, None)
    timer.cancel()
    stream.cancel()
    return bool(stream.output.token_ids)


def test_prompts_of_a_list_wait_for_each_other(limited: Engine, engine: Engine):
    prompts = [[5 + i] for i in range(9)]
    options = {"max_new_tokens": 50, "ignore_eos": True}
    expected = [engine.generate(prompt, **options).token_ids for prompt in prompts]
    assert limited.cache_memory == ROOM * engine.kv_bytes_per_token
    with held(limited, ROOM - 2 * 51):
        outs = limited.generate(prompts, **options)
    assert [out.token_ids for out in outs] == expected
    assert all(out.stats.mean_batch <= 2 for out in outs)


def test_small_ones_do_not_overtake_a_large_one(limited: Engine):
    order: list[int] = []

    def first_token(tokens: int, stream: Stream) -> None:
        next(stream)
        order.append(tokens)
        stream.cancel()

    with ThreadPoolExecutor(3) as threads, held(limited, 2000) as before:
        sizes = (2950, 900, 101)  # the last two would fit beside what is held
        futures: list[Future[None]] = []
        for size in sizes:
            futures.append(threads.submit(first_token, size, start(limited, size)))
            time.sleep(0.05)
        assert not any(future.done() for future in futures)
        before.cancel()
        for future in futures:
            future.result(30)
    assert order[0] == 2950 and sorted(order) == sorted(sizes)


def test_who_waits_is_as_free_to_leave(limited: Engine):
    waiting, behind = start(limited, 2000), start(limited, 500)
    with ThreadPoolExecutor(2) as threads, held(limited, 2000):
        futures = [threads.submit(next, stream, None) for stream in (waiting, behind)]
        time.sleep(0.1)
        assert not futures[0].done()
        waiting.cancel()
        assert futures[0].result(30) is None
        assert futures[1].result(30)  # it waited for that one alone
    assert waiting.output.finish_reason == "cancelled"
    assert waiting.output.token_ids == []
    behind.cancel()


@pytest.mark.parametrize(
    "work",
    [
        lambda engine: engine.generate(PROMPT, max_new_tokens=2000),
        lambda engine: engine.generate([PROMPT] * 3, max_new_tokens=2000),
        lambda engine: engine.logits([5] * 2000),
        lambda engine: engine.score([5] * 2000, 1999),
    ],
    ids=["generate", "list", "logits", "score"],
)
def test_a_signal_ends_the_waiting(limited: Engine, alarm, work):  # noqa: F811
    with held(limited, 2000):
        with pytest.raises(Alarm):
            alarm()
            work(limited)
        assert has_room(limited, 1000)


def test_memory_is_free_as_soon_as_a_stream_ends(limited: Engine):
    def refused(ids: list[int]) -> list[int] | None:
        if ids:
            raise ValueError("refused")
        return None

    text = limited.generate(PROMPT, max_new_tokens=20, ignore_eos=True).text
    stopped = start(limited, ROOM, stop=text[10:12])
    assert list(stopped) and stopped.output.finish_reason == "stop"
    assert has_room(limited, ROOM)
    failed = start(limited, ROOM, allowed_tokens=refused)
    next(failed)
    with pytest.raises(ValueError, match="refused"):
        next(failed)
    assert has_room(limited, ROOM)
    cancelled = start(limited, ROOM)
    next(cancelled)
    cancelled.cancel()  # though nobody takes its pieces
    assert has_room(limited, ROOM)
    assert list(cancelled) == [] and cancelled.output.finish_reason == "cancelled"
    dropped = start(limited, ROOM)
    next(dropped)
    assert not has_room(limited, len(PROMPT) + 1)
    del dropped
    assert has_room(limited, ROOM)


def test_it_ends_with_a_grammar(limited: Engine):
    from tdaengine import Grammar

    pytest.importorskip("llguidance")
    stream = start(limited, ROOM, grammar=Grammar.regex("[a-z]{3}"))
    assert "".join(stream) and stream.output.finish_reason == "stop"
    assert has_room(limited, ROOM)


def test_sessions_do_not_count(limited: Engine):
    session = limited.session(10 * ROOM)
    session.prefill(PROMPT)
    assert has_room(limited, ROOM)
    session.decode(5)


def test_what_never_fits_is_refused(limited: Engine):
    each = limited.kv_bytes_per_token
    message = (
        f"cache_memory: found {(ROOM + 1) * each} bytes needed for the KV cache of {ROOM + 1} "
        f"tokens, new ones included, expected at most {ROOM * each}: ask for fewer tokens, or give "
        "the engine more"
    )
    for work in (
        lambda: start(limited, ROOM + 1),
        lambda: limited.logits([5] * (ROOM + 1)),
        lambda: limited.score([5] * (ROOM + 1), 2),
    ):
        with pytest.raises(OptionError, match=message):
            work()
    with pytest.raises(OptionError, match=r"^prompt\[1\]: cache_memory: found "):
        limited.generate([[5], [5] * ROOM], max_new_tokens=1)


def test_async_streams_need_no_thread_that_others_wait_in(limited: Engine):
    """More of them than asyncio has threads."""

    async def whole(i: int) -> str:
        stream = limited.stream([5 + i], max_new_tokens=ROOM - 2000, stop="~", ignore_eos=True)
        pieces: list[str] = []
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == 5:
                break
        stream.cancel()
        return "".join(pieces)

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(whole, range(60)))

    texts = asyncio.run(asyncio.wait_for(all_of_them(), 60))
    assert len(texts) == 60 and all(texts)


def in_child(engine: Engine, expected: list[int]) -> None:
    out = engine.generate(PROMPT, max_new_tokens=ROOM - len(PROMPT), ignore_eos=True)
    assert out.token_ids[:5] == expected
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(list, [start(engine, 2000), start(engine, 2000)]))
    assert has_room(engine, ROOM)


def test_a_child_waits_for_no_thread_of_its_parent(limited: Engine):
    expected = limited.generate(PROMPT, max_new_tokens=5, ignore_eos=True).token_ids
    waiting = start(limited, ROOM)
    with ThreadPoolExecutor(1) as thread, held(limited, ROOM) as before:
        taking = thread.submit(next, waiting)
        time.sleep(0.1)
        assert run_child("fork", in_child, limited, expected) == 0
        before.cancel()
        assert taking.result(30)
    waiting.cancel()
