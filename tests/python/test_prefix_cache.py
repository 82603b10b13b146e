"""Kept prompts: the same bits with them as without, within their limit, on disk and back."""

import json
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny

from tdaengine import TDA, CheckpointError, Engine, GenerateOptions, OptionError, PrefixCache

VOCAB = tiny.BASE["vocab_size"]
OF_NEURONS = [
    False,
    TDA(active=0.5),
    TDA(active=0.4, scope="token"),
    TDA(error=0.2, refresh=3),
    TDA.griffin(0.5),
    TDA.cats(0.5),
]
OF_INPUTS = [False, TDA(inputs=0.3), TDA(inputs=0.1)]
MIXES = {  # of variant, weights, kv: settings
    ("llama", "f32", "auto"): OF_NEURONS,
    ("llama", "bf16c", "auto"): OF_NEURONS,
    ("llama", "int8", "int8"): OF_NEURONS,
    ("llama", "graded", "auto"): OF_INPUTS,
    ("llama", "int4", "auto"): OF_INPUTS,
    ("gemma2", "int8", "int8"): [False, TDA(scope="token", active=0.3)],
    ("gemma3", "bf16", "auto"): OF_NEURONS,
    ("qwen2_sliding", "int8", "auto"): OF_NEURONS,
    ("phi3_sliding", "bf16", "auto"): OF_NEURONS,
}


def open_engine(folder: Path, **options) -> Engine:
    return Engine(folder, device="cpu", threads=2, max_context=2000, **options)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return open_engine(folder, weights="int8")


def ids(numbers: random.Random, length: int) -> list[int]:
    return [numbers.randrange(3, VOCAB) for _ in range(length)]


def related_prompts(numbers: random.Random, count: int) -> list[list[int]]:
    """Each begins like one before, cut anywhere."""
    prompts = [ids(numbers, 500)]
    for _ in range(count - 1):
        begin = numbers.choice(prompts)
        cut = numbers.choice([numbers.randrange(len(begin)), len(begin), 256])
        prompts.append(begin[:cut] + ids(numbers, numbers.choice([1, 2, 17, 90, 300])))
    return [prompt[:900] for prompt in prompts]


@pytest.mark.filterwarnings("ignore::tdaengine.TdaWarning")
@pytest.mark.parametrize("variant, weights, kv", MIXES)
def test_a_prompt_gives_the_same_with_a_cache(tmp_path: Path, variant: str, weights: str, kv: str):
    engine = open_engine(tiny.write(tmp_path / variant, variant), weights=weights, kv=kv)
    numbers = random.Random(len(variant + weights))
    prompts = related_prompts(numbers, 26)
    settings = [numbers.choice(MIXES[variant, weights, kv]) for _ in prompts]
    cache = PrefixCache("8 MiB")

    def output(i: int, **more):
        out = engine.generate(
            prompts[i],
            max_new_tokens=6,
            ignore_eos=True,
            temperature=0.8,
            seed=i,
            logprobs=3,
            tda=settings[i],
            **more,
        )
        return (out.token_ids, out.logprobs, out.stats.ffn_bytes), out.stats.cached_tokens

    def cached(i: int):
        return output(i, prefix_cache=cache)

    expected = [output(i) for i in range(len(prompts))]
    assert all(cached == 0 for _, cached in expected)
    first = [cached(i) for i in range(len(prompts))]
    with ThreadPoolExecutor(4) as threads:  # again, several at a time, in another order
        order = numbers.sample(range(len(prompts)), len(prompts))
        again = dict(zip(order, threads.map(cached, order), strict=True))
    for i, (result, _) in enumerate(expected):
        assert first[i][0] == result
        assert again[i][0] == result
    assert sum(cached for _, cached in first) > 500
    assert sum(cached for _, cached in again.values()) > 500
    assert cache.bytes <= cache.limit


def test_what_of_a_prompt_is_used_again(engine: Engine):
    numbers = random.Random(1)
    prompt = ids(numbers, 400)

    def cached(prompt: list[int], tda: TDA | bool, cache: PrefixCache) -> int:
        options = {"max_new_tokens": 1, "tda": tda, "prefix_cache": cache}
        stats = engine.generate(prompt, **options).stats
        assert stats.prompt_tokens == len(prompt)
        return stats.cached_tokens

    dense = PrefixCache()
    assert cached(prompt, False, dense) == 0
    same = cached(prompt, False, dense)  # all but the last token, in whole panels
    assert 400 - 33 <= same < 400
    assert cached(prompt + ids(numbers, 30), False, dense) >= same
    assert dense.prompts == 1  # the longer one serves both
    assert 90 <= cached(prompt[:123] + ids(numbers, 30), False, dense) <= 123
    assert dense.prompts == 2
    # A statistic has to be gathered first, and is kept for whole steps.
    assert cached(prompt, TDA(active=0.5), dense) == 0
    assert cached(prompt, TDA(active=0.5), dense) == 256
    assert cached(prompt, TDA.griffin(0.5), dense) == 0
    # Thresholds are found on the last 256 tokens, which are computed anew.
    assert 100 < cached(prompt, TDA(scope="token", active=0.5), dense) <= 400 - 256
    dense.clear()
    assert (dense.prompts, dense.bytes) == (0, 0)
    assert cached(prompt, False, dense) == 0


