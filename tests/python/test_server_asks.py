"""The server's log-probabilities, penalties, bias and schemas, by the OpenAI client."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import openai
import pydantic
import pytest
from conftest import MESSAGES, PROMPT
from serving import Server, serving

from tdaengine import Engine

ASKED = {"model": "tiny", "max_tokens": 12, "temperature": 0}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=120)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with serving(folder, "--name", "tiny") as server:
        yield server.client


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[Server]:
    with serving(smollm2, "--weights", "int8", "--name", "smollm2") as server:
        yield server


@pytest.mark.parametrize("top", [None, 0, 3])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3, "presence_penalty": 1}])
def test_logprobs_of_a_chat(client: openai.OpenAI, engine: Engine, top: int | None, sampling: dict):
    expected = engine.chat(
        MESSAGES, max_new_tokens=12, parse_special=False, logprobs=top or 0, **sampling
    )
    asked = {**ASKED, "messages": MESSAGES, "logprobs": True, **sampling}
    asked |= {} if top is None else {"top_logprobs": top}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.message.content == expected.text
    found = choice.logprobs.content
    decode = engine.tokenizer.decode
    for token, place in zip(found, expected.logprobs, strict=True):
        assert token.logprob == place.logprob
        assert token.token == decode([place.token], False)
        assert bytes(token.bytes).decode() == token.token
        best = [(each.token, each.logprob) for each in token.top_logprobs]
        assert best == [(decode([id], False), value) for id, value in place.top]
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += [] if logprobs is None else logprobs.content
        text = "".join(each.token for each in logprobs.content) if logprobs else ""
        assert text == (chunk.choices[0].delta.content or "")
    assert streamed == found


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_of_completions(client: openai.OpenAI, engine: Engine, top: int):
    asked = {"max_tokens": 12, "temperature": 1.2, "seed": 5, "n": 2}
    whole = client.completions.create(model="tiny", prompt=PROMPT, logprobs=top, **asked)
    for i, choice in enumerate(whole.choices):
        expected = engine.generate(
            PROMPT, max_new_tokens=12, temperature=1.2, seed=5 + i, logprobs=top
        )
        found = choice.logprobs
        assert choice.text == expected.text == "".join(found.tokens)
        assert found.token_logprobs == [place.logprob for place in expected.logprobs]
        assert found.text_offset == list(range(len(expected.token_ids)))
        if top == 0:
            assert found.top_logprobs is None
            continue
        for name, value, place, best in zip(
            found.tokens, found.token_logprobs, expected.logprobs, found.top_logprobs, strict=True
        ):
            names = [engine.tokenizer.decode([token], False) for token, _ in place.top]
            assert set(best) == {*names, name} and best[name] == value
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, logprobs=top, stream=True, **asked
    )
    streamed: dict[int, list] = {0: [], 1: []}
    for chunk in stream:
        (choice,) = chunk.choices
        if choice.logprobs is not None:
            each = choice.logprobs
            streamed[choice.index] += zip(each.text_offset, each.token_logprobs, strict=True)
    for choice in whole.choices:
        offsets, values = choice.logprobs.text_offset, choice.logprobs.token_logprobs
        assert streamed[choice.index] == list(zip(offsets, values, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 0.7},
        {"presence_penalty": -1, "frequency_penalty": 0.2},
        {"logit_bias": {40: 5.0, 41: -100}},
    ],
)
def test_penalties_and_bias(client: openai.OpenAI, engine: Engine, options: dict):
    expected = engine.generate(PROMPT, max_new_tokens=30, **options)
    plain = engine.generate(PROMPT, max_new_tokens=30)
    sent = {**options, "max_tokens": 30}
    if "logit_bias" in sent:
        sent["logit_bias"] = {str(token): bias for token, bias in sent["logit_bias"].items()}
    (choice,) = client.completions.create(**{**ASKED, **sent}, prompt=PROMPT).choices
    assert choice.text == expected.text != plain.text


def test_characters_of_several_tokens(real: Server):
    prompt = "Emojis: 😀 😃 😄 😁 😆 😅 😂 🤣 😊 😇 🙂 🙃 😉"
    asked = {"model": real.model, "prompt": prompt, "max_tokens": 20, "temperature": 0}
    (choice,) = real.client.completions.create(**asked, logprobs=1).choices
    assert any(name.startswith("token_id:") for name in choice.logprobs.tokens)
    chat = real.client.chat.completions.create(
        model=real.model,
        messages=[{"role": "user", "content": "Repeat: 😀 😃 😄"}],
        max_tokens=20,
        temperature=0,
        logprobs=True,
    )
    (choice,) = chat.choices
    content = b"".join(bytes(each.bytes) for each in choice.logprobs.content)
    assert content.decode(errors="ignore").startswith(choice.message.content.rstrip("\ufffd"))
    assert all(-50 < each.logprob <= 0 for each in choice.logprobs.content)
    assert math.isclose(choice.logprobs.content[0].logprob, 0, abs_tol=5)


QUESTION = [{"role": "user", "content": "Invent a person with a name and an age, as JSON."}]


def test_a_schema_is_followed(real: Server):
    schema = {**Person.model_json_schema(), "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    asked = {"model": real.model, "messages": QUESTION, "max_tokens": 80}
    for sampling in ({"temperature": 0}, {"temperature": 1.3, "seed": 2, "n": 3}):
        whole = real.client.chat.completions.create(**asked, **sampling, response_format=form)
        for choice in whole.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), schema)
    stream = real.client.chat.completions.create(
        **asked, temperature=0, response_format=form, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert Person.model_validate_json(text)


def test_a_class_is_parsed_by_the_client(real: Server):
    whole = real.client.chat.completions.parse(
        model=real.model, messages=QUESTION, max_tokens=80, temperature=0, response_format=Person
    )
    assert isinstance(whole.choices[0].message.parsed, Person)
    response = real.client.responses.parse(
        model=real.model,
        input=QUESTION[0]["content"],
        max_output_tokens=80,
        temperature=0,
        text_format=Person,
    )
    assert isinstance(response.output_parsed, Person)


def test_any_object(real: Server):
    whole = real.client.chat.completions.create(
        model=real.model,
        messages=[{"role": "user", "content": 'Say exactly this: {"ok": true}'}],
        max_tokens=100,
        temperature=0,
        response_format={"type": "json_object"},
    )
    (choice,) = whole.choices
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_stream_of_responses(real: Server):
    """The client's own accumulator understands the events."""
    asked = {"model": real.model, "input": "What is the capital of France?"}
    with real.client.responses.stream(**asked, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and "response.output_text.delta" in kinds
    whole = real.client.responses.create(**asked, temperature=0)
    assert final.output_text == whole.output_text != ""
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens
