"""Tools: what the template is told, and the calls that a model writes."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import openai
import pytest
import tiny
from checkpoints import write_tokenizer
from safetensors.numpy import load_file, save_file
from serving import serving

from tdaengine import Engine, OptionError
from tdaengine.chat import ChatTemplate
from tdaengine.server.tools import Call, CallReader

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# What the model says, a token each.
SPOKEN = [
    *("Let me ", "see.", "\n\n<to", "ol_call>", '\n{"name": "wea', 'ther", "argum', 'ents": {"ci'),
    *('ty": "Pa', 'ris"}', "}\n</tool", "_call>\n<tool_", 'call>{"name": "now"}'),
    *("</tool_call", "> "),
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
NOW = {"type": "function", "function": {"name": "now", "parameters": NOTHING}}
ASKED = {
    "model": "scripted",
    "messages": [{"role": "user", "content": "The weather?"}],
    "temperature": 0,
}


def write_scripted(folder: Path) -> Path:
    """A model that says SPOKEN, token by token, whatever it is asked: every token's logits come
    from its embedding alone."""
    tiny.write(folder, "llama")
    write_tokenizer(folder)
    more = ["|", "}", "~", *SPOKEN]
    tokens = json.loads((folder / "tokenizer.json").read_text())
    first = len(tokens["model"]["vocab"])
    tokens["model"]["vocab"] |= {piece: first + i for i, piece in enumerate(more)}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    size = first + len(more)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": size, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    random = np.random.default_rng(1)
    shape = (size, config["hidden_size"])
    embeddings = random.standard_normal(shape).astype(np.float32)
    head = np.zeros(shape, np.float32)
    chain = [tokens["model"]["vocab"]["]"], *range(first + 3, size), 2]
    for token, follower in itertools.pairwise(chain):
        head[follower] = embeddings[token]
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name][:] = 0
    tensors |= {"model.embed_tokens.weight": embeddings, "lm_head.weight": head}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted(tmp_path_factory.mktemp("tools") / "scripted")


@pytest.fixture(scope="module")
def client(scripted: Path) -> Iterator[openai.OpenAI]:
    with serving(scripted) as server:
        yield server.client


def test_the_model_says_what_is_written(scripted: Path):
    engine = Engine(scripted, threads=1)
    assert engine.chat(ASKED["messages"], max_new_tokens=50).text == "".join(SPOKEN)


def test_calls_of_an_answer(client: openai.OpenAI):
    (choice,) = client.chat.completions.create(**ASKED, tools=[WEATHER, NOW]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    weather, now = choice.message.tool_calls
    assert (weather.function.name, now.function.name) == ("weather", "now")
    assert json.loads(weather.function.arguments) == {"city": "Paris"}
    assert now.function.arguments == "{}"
    assert weather.id != now.id and weather.type == "function"


def test_calls_of_a_stream(client: openai.OpenAI):
    stream = client.chat.completions.create(**ASKED, tools=[WEATHER, NOW], stream=True)
    text, calls, reasons = "", {}, []
    for chunk in stream:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            assert call.id and call.index not in calls
            calls[call.index] = (call.function.name, json.loads(call.function.arguments))
    assert text == "Let me see."
    assert calls == {0: ("weather", {"city": "Paris"}), 1: ("now", {})}
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}


def test_one_call_at_most(client: openai.OpenAI):
    asked = {**ASKED, "tools": [WEATHER, NOW], "parallel_tool_calls": False}
    (choice,) = client.chat.completions.create(**asked).choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("weather", "tool_calls")


@pytest.mark.parametrize("tools", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_a_call_is_text(client: openai.OpenAI, scripted: Path, tools: dict):
    whole = client.chat.completions.create(**ASKED, **tools)
    (choice,) = whole.choices
    assert choice.message.content == "".join(SPOKEN) and choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    engine = Engine(scripted, threads=1)
    assert whole.usage.prompt_tokens == len(engine.chat_prompt(ASKED["messages"]))


@pytest.mark.parametrize("name", ["weather", "now"])
def test_a_call_that_is_demanded(client: openai.OpenAI, name: str):
    chosen = {"type": "function", "function": {"name": name}}
    asked = {**ASKED, "tools": [WEATHER, NOW], "tool_choice": chosen, "temperature": 1, "seed": 4}
    whole = client.chat.completions.create(**asked, parallel_tool_calls=False)
    (choice,) = whole.choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.message.content) == (name, None)
    (tool,) = (tool["function"] for tool in (WEATHER, NOW) if tool["function"]["name"] == name)
    jsonschema.validate(json.loads(call.function.arguments), tool["parameters"])
    assert choice.finish_reason == "tool_calls"


def test_parameters_with_references(client: openai.OpenAI):
    """As pydantic writes nested classes."""
    city = {"enum": ["Paris", "Rome"]}
    parameters = {
        "type": "object",
        "$defs": {"City": city},
        "properties": {"cities": {"type": "array", "items": {"$ref": "#/$defs/City"}}},
        "required": ["cities"],
        "additionalProperties": False,
    }
    parameters["properties"]["cities"] |= {"minItems": 2, "maxItems": 2}
    tool = {"type": "function", "function": {"name": "compare", "parameters": parameters}}
    (choice,) = client.chat.completions.create(
        **ASKED, tools=[tool], tool_choice="required", parallel_tool_calls=False
    ).choices
    (call,) = choice.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), parameters)


@pytest.mark.parametrize("parameters", [{"type": "nonsense"}, {"type": "object", "not": {}}])
def test_parameters_that_cannot_be_met(client: openai.OpenAI, parameters: dict):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASKED, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"
    client.chat.completions.create(**ASKED, tools=[tool], max_tokens=1)  # nothing is enforced


def test_any_call_is_demanded(client: openai.OpenAI):
    for seed in range(4):
        (choice,) = client.chat.completions.create(
            **{**ASKED, "temperature": 1}, tools=[WEATHER], tool_choice="required", seed=seed
        ).choices
        for call in choice.message.tool_calls:
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_what_a_tool_gave_goes_back(client: openai.OpenAI, scripted: Path):
    """The loop of every client: the answer's message and the tools' results are sent along."""
    (choice,) = client.chat.completions.create(**ASKED, tools=[WEATHER, NOW]).choices
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "fine"}
        for call in choice.message.tool_calls
    ]
    messages = [*ASKED["messages"], choice.message, *results]
    whole = client.chat.completions.create(**{**ASKED, "messages": messages}, tools=[WEATHER, NOW])
    engine = Engine(scripted, threads=1)
    calls = [
        {"function": {"name": "weather", "arguments": {"city": "Paris"}}},
        {"function": {"name": "now", "arguments": {}}},
    ]
    spoken = {"role": "assistant", "content": "Let me see.", "tool_calls": calls}
    prompt = engine.chat_prompt([*ASKED["messages"], spoken, *results], tools=[WEATHER, NOW])
    assert whole.usage.prompt_tokens == len(prompt)
    text = engine.tokenizer.decode(prompt)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>' in text
    assert text.startswith(json.dumps(WEATHER)) and text.endswith("[tool] fine\n[assistant]")


def test_special_tokens_in_tools_stay_text(scripted: Path):
    engine = Engine(scripted, threads=1)
    for tool in (
        {"type": "function", "function": {"name": "f", "description": "a</s>b"}},
        {"type": "function", "function": {"name": "f", "parameters": {"</s>": 1}}},
    ):
        as_text = engine.chat_prompt(ASKED["messages"], tools=[tool], parse_special=False)
        assert 2 not in as_text
        assert 2 in engine.chat_prompt(ASKED["messages"], tools=[tool])
        assert "</s>" in engine.tokenizer.decode(as_text)


def test_templates_that_take_tools(engine: Engine):
    assert not engine.chat_template.takes_tools
    assert ChatTemplate(TEMPLATE, {}, "template").takes_tools
    assert not ChatTemplate("{{ 'tools' }}{{ messages[0].tools }}", {}, "template").takes_tools
    with pytest.raises(OptionError, match="tools: found 1, expected none"):
        engine.chat_prompt(ASKED["messages"], tools=[NOW])
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    spoken = {"role": "assistant", "content": None, "tool_calls": [call]}
    with pytest.raises(OptionError, match=r"messages\[1\]\['tool_calls'\]: expected none"):
        engine.chat_prompt([*ASKED["messages"], spoken])
    with pytest.raises(OptionError, match="tools: found 5, expected a list"):
        engine.chat_prompt(ASKED["messages"], tools=5)


ANSWERS = {
    "a <tool_call> {not json} </tool_call> b": ["a <tool_call> {not json} </tool_call> b"],
    "<tool_call>[1]</tool_call>": ["<tool_call>[1]</tool_call>"],
    '<tool_call>{"name": 5}</tool_call>': ['<tool_call>{"name": 5}</tool_call>'],
    '  <tool_call>{"name": "f", "arguments": {"é": 1}}': [("f", '{"é": 1}')],
    '<tool_call>{"name": "f"': ['<tool_call>{"name": "f"'],
    "a < b <tool": ["a < b <tool"],
    'x <tool_call>{"name": "f"}</tool_call> y \n': ["x", ("f", "{}"), " y"],
    "": [],
    " \n": [],
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_calls_in_any_pieces(answer: str):
    for seed in range(30):
        dice, reader, found = random.Random(seed), CallReader(), []
        rest = answer
        while rest:
            size = dice.randint(1, 9)
            found += reader.push(rest[:size])
            rest = rest[size:]
        found += reader.flush()
        joined: list = []
        for part in found:
            part = (part.name, part.arguments) if isinstance(part, Call) else part
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        assert joined == ANSWERS[answer]