def test_of_an_engine_and_of_a_call(folder: Path):
    engine = open_engine(folder, prefix_cache="1 MiB")
    own = PrefixCache(1 << 20)
    prompt = ids(random.Random(2), 90)
    options = GenerateOptions(max_new_tokens=1, prefix_cache=own)
    assert engine.generate(prompt, max_new_tokens=1).stats.cached_tokens == 0
    assert engine.generate(prompt, options).stats.cached_tokens == 0
    assert engine.generate(prompt, max_new_tokens=1).stats.cached_tokens > 0
    assert own.prompts == 1
    assert "PrefixCache(1 prompts" in repr(options)
    off = open_engine(folder, prefix_cache=0)
    for _ in range(2):
        assert off.generate(prompt, max_new_tokens=1).stats.cached_tokens == 0
    # One cache for two engines of a model.
    other = open_engine(folder, prefix_cache=own)
    assert other.generate(prompt, max_new_tokens=1).stats.cached_tokens > 0


def test_the_least_recently_used_goes(engine: Engine):
    numbers = random.Random(3)
    prompts = [ids(numbers, 100) for _ in range(4)]
    one = PrefixCache()
    engine.generate(prompts[0], max_new_tokens=1, prefix_cache=one)
    cache = PrefixCache(3 * one.bytes)
    for prompt in (*prompts[:3], prompts[0], prompts[3]):
        engine.generate(prompt, max_new_tokens=1, prefix_cache=cache)
    assert (cache.prompts, cache.bytes) == (3, 3 * one.bytes)
    found = [
        engine.generate(prompt, max_new_tokens=1, prefix_cache=cache).stats.cached_tokens > 0
        for prompt in (prompts[0], prompts[2], prompts[3], prompts[1])
    ]
    assert found == [True, True, True, False]
    small = PrefixCache(one.bytes - 1)
    engine.generate(prompts[0], max_new_tokens=1, prefix_cache=small)
    assert (small.prompts, small.bytes) == (0, 0)


def test_a_cancelled_prompt_is_not_kept(engine: Engine):
    cache = PrefixCache()
    stream = engine.stream(ids(random.Random(4), 600), max_new_tokens=5, prefix_cache=cache)
    stream.cancel()
    assert list(stream) == []
    assert cache.prompts == 0


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def filled(engine: Engine) -> PrefixCache:
    numbers = random.Random(5)
    cache = PrefixCache()
    for length, tda in ((300, TDA(active=0.5)), (50, False)):
        engine.generate(ids(numbers, length), max_new_tokens=1, tda=tda, prefix_cache=cache)
    return cache


@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
def test_bytes_are_those_of_what_is_kept(folder: Path, tmp_path: Path, kv: str):
    """As a file holds them, whose length comes of the data themselves."""
    engine = open_engine(folder, kv=kv)
    cache = PrefixCache()
    for length, tda in ((300, TDA(active=0.5)), (64, False)):
        prompt = ids(random.Random(length), length)
        engine.generate(prompt, max_new_tokens=1, tda=tda, prefix_cache=cache)
    cache.save(tmp_path / "chat.prefixes")
    data = (tmp_path / "chat.prefixes").read_bytes()
    (header,) = struct.unpack_from("<Q", data)
    assert cache.bytes == len(data) - 8 - header
    prompts = json.loads(data[8 : 8 + header])["prompts"]
    statistics = sum(each["statistics"] for each in prompts)
    neurons = engine.config.num_layers * engine.config.intermediate_size
    tokens = sum(each["tokens"] for each in prompts)
    assert statistics == 1 and tokens > 300
    rows = cache.bytes - 4 * tokens - 8 * (1 + neurons)
    assert rows == tokens * engine.kv_bytes_per_token


def test_saved_prompts_are_used_in_another_engine(
    filled: PrefixCache, folder: Path, tmp_path: Path
):
    file = tmp_path / "chat.prefixes"
    filled.save(file)
    loaded = PrefixCache()
    loaded.load(file)
    assert (loaded.prompts, loaded.bytes) == (filled.prompts, filled.bytes) == (2, filled.bytes)
    engine = open_engine(folder, weights="int8", prefix_cache=loaded)
    prompt = ids(random.Random(5), 300)
    without = open_engine(folder, weights="int8")
    options = {"max_new_tokens": 5, "ignore_eos": True, "tda": TDA(active=0.5)}
    again = engine.generate(prompt, **options)
    assert again.stats.cached_tokens == 256
    assert again.token_ids == without.generate(prompt, **options).token_ids
    again_saved = tmp_path / "again.prefixes"
    copy = PrefixCache()
    copy.load(file)
    copy.save(again_saved)
    assert again_saved.read_bytes() == file.read_bytes()


def test_damaged_files_are_refused(filled: PrefixCache, tmp_path: Path):
    file = tmp_path / "chat.prefixes"
    filled.save(file)
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    numbers = random.Random(6)

    def refused(data: bytes, message: str = "expected") -> None:
        file.write_bytes(data)
        cache = PrefixCache()
        with pytest.raises(CheckpointError, match=message) as caught:
            cache.load(file)
        assert "chat.prefixes" in str(caught.value)
        assert (cache.prompts, cache.bytes) == (0, 0)

    refused(b"", "no header")
    for end in {*range(1, 8 + length, 7), *numbers.sample(range(len(whole)), 20), len(whole) - 1}:
        refused(whole[:end])
    refused(whole + b"\0")
    for place in numbers.sample(range(8 + length, len(whole)), 60):
        changed = bytearray(whole)
        changed[place] ^= 1 << numbers.randrange(8)
        refused(bytes(changed), "checksum")
    header = json.loads(whole[8 : 8 + length])

    def with_header(**changes: object) -> bytes:
        text = json.dumps({**header, **changes}).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    refused(with_header(format="other"), "format")
    refused(with_header(version=2), "version 2")
    refused(with_header(prompts=5), "prompts")
    refused(with_header(prompts=[]), "expected 0")
    refused(with_header(prompts=[5]), "no (tokens|statistics)")
    refused(with_header(prompts=[{**header["prompts"][0], "estimate": "x"}, header["prompts"][1]]))
    for name in ("token_bytes", "statistic_size"):
        for wrong in (-1, 2**40, 2**63, 1.5, "x", None, header[name] + 1):
            refused(with_header(**{name: wrong}))
    for wrong in (0, -1, 2**40, 2**62, [], header["prompts"][0]["tokens"] + 1):
        refused(with_header(prompts=[{**header["prompts"][0], "tokens": wrong}]))
    for text in (b"{", b"[]", b'{"format": 5}', b"\xff" * 20):
        refused(struct.pack("<Q", len(text)) + text)
    refused(struct.pack("<Q", 2**63) + whole[8:], "header")


def test_files_of_others_are_refused(filled: PrefixCache, folder: Path, tmp_path: Path):
    file = tmp_path / "chat.prefixes"
    with pytest.raises(OptionError, match="no prompts to save"):
        PrefixCache().save(file)
    assert not file.exists()
    filled.save(file)
    with pytest.raises(OptionError, match="limit of 1000"):
        PrefixCache(1000).load(file)
    other = PrefixCache()
    bf16 = open_engine(folder, weights="bf16", prefix_cache=other)
    with pytest.raises(CheckpointError, match=r"weights int8.*weights bf16"):
        other.load(file)
    for options in ({"weights": "bf16"}, {"weights": "int8", "kv": "int8"}):
        with pytest.raises(OptionError, match="prefix_cache: found one of another model"):
            open_engine(folder, prefix_cache=filled, **options)
    with pytest.raises(OptionError, match="prefix_cache: found one of another model"):
        bf16.generate([5], prefix_cache=filled)
    second = tiny.write(tmp_path / "second", "llama_relu")
    with pytest.raises(OptionError, match="fingerprint"):
        open_engine(second, weights="int8", prefix_cache=filled)


def test_dynamic_rope_keeps_nothing(tmp_path: Path):
    folder = tiny.write(tmp_path / "dynamic", "dynamic")
    with pytest.warns(UserWarning, match="nothing is kept of a model with dynamic RoPE"):
        engine = open_engine(folder, prefix_cache="1 MiB")
    for _ in range(2):
        assert engine.generate([5] * 50, max_new_tokens=1).stats.cached_tokens == 0
    with pytest.raises(OptionError, match="expected none: nothing is kept of a model with dynamic"):
        engine.generate([5] * 50, max_new_tokens=1, prefix_cache=PrefixCache())


@pytest.mark.parametrize("limit", [-1, 0, 1.5, "", "5 Kib", "1e3", "-1 MiB", True, None, 2**63])
def test_limits(limit: object):
    with pytest.raises(OptionError, match="limit: found"):
        PrefixCache(limit)


def test_limits_as_text():
    assert PrefixCache(5).limit == PrefixCache("5").limit == 5
    assert PrefixCache("3KiB").limit == 3072
    assert PrefixCache(" 512 MiB").limit == 512 << 20
    assert PrefixCache("2 GiB").limit == 2 << 30
