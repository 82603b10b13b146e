"""Generating on a tiny random model: outputs, streams, stop strings and sampling."""

import asyncio
import json
import random
import shutil

import numpy as np
import pytest
from conftest import MESSAGES, PROMPT

from tdaengine import CalibrateOptions, Engine, GenerateOptions, OptionError, Output
from tdaengine.options import CalibrateKeywords, GenerateKeywords
from tdaengine.stream import StopStrings

# ---- generating ---------------------------------------------------------------------------------


def test_output(engine, dense):
    assert dense.finish_reason == "length"
    assert dense.text == engine.tokenizer.decode(dense.token_ids)
    stats = dense.stats
    assert stats.prompt_tokens == len(engine.tokenizer.encode(PROMPT))
    assert stats.new_tokens == 40
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.tokens_per_second > 0
    assert stats.ffn_active == stats.ffn_bytes_fraction == 1
    assert stats.ffn_active_by_layer == [1, 1]
    assert stats.ffn_coarse_by_layer == [0, 0]
    with pytest.raises(AttributeError):
        dense.text = "frozen"


def test_greedy_follows_the_logits(engine, dense):
    ids = engine.tokenizer.encode(PROMPT) + dense.token_ids
    logits = engine.logits(ids)
    assert (logits.shape, logits.dtype) == ((len(ids), engine.config.vocab_size), np.float32)
    assert logits.argmax(axis=1)[-41:-1].tolist() == dense.token_ids


def test_text_and_token_ids_are_equal_prompts(engine, dense):
    ids = engine.tokenizer.encode(PROMPT)
    for prompt in (ids, tuple(ids), np.array(ids, np.int32), np.array(ids)):
        out = engine.generate(prompt, max_new_tokens=40, ignore_eos=True)
        assert out.token_ids == dense.token_ids


def test_several_prompts(engine):
    options = {"max_new_tokens": 5, "ignore_eos": True}
    texts = [PROMPT, "Other", PROMPT]
    ids = [engine.tokenizer.encode(text) for text in texts]
    each = [engine.generate(text, **options).token_ids for text in texts]
    assert [out.token_ids for out in engine.generate(texts, **options)] == each
    assert [out.token_ids for out in engine.generate(ids, **options)] == each
    assert len(engine.generate([PROMPT], **options)) == 1


def test_options_as_keywords_or_as_an_object(engine, dense):
    options = GenerateOptions(max_new_tokens=40, ignore_eos=True)
    assert engine.generate(PROMPT, options).token_ids == dense.token_ids
    assert engine.generate(PROMPT, max_tokens=40, ignore_eos=True).token_ids == dense.token_ids
    assert "".join(engine.stream(PROMPT, options)) == dense.text
    assert (
        engine.chat(MESSAGES, options).token_ids
        == engine.chat(MESSAGES, max_tokens=40, ignore_eos=True).token_ids
    )
    names = set(GenerateKeywords.__annotations__)
    assert names == {*GenerateOptions.fields, "max_tokens"}
    assert set(CalibrateKeywords.__annotations__) == {*CalibrateOptions.fields} - {"error"}
    for call in (
        lambda: engine.generate(PROMPT, options, temperature=1.0),
        lambda: engine.generate(PROMPT, max_tokens=4, max_new_tokens=4),
        lambda: engine.generate(PROMPT, {"max_new_tokens": 4}),
    ):
        with pytest.raises(OptionError):
            call()


def test_an_output_prints_as_its_text(dense):
    assert str(dense) == f"{dense}" == dense.text
    assert str(Output(None, [1, 2], "length", dense.stats, None)) == "[1, 2]"


def test_several_prompts_have_seeds_of_their_own(engine):
    options = {"temperature": 1.5, "max_new_tokens": 12, "ignore_eos": True}

    def alone(seed: int) -> list[int]:
        return engine.generate(PROMPT, seed=seed, **options).token_ids

    three = [PROMPT] * 3
    drawn = [out.token_ids for out in engine.generate(three, seed=2**64 - 1, **options)]
    assert drawn == [alone(2**64 - 1), alone(0), alone(1)]
    drawn = [out.token_ids for out in engine.generate(three, GenerateOptions(seed=5, **options))]
    assert drawn == [alone(5), alone(6), alone(7)]
    drawn = [out.token_ids for out in engine.generate(three, seed=[5, 5, 1], **options)]
    assert drawn == [alone(5), alone(5), alone(1)]
    with pytest.raises(OptionError, match="found 2, expected one for each of 3"):
        engine.generate(three, seed=[5, 5])
    with pytest.raises(OptionError, match="seed: found"):
        engine.generate(PROMPT, seed=[5])


def test_a_stream_and_a_chat_take_one(engine):
    with pytest.raises(OptionError, match="found a list of 2 prompts, expected one"):
        engine.stream([PROMPT, PROMPT])
    with pytest.raises(OptionError, match="found a list of 2 conversations, expected one"):
        engine.chat([MESSAGES, MESSAGES])


def test_streaming_is_generating(engine, dense):
    stream = engine.stream(PROMPT, max_new_tokens=40, ignore_eos=True)
    assert stream.output.token_ids == []
    pieces = [next(stream), next(stream)]
    assert "".join(pieces) == stream.output.text == dense.text[:2]
    assert stream.output.finish_reason is None
    pieces += stream
    assert "".join(pieces) == stream.output.text == dense.text
    assert stream.output.token_ids == dense.token_ids
    assert stream.output.finish_reason == "length"
    assert next(stream, "ended") == "ended"


def test_stop_strings_see_special_tokens(tmp_path, folder, dense):
    """The same model, with a character for a special token, which the text does not show."""
    other = shutil.copytree(folder, tmp_path / "other")
    hidden = dense.text[7]
    at = dense.text.index(hidden)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = [hidden]
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    engine = Engine(other, threads=1)
    options = {"max_new_tokens": 40, "ignore_eos": True}
    out = engine.generate(PROMPT, **options)
    assert (out.text, out.finish_reason) == (dense.text.replace(hidden, ""), "length")
    out = engine.generate(PROMPT, stop=hidden, **options)
    assert (out.text, out.finish_reason) == (dense.text[:at], "stop")
    assert out.token_ids == dense.token_ids[: at + 1]
    around = dense.text[at - 1 : at + 2]
    out = engine.generate(PROMPT, stop=[around, "\u2028"], **options)
    assert (out.text, out.finish_reason) == (dense.text[: dense.text.index(around)], "stop")
    stream = engine.stream(PROMPT, stop=hidden, **options)
    assert "".join(stream) == dense.text[:at]


def test_stop_strings_with_hidden_text():
    stop = StopStrings(("b<x>c",))
    assert stop.push("ab") == "a"
    assert stop.push("", "<x>") == ""
    assert stop.push("d") == "bd"
    assert [stop.push("b", "<x>"), stop.flush()] == ["", "b"]
    assert [stop.push("zb", "<x>"), stop.push("c"), stop.is_found] == ["z", "", True]
    assert stop.flush() == ""


def test_end_of_text(tmp_path, folder, dense):
    """The same model, with another token for the end."""
    other = shutil.copytree(folder, tmp_path / "other")
    end = dense.token_ids[7]
    (other / "generation_config.json").write_text(f'{{"eos_token_id": [{end}]}}')
    engine = Engine(other, threads=1)
    out = engine.generate(PROMPT, max_new_tokens=40)
    length = dense.token_ids.index(end)
    assert out.token_ids == dense.token_ids[:length]
    assert out.text == dense.text[:length]
    assert out.finish_reason == "stop"
    assert engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True).text == dense.text


# ---- stop strings -------------------------------------------------------------------------------


def check_stop(engine: Engine, dense: Output, stop: str | list[str], end: int, length: int) -> None:
    """The text ends at `end`, after `length` tokens, also in pieces."""
    stream = engine.stream(PROMPT, max_new_tokens=40, ignore_eos=True, stop=stop)
    pieces = list(stream)
    out = stream.output
    assert out.text == "".join(pieces) == dense.text[:end]
    assert out.token_ids == dense.token_ids[:length]
    assert out.finish_reason == ("stop" if length < 40 or end < 40 else "length")
    assert "" not in pieces


@pytest.mark.parametrize("size", [1, 2, 5])
def test_stop_string_over_several_tokens(engine, dense, size):
    stop = dense.text[20 : 20 + size]
    at = dense.text.find(stop)
    check_stop(engine, dense, stop, at, at + size)


