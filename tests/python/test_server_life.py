"""Many clients, clients that leave, limits, keys, and how a server ends."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from serving import ENDLESS, PATIENCE, Server, serving

from tdaengine import Engine

SECRET_PROMPT = "Xyzzy"
LOAD = Path(__file__).parents[2] / "tools" / "bench" / "load.py"


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """One request at a time, one may wait; a context so long that an answer can take minutes."""
    options = ("--parallel", "1", "--queue", "1", "--max-context", "200000")
    with serving(folder, "--name", "tiny", *options) as server:
        yield server


def endless(server: Server, answers: int = 1):
    """A stream whose first piece is there."""
    stream = server.client.completions.create(
        model="tiny", prompt="a", n=answers, stream=True, **ENDLESS
    )
    next(iter(stream))
    return stream


def leave(server: Server, body: dict) -> socket.socket:
    """Sends a request without reading its answer."""
    place = urlsplit(server.url)
    connection = socket.create_connection((place.hostname, place.port))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def test_a_client_that_leaves_frees_the_engine_within_a_step(server: Server):
    stream = endless(server)
    assert server.metric("running") == 1
    left = time.monotonic()
    stream.close()
    server.wait_for("running", 0, seconds=2)
    short = server.client.completions.create(model="tiny", prompt="a", max_tokens=2)
    assert short.usage.completion_tokens == 2
    assert time.monotonic() - left < 5

    # No stream, and nothing sent back so far: the server has to listen for the end.
    body = {"model": "tiny", "prompt": "a", "max_tokens": 150_000, "ignore_eos": True}
    connection = leave(server, body)
    server.wait_for("running", 1)
    connection.close()
    server.wait_for("running", 0, seconds=2)

    # In the queue, where nothing computes for it yet.
    stream = endless(server)
    connection = leave(server, body)
    server.wait_for("queue_length", 1)
    connection.close()
    server.wait_for("queue_length", 0, seconds=2)
    assert server.metric("running") == 1
    stream.close()
    server.wait_for("running", 0, seconds=2)
    gone = [line["status"] for line in server.log() if line.get("error") == "client_gone"]
    assert sorted(gone) == [200, 200, 499, 499]  # a stream has its 200 already
    # Nor was much written to where nobody listens: asyncio would warn.
    assert {line["level"] for line in server.log()} == {"info"}


def test_a_full_queue_says_when_to_come_back(server: Server):
    stream = endless(server)
    waiting = leave(server, {"model": "tiny", "prompt": "a"})
    server.wait_for("queue_length", 1)
    with pytest.raises(openai.RateLimitError) as caught:
        server.client.completions.create(model="tiny", prompt="a")
    assert caught.value.code == "queue_full"
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
    assert server.ask("GET", "/health").status == 200
    stream.close()
    assert b"200 OK" in waiting.recv(100)
    waiting.close()


def test_first_come_first_served(folder: Path):
    options = ("--parallel", "1", "--max-context", "200000")
    with serving(folder, "--name", "tiny", *options) as server:
        stream = endless(server)
        order: list[int] = []

        def ask(i: int) -> None:
            # Long enough that answers do not overtake each other on the way.
            server.client.completions.create(
                model="tiny", prompt="a", **ENDLESS | {"max_tokens": 3000}
            )
            order.append(i)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for i, thread in enumerate(threads):
            thread.start()
            server.wait_for("queue_length", i + 1)
        stream.close()
        for thread in threads:
            thread.join()
        assert order == list(range(6))


def test_answers_of_one_request_are_decoded_together(folder: Path):
    engine = Engine(folder, max_context=500, threads=1)
    sampling = {"temperature": 1.0, "seed": 3}
    asked = {"model": "tiny", "prompt": ["a", "The sea"], "n": 2, "max_tokens": 400, **sampling}
    extra = {"ignore_eos": True, "stream_options": {"include_usage": True, "include_stats": True}}
    with serving(folder, "--name", "tiny", "--max-context", "500") as server:
        texts, order, batches = [""] * 4, [], []
        for chunk in server.client.completions.create(**asked, stream=True, extra_body=extra):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                order.append(choice.index)
                if choice.finish_reason:
                    batches.append(choice.stats["mean_batch"])
        assert chunk.usage.completion_tokens == 1600
    for i, text in enumerate(texts):
        options = {"max_new_tokens": 400, "temperature": 1.0, "ignore_eos": True}
        assert text == engine.generate(asked["prompt"][i // 2], seed=3 + i, **options).text
    assert min(batches) > 1.2  # 1 if each were alone; 4 where nothing else runs
    switches = sum(one != other for one, other in itertools.pairwise(order))
    assert switches > 100  # one after the other there would be three


def test_each_answer_takes_a_place_of_parallel(folder: Path):
    options = ("--parallel", "2", "--max-context", "200000")
    with serving(folder, "--name", "tiny", *options) as server:
        stream = endless(server, answers=5)
        server.wait_for("running", 2)
        assert server.metric("queue_length") == 1  # it queues once, for its third answer
        waiting = leave(server, {"model": "tiny", "prompt": "a", "n": 5, "max_tokens": 2})
        server.wait_for("queue_length", 2)
        assert server.metric("running") == 2
        left = time.monotonic()
        stream.close()
        assert b"200 OK" in waiting.recv(100)
        waiting.close()
        server.wait_for("running", 0)
        assert time.monotonic() - left < 10
        assert server.metric("queue_length") == 0
        assert {line["level"] for line in server.log()} == {"info"}


def test_a_request_for_many_answers_holds_nobody_up(folder: Path):
    options = ("--parallel", "1", "--queue", "2", "--max-context", "200000")
    asked = {"model": "tiny", "prompt": "a", "n": 5, "stream": True}
    with serving(folder, "--name", "tiny", *options) as server:
        stream = server.client.completions.create(**asked, **ENDLESS | {"max_tokens": 2000})
        ended: list[int] = []

        def read() -> None:
            ended.extend(c.choices[0].index for c in stream if c.choices[0].finish_reason)

        reading = threading.Thread(target=read)
        reading.start()
        server.wait_for("queue_length", 1)  # the same request, for its next answer
        server.client.completions.create(model="tiny", prompt="a", max_tokens=2)
        generated = server.metric("generated_tokens_total")
        assert generated < 3 * 2000
        reading.join()
        assert ended == list(range(5))


@pytest.mark.parametrize("parallel", ["1", "4"])
def test_many_clients_each_get_their_own(folder: Path, engine: Engine, parallel: str):
    """200 requests of 24 clients, some of which leave early or ask for nonsense."""
    options = {"max_tokens": 40, "temperature": 1.0}
    prompts = [f"{i} bottles" for i in range(40)]
    expected = [engine.generate(prompt, seed=i, **options).text for i, prompt in enumerate(prompts)]

    def ask(number: int) -> str:
        chance = random.Random(number)
        i = chance.randrange(len(prompts))
        asked = {"model": "tiny", "prompt": prompts[i], "seed": i, **options}
        kind = chance.choice(("whole", "stream", "stream", "several", "leave", "wrong", "large"))
        if kind == "whole":
            assert server.client.completions.create(**asked).choices[0].text == expected[i]
        elif kind == "stream":
            pieces = server.client.completions.create(**asked, stream=True)
            assert "".join(piece.choices[0].text for piece in pieces) == expected[i]
        elif kind == "several":  # each with the next seed
            asked |= {"prompt": prompts[i : i + 5]}
            found = server.client.completions.create(**asked).choices
            assert [choice.text for choice in found] == expected[i : i + 5]
        elif kind == "leave":
            stream = server.client.completions.create(**asked, n=3, stream=True)
            first = next(iter(stream)).choices[0]
            assert first.index > 0 or expected[i].startswith(first.text)
            stream.close()
        elif kind == "wrong":
            assert server.ask("POST", "/v1/completions", b"{").status == 400
        else:
            with pytest.raises(openai.APIStatusError) as caught:
                server.client.completions.create(**(asked | {"prompt": "a" * 100_000}))
            assert caught.value.status_code == 413
        return kind

    settings = ("--name", "tiny", "--parallel", parallel, "--max-body", "50000")
    with serving(folder, *settings) as server:
        with ThreadPoolExecutor(24) as clients:
            kinds = list(clients.map(ask, range(200)))
        server.wait_for("running", 0)
        assert set(kinds) == {"whole", "stream", "several", "leave", "wrong", "large"}
        posts = [line for line in server.log() if line.get("method") == "POST"]
        assert len(posts) == 200
        assert sum(line["status"] in (200, 499) for line in posts) == 200 - kinds.count(
            "wrong"
        ) - kinds.count("large")
        assert not [line for line in server.log() if line["level"] == "error"]


def test_sigterm_drains(server: Server):
    stream = server.client.completions.create(
        model="tiny", prompt="a", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = iter(stream)
    next(pieces)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(openai.APIConnectionError):
        server.client.models.list()
    last = list(pieces)[-1]
    assert last.choices[0].finish_reason == "length"
    assert last.choices[0].stats["new_tokens"] == 1500
    assert server.process.wait(20) == 0
    assert server.log()[-1]["event"] == "ended"


def test_sigterm_does_not_wait_for_ever(folder: Path):
    with serving(folder, "--name", "tiny", "--max-context", "200000", "--drain", "1") as server:
        stream = endless(server)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
        assert server.process.wait(20) == 0
        assert 1 <= time.monotonic() - started < 10


def test_large_bodies_are_refused_before_they_are_there(folder: Path):
    with serving(folder, "--name", "tiny", "--max-body", "1000") as server:
        assert server.ask("POST", "/v1/completions", b"x" * 1001).status == 413
        chunks = (b"x" * 100 for _ in range(11))  # whose sum no header tells
        assert server.ask("POST", "/v1/completions", chunks).status == 413
        fits = server.ask("POST", "/v1/completions", b"x" * 1000)
        assert fits.json["error"]["code"] == "invalid_json"


def test_the_key(folder: Path):
    with serving(folder, "--name", "tiny", "--cors", "https://a.example", key="s3cret") as server:
        assert server.client.models.list().data
        for given in (
            "",
            "Bearer",
            "Bearer s3cre",
            "Bearer s3cret2",
            "Basic s3cret",
            "Bearer \xe9",
        ):
            headers = {"Authorization": given}
            for path in ("/v1/models", "/metrics", "/v1/none"):
                reply = server.ask("GET", path, headers=headers)
                assert reply.status == 401, given
                assert reply.json["error"]["code"] == "invalid_api_key"
                assert reply.headers["WWW-Authenticate"] == "Bearer"
            assert server.ask("POST", "/v1/completions", b"{", headers).status == 401
            assert server.ask("GET", "/health", headers=headers).status == 200
            assert server.ask("GET", "/", headers=headers).status == 200
        # Other names of the machine are fine with a key, and pages of one origin may ask.
        reply = server.ask("GET", "/v1/models", headers={"Host": "a.example"})
        assert reply.status == 200
        asking = {"Access-Control-Request-Method": "POST", "Authorization": ""}
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            headers = {"Origin": origin, **asking}
            reply = server.ask("OPTIONS", "/v1/completions", headers=headers)
            assert (reply.headers["Access-Control-Allow-Origin"] == origin) == allowed


def test_pages_from_elsewhere_cannot_ask(server: Server):
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    reply = server.ask("OPTIONS", "/v1/completions", headers=preflight)
    assert reply.headers["Access-Control-Allow-Origin"] is None
    # Without a preflight a browser sends this, but no JSON.
    plain = {"Content-Type": "text/plain"}
    body = b'{"model": "tiny", "prompt": "a"}'
    assert server.ask("POST", "/v1/completions", body, plain).status == 400
    # A name that was made to lead here.
    reply = server.ask("GET", "/v1/models", headers={"Host": "evil.example:80"})
    assert (reply.status, reply.json["error"]["code"]) == (403, "wrong_host")
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert server.ask("GET", "/v1/models", headers={"Host": host}).status == 200


def test_metrics_and_log(server: Server):
    asked = {"model": "tiny", "temperature": 0, "extra_body": {"tda": {"active": 0.5}}}
    whole = server.client.completions.create(**asked, prompt=SECRET_PROMPT, max_tokens=9)
    stats = whole.choices[0].stats
    server.ask("GET", "/" + "x" * 20)
    assert server.metric("prompt_tokens_total") == whole.usage.prompt_tokens
    assert server.metric("generated_tokens_total") == 9
    assert server.metric("decoded_tokens_total") == 8
    assert server.metric("read_bytes_total") == 8 * stats["bytes_per_token"]
    assert server.metric("active_tokens_total") == pytest.approx(8 * stats["ffn_active"])
    text = server.ask("GET", "/metrics").body.decode()
    assert 'tdaengine_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert 'tdaengine_requests_total{path="other",status="404"} 1.0' in text
    assert "xxxx" not in text
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(**asked, prompt=SECRET_PROMPT, max_tokens=-1)
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(**asked, prompt=SECRET_PROMPT, n=[SECRET_PROMPT])
    line = next(line for line in server.log() if line.get("path") == "/v1/completions")
    assert (line["status"], line["prompt_tokens"], line["new_tokens"]) == (200, 6, 9)
    assert line["id"] and line["seconds"] >= line["queue_seconds"] >= 0
    log = json.dumps(server.log())
    assert SECRET_PROMPT not in log and whole.choices[0].text not in log
    assert {line["level"] for line in server.log()} == {"info"}
    assert server.stop() == 0


def test_the_load_test_finds_nothing_lost(folder: Path):
    options = ("--parallel", "1", "--queue", "1", "--max-context", "2000")
    with serving(folder, "--name", "tiny", *options) as server:
        command = [sys.executable, str(LOAD), "--url", server.url, "--clients", "12"]
        command += ["--seconds", "6", "--pid", str(server.process.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, "")
        cells = re.findall(r"^\| (.+) \| ([0-9.]+) \|$", done.stdout, re.MULTILINE)
        found = {name: float(value) for name, value in cells}
        answered = {line["path"] for line in server.log() if line.get("status") == 200}
        assert "/v1/chat/completions" in answered
    assert found["complete"] > 0 and "complete without usage" not in found
    assert {"left before an answer", "left in its midst"} & {*found}
    assert found["refused, 429"] > 0 and found["malformed: status 400"] > 0
    assert {"oversized: status 400", "oversized: status 413", "oversized: connection closed"} & {
        *found
    }
    assert found["seconds to the first text, p50"] <= found["seconds to the first text, p95"]
    assert found["MB resident, after"] < found["MB resident, before"] + 100


def test_the_load_test_finds_what_is_lost(folder: Path):
    """On a server that ends in its midst."""
    with serving(folder, "--name", "tiny", "--max-context", "2000", "--drain", "0") as server:
        command = [sys.executable, str(LOAD), "--url", server.url, "--clients", "4"]
        load = subprocess.Popen(
            [*command, "--seconds", "3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while len(server.log()) < 10:
            assert load.poll() is None
        server.process.kill()
        _, problems = load.communicate(timeout=PATIENCE)
        assert load.returncode == 1
        assert "connection closed" in problems and "no answer afterwards" in problems
