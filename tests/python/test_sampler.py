"""What clients ask of a sampler: penalties, bias, log-probabilities, masks; against NumPy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import PROMPT

from tdaengine import TDA, Engine, GenerateOptions, OptionError, TokenLogprobs

COUNT = 30
SETTINGS = {
    "presence": {"presence_penalty": 1.7},
    "negative": {"presence_penalty": -0.6, "frequency_penalty": -0.1},
    "frequency": {"frequency_penalty": 0.6},
    "bias": {"logit_bias": {40: 3.0, 41: -2.5, 50: -100.0}},
    "all": {
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {40: 2.0, 70: -100},
    },
}


def reference(engine: Engine, prompt: list[int], options: dict) -> list[int]:
    """Greedy decoding in NumPy over the logits of a session."""
    session = engine.session(len(prompt) + COUNT)
    logits, new = session.prefill(prompt), []
    while True:
        values = logits.astype(np.float64)
        for token, bias in options.get("logit_bias", {}).items():
            values[token] += -np.inf if bias == -100 else bias
        penalty = options.get("repetition_penalty", 1.0)
        for token in {*prompt, *new}:
            values[token] *= penalty if values[token] < 0 else 1 / penalty
        for token, count in Counter(new).items():
            values[token] -= options.get("presence_penalty", 0)
            values[token] -= options.get("frequency_penalty", 0) * count
        new.append(int(values.argmax()))
        if len(new) == COUNT:
            return new
        logits = session.decode(new[-1])


@pytest.mark.parametrize("setting", SETTINGS)
def test_penalties_and_bias(engine: Engine, setting: str):
    options = SETTINGS[setting]
    out = engine.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True, **options)
    plain = engine.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True)
    assert out.token_ids == reference(engine, engine.tokenizer.encode(PROMPT), options)
    assert out.token_ids != plain.token_ids and plain.logprobs is None


@pytest.mark.parametrize("tda", [None, TDA(active=0.5), TDA(scope="token", active=0.4)])
@pytest.mark.filterwarnings("ignore::tdaengine.TdaWarning")
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "seed": 4}, {"presence_penalty": 2}])
def test_logprobs_are_the_models_own(engine: Engine, tda: TDA | None, sampling: dict):
    ids = engine.tokenizer.encode(PROMPT)
    asked = {"max_new_tokens": 12, "ignore_eos": True, "tda": tda, **sampling}
    plain = engine.generate(ids, **asked)
    out = engine.generate(ids, logprobs=4, **asked)
    assert (out.token_ids, out.text) == (plain.token_ids, plain.text)
    assert [each.token for each in out.logprobs] == out.token_ids
    scores = engine.score(ids + out.token_ids, len(ids), tda=tda or False)
    assert [each.logprob for each in out.logprobs] == scores.tolist()
    if tda is None:
        rows = engine.logits(ids + out.token_ids)[len(ids) - 1 : -1].astype(np.float64)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        for row, each in zip(rows, out.logprobs, strict=True):
            best = np.argsort(-row, kind="stable")[:4]
            assert [token for token, _ in each.top] == best.tolist()
            np.testing.assert_allclose([value for _, value in each.top], row[best], atol=1e-5)


def test_logprobs_come_with_a_stream(engine: Engine):
    whole = engine.generate(PROMPT, max_new_tokens=8, logprobs=0)
    stream = engine.stream(PROMPT, max_new_tokens=8, logprobs=0)
    seen = [len(stream.output.logprobs) for _ in stream]
    assert seen == sorted(seen) and seen[0] >= 1
    assert stream.output.logprobs == whole.logprobs
    assert all(isinstance(each, TokenLogprobs) and each.top == [] for each in whole.logprobs)


def test_a_function_allows_tokens(engine: Engine):
    seen = []

    def odd_then_all(ids: list[int]) -> list[int] | None:
        seen.append(ids)
        return None if len(ids) > 5 else [41, 43, 45]

    out = engine.generate(PROMPT, max_new_tokens=10, ignore_eos=True, allowed_tokens=odd_then_all)
    assert seen == [out.token_ids[:i] for i in range(10)]
    assert set(out.token_ids[:6]) <= {41, 43, 45}
    prompt = engine.tokenizer.encode(PROMPT) + out.token_ids[:6]
    free = engine.generate(prompt, max_new_tokens=4, ignore_eos=True)
    assert out.token_ids[6:] == free.token_ids
    several = engine.generate([PROMPT, PROMPT], max_new_tokens=2, allowed_tokens=lambda ids: [60])
    assert [each.token_ids for each in several] == [[60, 60]] * 2
    as_array = engine.generate(
        PROMPT, max_new_tokens=1, allowed_tokens=lambda ids: np.array([7], np.int32)
    )
    assert as_array.token_ids == [7]


def test_a_function_that_fails_ends_the_stream(engine: Engine):
    def fail(ids: list[int]) -> None:
        if len(ids) == 2:
            raise KeyError("mine")

    stream = engine.stream(PROMPT, max_new_tokens=10, allowed_tokens=fail)
    with pytest.raises(KeyError, match="mine"):
        list(stream)
    assert stream.output.finish_reason == "cancelled"
    assert len(stream.output.token_ids) == 2
    assert list(stream) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {96: 1.0}}, "logit_bias: token 96: expected 0 to 95"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: token -1: expected 0 to 95"),
        ({"allowed_tokens": lambda ids: [96]}, "allowed_tokens: found token 96, expected 0 to 95"),
        ({"allowed_tokens": lambda ids: [-1]}, "allowed_tokens: found token -1, expected 0 to 95"),
        ({"allowed_tokens": lambda ids: ["a"]}, r"found \['a'\], expected token ids"),
        ({"allowed_tokens": lambda ids: []}, "found no token that may come next, expected one"),
        ({"allowed_tokens": [5]}, r"found \[5\], expected a function of the token ids so far"),
    ],
)
def test_wrong_ids(engine: Engine, options: dict, message: str):
    with pytest.raises(OptionError, match=message):
        engine.generate(PROMPT, max_new_tokens=4, **options)


def test_options_keep_what_they_are_given():
    options = GenerateOptions(logit_bias={5: 1, 7: -2.5}, logprobs=0, presence_penalty=1)
    assert (options.logit_bias, options.logprobs) == ({5: 1.0, 7: -2.5}, 0)
    assert "logprobs=0" in repr(options) and "frequency_penalty" not in repr(options)
    many = GenerateOptions(logit_bias={i: 1.0 for i in range(9)})
    assert repr(many) == "GenerateOptions(logit_bias={9 items})"


def test_the_real_model(smollm2: Path):
    """8 bits of the head are read for the likeliest tokens alone; scores and logprobs agree."""
    engine = Engine(smollm2, weights="int8", threads=1)
    ids = engine.tokenizer.encode("The capital of France is")
    out = engine.generate(ids, max_new_tokens=6, tda=TDA(), logprobs=3)
    assert out.text.startswith(" Paris")
    scores = engine.score(ids + out.token_ids, len(ids), tda=TDA())
    assert [each.logprob for each in out.logprobs] == scores.tolist()
    assert all(each.top[0][0] == each.token and len(each.top) == 3 for each in out.logprobs)
    paris = out.token_ids[0]
    without = engine.generate(ids, max_new_tokens=6, logit_bias={paris: -100})
    assert paris not in without.token_ids
