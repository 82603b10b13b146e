"""The C++ example programs, beside the same from Python."""

import subprocess
from pathlib import Path

from tdaengine import TDA, Engine

BUILD = Path(__file__).parents[2] / "build"


def run(program: str, *arguments: object, lines: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [BUILD / f"tda_{program}", *map(str, arguments)],
        input="".join(line + "\n" for line in lines),
        capture_output=True,
        text=True,
    )


def test_chat(smollm2):
    system, messages, shown = "You are a pirate.", [], ""
    messages.append({"role": "system", "content": system})
    options = {"max_new_tokens": 24, "tda": TDA()}
    engine, lines = Engine(smollm2, weights="int8"), ["Who are you?", "Where do you sail?"]
    for line in lines:
        messages.append({"role": "user", "content": line})
        answer = engine.chat(messages, **options).text
        messages.append({"role": "assistant", "content": answer})
        shown += f"> {answer}\n"
    settings = ["--system", system, "--max-new-tokens", 24, "--weights", "int8"]
    assert run("chat", smollm2, *settings, lines=lines).stdout == shown + "> "


def test_chat_of_another_template(folder):
    """Text around the words as given, the tokenizer's own <s> before them."""
    expected = Engine(folder).generate("[Hi]", max_new_tokens=20).text
    settings = ["--before", "[", "--after", "]", "--max-new-tokens", 20]
    assert run("chat", folder, *settings, lines=["Hi"]).stdout == f"> {expected}\n> "
    refused = run("chat", folder, lines=["Hi"])
    assert refused.returncode == 1
    assert "<|im_start|> is no token of it, expected --before and --after" in refused.stderr


def test_chat_refuses_bad_options(smollm2):
    for arguments, message in [
        ([], "usage: chat MODEL"),
        (["nowhere"], "nowhere: no such folder"),
        ([smollm2, "--wat", 1], "--wat: expected an option and its value"),
        ([smollm2, "--threads"], "--threads: expected an option and its value"),
        ([smollm2, "--threads", "2x"], '--threads: found "2x", expected a number'),
        ([smollm2, "--tda", "0.1"], '--tda: found "0.1", expected on or off'),
        ([smollm2, "--before", "x"], "--before: expected together with --after"),
    ]:
        refused = run("chat", *arguments, lines=["Hi"])
        assert refused.returncode == 1
        assert message in refused.stderr


def test_server_answers_as_if_each_line_were_alone(smollm2):
    lines = ["The sky is", "Two plus two", "", "In Paris", "Once upon a time", "My name is", "a"]
    answers = run("server", smollm2, 3, lines=lines).stdout
    engine = Engine(smollm2, weights="int8")
    expected = [
        f"#{i} {engine.generate(line, max_new_tokens=32, tda=TDA()).text}\n"
        for i, line in enumerate(lines, 1)
        if line
    ]
    assert all(each in answers for each in expected)
    assert "#3 error: " in answers  # an empty prompt, in this model
    assert len(answers) == sum(map(len, expected)) + len(answers.split("#3 ")[1].split("\n")[0]) + 4
