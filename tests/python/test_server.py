"""The server as clients of the OpenAI API see it: what it answers is what the engine gives."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from conftest import MESSAGES, PROMPT
from serving import Server, serving

from tdaengine import TDA, Engine
from tdaengine.server.fields import IGNORED, REFUSED

DOCUMENT = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")

SETTINGS = {
    "greedy": ({"temperature": 0}, {}),
    "sampled": ({"temperature": 1.2, "top_p": 0.9, "seed": 5}, {"top_k": 20, "min_p": 0.01}),
    "penalty": ({"temperature": 0}, {"repetition_penalty": 1.3}),
}
TDAS = {
    "default": (None, None),
    "dense": (False, False),
    "recommended": (True, TDA()),
    "sequence": ({"active": 0.5}, TDA(active=0.5)),
    "token": ({"scope": "token", "active": 0.4}, TDA(scope="token", active=0.4)),
    "error": ({"error": 0.2}, TDA(error=0.2)),
}


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, "--name", "tiny", "--parallel", "2") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client


def texts(stream) -> dict[int, str]:
    """Of the choices of a stream."""
    found: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk.choices:
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            found[choice.index] = found.get(choice.index, "") + (text or "")
    return found


def test_models(client: openai.OpenAI, engine: Engine):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "tdaengine")
    assert model.fingerprint == engine.fingerprint
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tda", TDAS)
@pytest.mark.filterwarnings("ignore::tdaengine.TdaWarning")
def test_chat_is_the_engines(client: openai.OpenAI, engine: Engine, setting: str, tda: str):
    standard, extra = SETTINGS[setting]
    field, own = TDAS[tda]
    expected = engine.chat(
        MESSAGES, max_new_tokens=30, parse_special=False, tda=own, **standard, **extra
    )
    body = extra if field is None else {**extra, "tda": field}
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, **standard}
    whole = client.chat.completions.create(**asked, extra_body=body)
    (choice,) = whole.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert choice.stats["tda"] == expected.stats.tda
    assert choice.stats["ffn_active"] == expected.stats.ffn_active
    prompt, new = expected.stats.prompt_tokens, expected.stats.new_tokens
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, new)
    assert whole.usage.total_tokens == prompt + new
    stream = client.chat.completions.create(**asked, extra_body=body, stream=True)
    assert texts(stream) == {0: expected.text}


@pytest.mark.parametrize("setting", SETTINGS)
def test_completions_are_the_engines(client: openai.OpenAI, engine: Engine, setting: str):
    standard, extra = SETTINGS[setting]
    ids = engine.tokenizer.encode(PROMPT)
    for prompt in (PROMPT, ids):
        expected = engine.generate(prompt, max_new_tokens=20, **standard, **extra)
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 20, **standard}
        (choice,) = client.completions.create(**asked, extra_body=extra).choices
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
        (choice,) = client.completions.create(**asked, extra_body=extra, echo=True).choices
        assert choice.text == PROMPT + expected.text
        stream = client.completions.create(**asked, extra_body=extra, echo=True, stream=True)
        assert texts(stream) == {0: PROMPT + expected.text}


def test_several_prompts_and_answers(client: openai.OpenAI, engine: Engine):
    prompts = [PROMPT, "The sea", "A"]
    encoded = [engine.tokenizer.encode(prompt) for prompt in prompts]
    expected = [
        engine.generate(prompts[i // 2], max_new_tokens=8, temperature=1.0, seed=7 + i)
        for i in range(6)
    ]
    for prompt in (prompts, encoded):
        asked = {"model": "tiny", "prompt": prompt, "n": 2, "seed": 7, "temperature": 1}
        whole = client.completions.create(**asked, max_tokens=8)
        assert [choice.index for choice in whole.choices] == list(range(6))
        assert [choice.text for choice in whole.choices] == [out.text for out in expected]
        assert whole.usage.prompt_tokens == sum(map(len, encoded))
        assert whole.usage.completion_tokens == sum(out.stats.new_tokens for out in expected)
        stream = client.completions.create(**asked, max_tokens=8, stream=True)
        assert texts(stream) == {i: out.text for i, out in enumerate(expected)}


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: openai.OpenAI):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "temperature": 0, "n": 2}
    whole = client.chat.completions.create(**asked)
    options = {"include_usage": True, "include_stats": True}
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options=options)
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")  # of which some were kept
    assert all(getattr(last.usage, name) == getattr(whole.usage, name) for name in counts)
    assert last.choices == []
    assert all(chunk.usage is None for chunk in chunks)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons.count("length") == 2 and set(reasons) == {None, "length"}
    assert any(hasattr(c.choices[0], "stats") for c in chunks if not c.choices[0].finish_reason)
    assert {chunk.id for chunk in (*chunks, last)} == {last.id}
    roles = [chunk.choices[0].delta.role for chunk in chunks]
    assert roles.count("assistant") == 2


def test_stop(client: openai.OpenAI, engine: Engine):
    text = engine.generate(PROMPT, max_new_tokens=20, temperature=0).text
    stop = [text[7:9], text[12]]
    expected = engine.generate(PROMPT, max_new_tokens=20, temperature=0, stop=stop)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked, stop=stop)
    assert whole.choices[0].text == expected.text and stop[0] not in expected.text
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(expected.token_ids)
    assert texts(client.completions.create(**asked, stop=stop, stream=True)) == {0: expected.text}


def test_an_end_of_text_token_stops(client: openai.OpenAI, engine: Engine):
    """Hot sampling meets it sooner or later; that it can be ignored shows that it was met."""
    options = {"temperature": 100.0, "seed": 3}
    expected = engine.generate(PROMPT, max_new_tokens=110, **options)
    assert expected.finish_reason == "stop"
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 110, **options}
    whole = client.completions.create(**asked)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(expected.token_ids)
    longer = client.completions.create(**asked, extra_body={"ignore_eos": True})
    assert longer.choices[0].finish_reason == "length"
    assert longer.usage.completion_tokens == 110


def test_an_answer_fills_the_context_unless_told_otherwise(client: openai.OpenAI, engine: Engine):
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert whole.usage.total_tokens == engine.max_context


@pytest.mark.parametrize("new", [0, 1])
@pytest.mark.parametrize("top", [0, 1, 5])
def test_log_probabilities_of_a_prompt(client: openai.OpenAI, engine: Engine, new: int, top: int):
    """As lm-eval's local-completions asks for them; the reference is Engine.score, which computes
    them in C++ along the decode path."""
    prompts = [[1, *engine.tokenizer.encode("The cat", False)], [1, 40, 50, 60]]
    whole = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=new, temperature=0, echo=True, logprobs=top
    )
    for ids, choice in zip(prompts, whole.choices, strict=True):
        (first,) = engine.generate(ids, max_new_tokens=1).token_ids
        ids = ids + [first] * new
        found = choice.logprobs
        decode = engine.tokenizer.decode
        assert found.tokens == [decode([token], False) for token in ids]
        assert found.token_logprobs[0] is None
        reference = engine.score(ids, prompt_tokens=1, tda=False)
        np.testing.assert_allclose(found.token_logprobs[1:], reference, rtol=0, atol=1e-5)
        assert choice.text == decode(ids)
        for name, offset in zip(found.tokens, found.text_offset, strict=True):
            assert name == "<s>" or choice.text[offset:].startswith(name)
        if top == 0:
            assert found.top_logprobs is None
            continue
        assert found.top_logprobs[0] is None
        rows = engine.logits(ids)
        for row, best, name in zip(rows, found.top_logprobs[1:], found.tokens[1:], strict=False):
            likeliest = {decode([int(i)], False) for i in row.argsort()[-top:]}
            assert set(best) == likeliest | {name}
    assert whole.usage.completion_tokens == 2 * new


def test_responses(client: openai.OpenAI, engine: Engine):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    expected = engine.chat(messages, max_new_tokens=12, temperature=0, parse_special=False)
    asked = {"model": "tiny", "max_output_tokens": 12, "temperature": 0}
    part = {"type": "input_text", "text": "Hi."}
    for said in (
        {"input": "Hi.", "instructions": "Be brief."},
        {"input": messages},
        {"input": [messages[0], {"role": "user", "content": [part]}]},
    ):
        whole = client.responses.create(**asked, **said)
        assert whole.output_text == expected.text
        assert whole.status == "incomplete"
        assert whole.incomplete_details.reason == "max_output_tokens"
        assert whole.usage.output_tokens == 12
        assert whole.usage.input_tokens == expected.stats.prompt_tokens
        events = list(client.responses.create(**asked, **said, stream=True))
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == expected.text
        assert events[0].type == "response.created"
        assert events[-1].response.output_text == expected.text
        assert [event.sequence_number for event in events] == list(range(len(events)))
    stop = client.responses.create(**asked, input="Hi.").output_text[4:6]
    stopped = client.responses.create(**asked, input="Hi.", extra_body={"stop": stop})
    assert stopped.status == "completed" and stopped.incomplete_details is None


def test_usage_tells_what_was_kept_of_a_prompt(folder: Path):
    engine = Engine(folder, max_context=2000, prefix_cache="64 MiB")
    ids = engine.tokenizer.encode("A long story. " * 50)
    messages = [{"role": "user", "content": "Another story. " * 50}]
    options = ("--name", "tiny", "--max-context", "2000", "--prefix-cache", "64 MiB")
    with serving(folder, *options) as server:
        client, sent, total = server.client, {"model": "tiny", "temperature": 0}, 0
        for _ in range(2):
            out = engine.generate(ids, max_new_tokens=4)
            whole = client.completions.create(**sent, prompt=ids, max_tokens=4)
            assert whole.choices[0].text == out.text
            assert whole.usage.prompt_tokens_details.cached_tokens == out.stats.cached_tokens
            total += out.stats.cached_tokens
        assert total > 0
        for _ in range(2):
            out = engine.chat(messages, max_new_tokens=4, parse_special=False)
            *_, last = client.chat.completions.create(
                **sent,
                messages=messages,
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True},
            )
            assert last.usage.prompt_tokens_details.cached_tokens == out.stats.cached_tokens
            total += out.stats.cached_tokens
        response = client.responses.create(**sent, input=messages, max_output_tokens=4)
        found = response.usage.input_tokens_details.cached_tokens
        assert found == out.stats.cached_tokens > 0
        assert server.metric("cached_tokens_total") == total + found


def test_markdown_for_the_page(server: Server):
    def html(text: str) -> str:
        request = urllib.request.Request(
            f"{server.url}/markdown",
            json.dumps({"text": text}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
            return response.read().decode()

    assert html("*a* <b>\n\n- `c`") == (
        "<p><em>a</em> &lt;b&gt;</p>\n<ul>\n<li><code>c</code></li>\n</ul>\n"
    )
    assert html("[a](https://b.c)") == (
        '<p><a href="https://b.c" target="_blank" rel="noopener noreferrer">a</a></p>\n'
    )
    assert html("[a](javascript:0)") == "<p>[a](javascript:0)</p>\n"
    assert "<td>2</td>" in html("|a|b|\n|-|-|\n|1|2|")
    assert html("*" * 50_001) == f"<pre>{'*' * 50_001}</pre>"


def test_special_tokens_in_messages_stay_text(client: openai.OpenAI, engine: Engine):
    messages = [{"role": "user", "content": "a</s>b"}]
    whole = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=1, temperature=0
    )
    as_text = engine.chat_prompt(messages, parse_special=False)
    assert whole.usage.prompt_tokens == len(as_text) > len(engine.chat_prompt(messages))


def test_what_is_ignored_changes_nothing(client: openai.OpenAI):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 9, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    dressed = client.chat.completions.create(
        **asked,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        frequency_penalty=0.0,
        presence_penalty=0,
        logit_bias={},
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
    )
    assert dressed.choices[0].message == plain.choices[0].message


def test_the_real_model(smollm2: Path):
    """Its text has characters of several tokens, and the server's default is TDA."""
    engine = Engine(smollm2, weights="graded", threads=1)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with serving(smollm2, "--weights", "graded", "--tda") as server:
        assert server.model == smollm2.name
        default = engine.generate("a", max_new_tokens=1, tda=TDA()).stats.tda
        assert server.client.models.list().data[0].tda == default != "dense"
        for field, tda in (
            (None, TDA()),
            (False, False),
            ({"inputs": 0.1, "active": 0.3}, TDA(inputs=0.1, active=0.3)),
        ):
            expected = engine.chat(
                question, parse_special=False, max_new_tokens=12, temperature=0, tda=tda
            )
            stream = server.client.chat.completions.create(
                model=server.model,
                messages=question,
                max_tokens=12,
                temperature=0,
                stream=True,
                extra_body={} if field is None else {"tda": field},
            )
            chunks = list(stream)
            pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
            assert "".join(pieces) == expected.text
            stats = chunks[-1].choices[0].stats
            assert stats["tda"] == expected.stats.tda
            assert stats["bytes_per_token"] == expected.stats.bytes_per_token
            assert len(stats["ffn_active_by_layer"]) == engine.config.num_layers
        prompt = "Emojis: 😀 😃 😄 😁 😆 😅 😂 🤣 😊 😇 🙂 🙃 😉 😌"
        expected = engine.generate(prompt, max_new_tokens=30, tda=TDA())
        assert len(expected.token_ids) > len(expected.text.replace(" ", "")) > 5
        stream = server.client.completions.create(
            model=server.model, prompt=prompt, max_tokens=30, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].text for chunk in stream]
        assert "".join(pieces) == expected.text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


# ---- what docs/server.md says --------------------------------------------------------------------


def test_the_page_names_every_field_that_is_ignored_or_refused():
    for name in (*IGNORED, *REFUSED):
        assert f"`{name}`" in DOCUMENT, name
    for path in ("/v1/responses", "/metrics", "/health", "/v1/models"):
        assert f" {path}`" in DOCUMENT


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_pages_commands(smollm2: Path):
    (block,) = re.findall(r"^```sh\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    serve, curl = block.split("\n", 1)
    program, command, model, *options = shlex.split(serve)
    assert (program, command, Path(model).name) == ("tdaengine", "serve", smollm2.name)
    with serving(smollm2, *options, "--port", "0") as server:
        script = curl.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answer, metrics = done.stdout.split("# HELP", 1)
        (choice,) = json.loads(answer)["choices"]
        assert choice["message"]["content"] == "The capital of Japan is Tokyo."
        assert "tdaengine_generated_tokens_total 7.0" in metrics