def test_stop_string_is_the_whole_text(engine, dense):
    check_stop(engine, dense, dense.text, 0, 40)


def test_beginning_of_a_stop_string_is_held_back_then_returned(engine, dense):
    check_stop(engine, dense, dense.text[10:14] + "\x7f", 40, 40)
    check_stop(engine, dense, dense.text[-3:] + "\x7f", 40, 40)
    stream = engine.stream(PROMPT, max_new_tokens=40, ignore_eos=True, stop=dense.text[:2] + "\x7f")
    assert next(stream) == dense.text[:3]


def test_of_several_stop_strings_the_first_complete_one_counts(engine, dense):
    long, short = dense.text[10:16], dense.text[12:14]
    at = dense.text.find(short)
    check_stop(engine, dense, [long, short], at, at + 2)
    check_stop(engine, dense, ["\x7f", short], at, at + 2)
    at = min(dense.text.find(long), dense.text.find(long[1:]))
    check_stop(engine, dense, (long[1:], long), at, at + 6)


def test_stop_strings_cut_the_same_text_whatever_the_pieces():
    rng = random.Random(0)

    def draw(most: int) -> str:
        return "".join(rng.choices("ab", k=rng.randint(1, most)))

    for _ in range(2000):
        text = draw(20)
        stop = tuple(draw(4) for _ in range(rng.randint(1, 3)))
        ends = [at for at in range(len(text) + 1) if text[:at].endswith(stop)]
        expected = text
        if ends:  # up to the longest stop string of those that are complete first
            longest = max(len(s) for s in stop if text[: ends[0]].endswith(s))
            expected = text[: ends[0] - longest]
        strings, pieces, rest = StopStrings(stop), [], text
        while rest and not strings.is_found:
            size = rng.randint(1, 6)
            pieces.append(strings.push(rest[:size]))
            rest = rest[size:]
        assert "".join(pieces) + strings.flush() == expected, (text, stop)
        assert strings.is_found == bool(ends)


def test_no_stop_strings(engine, dense):
    check_stop(engine, dense, [], 40, 40)


# ---- sampling -----------------------------------------------------------------------------------


def test_seed_decides(engine):
    def draw(seed: int | None) -> list[int]:
        return engine.generate(
            PROMPT, temperature=1.5, seed=seed, max_new_tokens=30, ignore_eos=True
        ).token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    assert draw(2**64 - 1) == draw(2**64 - 1)


def test_one_candidate_is_greedy(engine, dense):
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        out = engine.generate(
            PROMPT, temperature=5.0, max_new_tokens=40, ignore_eos=True, **options
        )
        assert out.text == dense.text


def test_an_empty_text_of_several_is_named(folder, tmp_path):
    """This tokenizer adds no <s>, so that "" has no tokens; nothing is computed before."""
    model = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    engine = Engine(model)
    for prompt, name in (("", "prompt"), (["", "a"], "prompt[0]"), (["a", ""], "prompt[1]")):
        with pytest.raises(OptionError) as info:
            engine.generate(prompt)
        assert str(info.value) == f"{name}: found '', expected at least one token"
    with pytest.raises(OptionError, match=r"texts\[1\]: found '', expected at least one token"):
        engine.calibrate(["a", ""])


def test_a_stream_in_asyncio(engine: Engine, dense: Output):
    async def pieces() -> tuple[list[str], int]:
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(count_turns())
        stream = engine.stream(PROMPT, max_new_tokens=40, ignore_eos=True)
        found = [piece async for piece in stream]
        other.cancel()
        assert stream.output.token_ids == dense.token_ids
        return found, turns

    found, turns = asyncio.run(pieces())
    assert "".join(found) == dense.text and len(found) > 10
    assert turns > len(found)  # others had their turn in between


def test_a_cancelled_task_cancels_its_stream(engine: Engine):
    stream = engine.stream(PROMPT, max_new_tokens=100, ignore_eos=True)

    async def read() -> None:
        async for _ in stream:
            pass

    async def cancel_soon() -> None:
        task = asyncio.create_task(read())
        while not stream.output.token_ids:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_soon())
    list(stream)
    assert stream.output.finish_reason == "cancelled"
    assert len(stream.output.token_ids) < 100
