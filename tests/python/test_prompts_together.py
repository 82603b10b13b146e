"""Prompts that begin alike and are prefilled at the same time: what they share is computed once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from serving import serving
from test_concurrency import run_child

from tdaengine import TDA, Engine, PrefixCache

VOCAB = tiny.BASE["vocab_size"]
LONG = 20_000  # tokens, whose prefill takes seconds


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder, device="cpu", threads=1, max_context=2 * LONG)


def ids(seed: int, length: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(3, VOCAB) for _ in range(length)]


def at_once(count: int, call: Callable[[int], object]) -> list:
    barrier = threading.Barrier(count)

    def one(i: int):
        barrier.wait()
        return call(i)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.filterwarnings("ignore::tdaengine.TdaWarning")
@pytest.mark.parametrize(
    "tda, least",  # of 600 tokens, those that all but one have from the one
    [(False, 568), (TDA(active=0.5), 512), (TDA(active=0.4, scope="token"), 312)],
    ids=["dense", "sequence", "token"],
)
def test_equal_prompts_are_prefilled_once(engine: Engine, tda: TDA | bool, least: int):
    prompt = ids(1, 600)
    options = {"max_new_tokens": 8, "temperature": 0.9, "logprobs": 2, "tda": tda}
    expected = [engine.generate(prompt, seed=i, **options) for i in range(8)]
    cache = PrefixCache()
    found = at_once(8, lambda i: engine.generate(prompt, seed=i, prefix_cache=cache, **options))
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    first, *others = sorted(out.stats.cached_tokens for out in found)
    assert first == 0 and least <= others[0] == others[-1] < 600
    assert cache.prompts == 1


def test_longer_prompts_wait_for_their_beginning(engine: Engine):
    """But not for a longer one, most of which they would have no use for."""
    prompt = ids(2, 5000)
    prompts = [prompt, prompt + ids(3, 40), prompt + ids(4, 300)]
    expected = [engine.generate(each, max_new_tokens=5).token_ids for each in prompts]
    cache = PrefixCache()

    def start(prompt: list[int]):
        return engine.stream(prompt, max_new_tokens=5, prefix_cache=cache)

    longest, first, *others = map(start, [ids(2, LONG), *prompts])
    with ThreadPoolExecutor(4) as threads:
        taking = threads.submit(list, longest)
        time.sleep(0.05)
        firsts = threads.submit(list, first)
        time.sleep(0.05)
        rest = [threads.submit(list, other) for other in others]
        firsts.result()
        for each in rest:
            each.result()
        assert not taking.done()
        longest.cancel()
    assert [stream.output.token_ids for stream in (first, *others)] == expected
    assert first.output.stats.cached_tokens == 0
    assert all(4968 <= other.output.stats.cached_tokens <= 5000 for other in others)


def test_prompts_take_turns(engine: Engine):
    """A step each: a short one does not wait for the whole of a long one."""
    short = ids(9, 1500)
    for _ in range(5):
        longs = [engine.stream(ids(9, LONG), max_new_tokens=1) for _ in range(2)]
        with ThreadPoolExecutor(2) as threads:
            taking = [threads.submit(list, long) for long in longs]
            time.sleep(0.05)
            engine.generate(short, max_new_tokens=1)
            assert not any(each.done() for each in taking)
            for long in longs:
                long.cancel()


def test_others_go_on_when_the_first_leaves(engine: Engine):
    prompt = ids(5, LONG)
    short = ids(5, 700)
    cache = PrefixCache()
    expected = engine.generate(short, max_new_tokens=5)
    first = engine.stream(prompt, max_new_tokens=5, prefix_cache=cache)
    others = [engine.stream(prompt, max_new_tokens=5, prefix_cache=cache) for _ in range(3)]
    with ThreadPoolExecutor(4) as threads:
        firsts = threads.submit(list, first)
        time.sleep(0.1)
        rest = [threads.submit(list, other) for other in others]
        time.sleep(0.1)
        # One that waits is as free to leave.
        others[0].cancel()
        until(rest[0].done)
        assert not firsts.done()
        first.cancel()
        until(firsts.done)
        assert not rest[1].done() and not rest[2].done()
        assert engine.generate(short, max_new_tokens=5).token_ids == expected.token_ids
    assert first.output.finish_reason == others[0].output.finish_reason == "cancelled"
    assert first.output.token_ids == others[0].output.token_ids == []
    one, other = (stream.output for stream in others[1:])
    assert one.token_ids == other.token_ids and len(one.token_ids) == 5
    assert sorted((one.stats.cached_tokens, other.stats.cached_tokens))[0] == 0
    assert max(one.stats.cached_tokens, other.stats.cached_tokens) > LONG - 40
    assert cache.prompts == 1


def in_child(engine: Engine, prompt: list[int], cache: PrefixCache, expected: list[int]) -> None:
    out = engine.generate(prompt, max_new_tokens=5, prefix_cache=cache)
    assert out.token_ids == expected and out.stats.cached_tokens == 0


def test_a_child_waits_for_no_thread_of_its_parent(engine: Engine):
    prompt = ids(6, LONG // 2)
    expected = engine.generate(prompt, max_new_tokens=5).token_ids
    cache = PrefixCache()
    stream = engine.stream(prompt, max_new_tokens=5, prefix_cache=cache)
    with ThreadPoolExecutor(1) as thread:
        taking = thread.submit(list, stream)
        time.sleep(0.1)
        assert run_child("fork", in_child, engine, prompt, cache, expected) == 0
        taking.result()
    assert stream.output.token_ids == expected


def test_the_answers_of_one_request_share_their_prompt(folder: Path):
    prompt = ids(8, 500)
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 1.0}
    with serving(folder, "--name", "tiny", "--max-context", "2000") as server:
        create = server.client.completions.create
        together = create(**asked, n=4, seed=7, logprobs=2)
        assert server.metric("prompt_tokens_total") == 4 * 500
        cached = server.metric("cached_tokens_total")
        assert 3 * 468 <= cached < 3 * 500 and cached % 3 == 0
        assert together.usage.prompt_tokens == 500  # of this request, once, as it was computed
        assert together.usage.prompt_tokens_details.cached_tokens == 0
        again = create(**asked, n=2, seed=7)
        assert again.usage.prompt_tokens_details.cached_tokens == cached / 3
    with serving(
        folder, "--name", "tiny", "--max-context", "2000", "--prefix-cache", "0"
    ) as server:
        for i, choice in enumerate(together.choices):
            alone = server.client.completions.create(**asked, seed=7 + i, logprobs=2)
            assert choice.text == alone.choices[0].text
            assert choice.logprobs == alone.choices[0].logprobs
        assert server.metric("cached_tokens_total") == 0
