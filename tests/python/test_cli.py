"""The command line, through main() and once as a process of its own."""

import argparse
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from importlib.metadata import version

import pytest
from conftest import PROMPT

from tdaengine import TDA, Engine, GenerateOptions, Thresholds, __version__, cli
from tdaengine.conversation import chat_sampling
from tdaengine.stream import Stream

SHORT = ["--max-new-tokens", "8", "--ignore-eos"]
GREEDY = [*SHORT, "--temperature", "0"]


@pytest.fixture
def run(capsys):
    """main() of some arguments -> exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def typed(monkeypatch):
    """Sets what the user types; then comes Ctrl-D."""

    def use(*lines: str) -> None:
        rest = list(lines)

        def answer(_: str = "") -> str:
            if not rest:
                raise EOFError
            return rest.pop(0)

        monkeypatch.setattr("builtins.input", answer)

    return use


@pytest.fixture(scope="module")
def expected(engine: Engine) -> str:
    return engine.generate(PROMPT, max_new_tokens=8, ignore_eos=True).text


# ---- generate -----------------------------------------------------------------------------------


def test_generate(run, folder, expected):
    code, out, err = run("generate", folder, PROMPT, *SHORT)
    assert (code, out) == (0, expected + "\n")
    lines = err.splitlines()
    assert lines[0].startswith("11 prompt tokens, 8 new, ") and lines[0].endswith("MB per token")
    assert lines[1:] == ["cut at 8 tokens; --max-new-tokens and --max-context set how many"]


def test_generate_json(run, folder, expected):
    code, out, err = run("generate", folder, PROMPT, *SHORT, "--json")
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert (result["text"], result["finish_reason"]) == (expected, "length")
    assert len(result["token_ids"]) == result["stats"]["new_tokens"] == 8
    assert result["stats"]["ffn_active_by_layer"] == [1, 1]


def test_every_sampling_option_arrives(run, folder, monkeypatch):
    options = {
        "max_new_tokens": 12,
        "temperature": 1.3,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "logprobs": 2,
        "seed": 7,
    }
    assert {*options, "ignore_eos", "logit_bias", "prefix_cache"} == set(GenerateOptions.fields)
    stream, seen = Engine.stream, {}
    monkeypatch.setattr(
        Engine, "stream", lambda self, prompt, **o: seen.update(o) or stream(self, prompt, **o)
    )
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    code, out, _ = run("generate", folder, PROMPT, *given, "--ignore-eos", "--json")
    assert code == 0
    assert seen == {**options, "ignore_eos": True, "stop": None, "grammar": None}
    result = json.loads(out)
    assert [each["token"] for each in result["logprobs"]] == result["token_ids"]
    assert all(each["logprob"] <= 0 and len(each["top"]) == 2 for each in result["logprobs"])


def test_generate_json_by_a_schema(run, folder, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"enum": ["red", "green"]}))
    code, out, _ = run("generate", folder, PROMPT, *SHORT, "--json-schema", file)
    assert (code, json.loads(out) in ("red", "green")) == (0, True)


def test_generate_stop(run, folder, expected):
    arguments = ("--stop", "\x7f", "--stop", expected[4:6])
    _, out, _ = run("generate", folder, PROMPT, *SHORT, *arguments)
    assert out == expected[: expected.find(expected[4:6])] + "\n"


@pytest.mark.parametrize(
    ("arguments", "tda"),
    [
        (["--tda", "error=0.3"], {"error": 0.3}),
        (["--tda", "active=0.5"], {"active": 0.5}),
        (["--tda", "active=0.25,refresh=3"], {"active": 0.25, "refresh": 3}),
    ],
)
def test_generate_with_tda(run, folder, engine, arguments, tda):
    _, out, _ = run("generate", folder, PROMPT, *SHORT, *arguments, "--json")
    result = json.loads(out)
    same = engine.generate(PROMPT, max_new_tokens=8, ignore_eos=True, tda=TDA(**tda))
    assert result["token_ids"] == same.token_ids
    assert result["stats"]["ffn_active"] == same.stats.ffn_active < 1


def test_generate_by_input(run, folder):
    arguments = ("--weights", "graded", "--tda", "inputs=0.1", "--json")
    code, out, _ = run("generate", folder, PROMPT, *SHORT, *arguments)
    assert code == 0
    assert json.loads(out)["stats"]["head_bytes_fraction"] < 1


def test_the_recommended_setting_and_its_words(run, folder):
    """What --tda alone means, and where it is told."""
    graded = Engine(folder, weights="graded")
    arguments = ("generate", folder, PROMPT, *SHORT, "--weights", "graded", "--tda")
    _, out, err = run(*arguments)
    same = graded.generate(PROMPT, max_new_tokens=8, ignore_eos=True, tda=TDA())
    by_hand = TDA(inputs=0.2)
    assert (
        same.token_ids
        == graded.generate(PROMPT, max_new_tokens=8, ignore_eos=True, tda=by_hand).token_ids
    )
    words = "by input: 20% of inputs and 10% of neurons at 8 bits, the others at 4"
    assert (out, same.stats.tda) == (f"{same}\n", words)
    assert f"\nTDA: {words}; used " in err
    assert "warning" not in err
    stats = json.loads(run(*arguments, "--json")[1])["stats"]
    assert (stats["tda"], stats["warnings"]) == (words, [])
    assert stats["ffn_bytes_fraction"] == same.stats.ffn_bytes_fraction < 1
    _, _, err = run("generate", folder, PROMPT, *SHORT, "--tda")
    dense = 'dense: with f32 weights no setting is faster at little loss; weights="graded" has one'
    assert f"\nTDA: {dense}\n" in err
    assert "TDA" not in run("generate", folder, PROMPT, *SHORT, "--tda", "off")[2]


def test_warnings_are_told_once(run, typed, folder):
    _, _, err = run("generate", folder, PROMPT, *SHORT, "--tda", "active=0.95")
    assert err.count("warning: a sequence mask from a prompt of under 64 tokens") == 1
    typed("Hi.", "More.")
    _, out, err = run("chat", folder, *GREEDY, "--tda", "active=0.95")
    assert len(out.splitlines()) == 2
    assert err.count("warning: ") == 1


# ---- prompts ------------------------------------------------------------------------------------


def test_prompts_from_a_file_and_from_standard_input(run, folder, expected, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert run("generate", folder, "--file", tmp_path / "prompt.txt", *SHORT)[1] == expected + "\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode() + b"\r\n")))
    assert run("generate", folder, "-", *SHORT)[1] == expected + "\n"
    asked = run("chat", folder, "--message", PROMPT, *GREEDY)[1]
    assert run("chat", folder, "--file", tmp_path / "prompt.txt", *GREEDY)[1] == asked


# ---- chat ---------------------------------------------------------------------------------------


def test_chat_message(run, folder, engine):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    expected = engine.chat(messages, max_new_tokens=8, ignore_eos=True)
    arguments = ("chat", folder, "--system", "Be brief.", "--message", "Hi.", *GREEDY)
    code, out, _ = run(*arguments)
    assert (code, out) == (0, expected.text + "\n")
    _, out, _ = run(*arguments, "--json")
    assert json.loads(out)["token_ids"] == expected.token_ids


def test_chat_remembers_until_reset(run, typed, folder, engine):
    def ask(*messages: str) -> str:
        roles = ("user", "assistant", "user")
        turns = [{"role": r, "content": m} for r, m in zip(roles, messages, strict=False)]
        return engine.chat(turns, max_new_tokens=8, ignore_eos=True).text

    first = ask("Hi.")
    second = ask("Hi.", first, "More.")
    typed("Hi.", "", "More.", "/reset", "Hi.", "/exit", "never asked")
    code, out, _ = run("chat", folder, *GREEDY)
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n")


def test_chat_goes_on_after_an_error(run, typed, folder):
    typed("x" * 200, "Hi.")
    code, out, err = run("chat", folder, *GREEDY)
    assert code == 0
    assert err.startswith("error: ")
    assert "max_context 128" in err
    assert len(out) == 9


def test_chat_commands(run, typed, folder, engine, tmp_path):
    file = tmp_path / "chat.json"
    typed("/help", "/system Be brief.", "Hi.", f"/save {file}", "/save", "/what", "/system", "Hi.")
    code, out, err = run("chat", folder, *GREEDY)
    options = {"max_new_tokens": 8, "ignore_eos": True}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    first = engine.chat(messages, **options).text
    messages.append({"role": "assistant", "content": first})
    assert json.loads(file.read_text()) == messages
    second = engine.chat([*messages[1:], {"role": "user", "content": "Hi."}], **options).text
    assert (code, out.split("\n")[-3:]) == (0, [first, second, ""])
    for name in ("/help", "/reset", "/system TEXT", "/save FILE", "/exit"):
        assert f"\n{name} " in "\n" + out
    assert "error: /save: expected /save FILE" in err
    assert "error: /what: no such command, /help lists them" in err


def test_chat_goes_on_until_the_context_is_full(run, typed, folder, engine):
    """The model's context is 128 tokens, each a character."""
    typed("Hi.", "More.", "Still more.", "And more.")
    code, out, err = run("chat", folder, *GREEDY, "--ignore-eos", "--max-new-tokens", "30")
    assert code == 0 and "error" not in err
    assert len(out) == 4 * 31
    answers = [out[at : at + 30] for at in range(0, len(out), 31)]
    assert err.count("context full: the oldest 2 messages are left out") == 2
    left = ["Still more.", answers[2], "And more."]
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, left, strict=True)]
    assert engine.chat(messages, max_new_tokens=30, ignore_eos=True).text == answers[3]
    # Without a limit one answer takes what is left.
    _, out, err = run("chat", folder, "--message", "Hi.", "--ignore-eos", "--temperature", "0")
    prompt = len(engine.chat_prompt([{"role": "user", "content": "Hi."}]))
    assert len(out) - 1 == 128 - prompt
    assert f"cut at {128 - prompt} tokens" in err


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"temperature": 0.7, "top_p": 0.9}),
        ({"eos_token_id": 2, "top_p": None}, {"temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}),
        ({"do_sample": True}, {"temperature": 1.0, "top_p": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1},
        ),
        (
            {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1},
            {"repetition_penalty": 1.1},
        ),
    ],
)
def test_chat_samples_as_the_checkpoint_says(tmp_path, config, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert chat_sampling(tmp_path) == expected


def test_chat_samples_unless_told_otherwise(run, folder, monkeypatch):
    stream, seen = Engine.stream, []
    monkeypatch.setattr(
        Engine, "stream", lambda self, prompt, **o: seen.append(o) or stream(self, prompt, **o)
    )
    run("chat", folder, "--message", "Hi.", *SHORT, "--top-p", "0.5")
    run("chat", folder, "--message", "Hi.", *GREEDY)
    assert [(o["temperature"], o["top_p"]) for o in seen] == [(0.7, 0.5), (0, 0.9)]


def test_interrupt_stops_the_answer_not_the_chat(run, typed, folder, monkeypatch):
    advance, calls = Stream.__next__, []

    def interrupted(stream: Stream) -> str:
        calls.append(stream)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return advance(stream)

    monkeypatch.setattr(Stream, "__next__", interrupted)
    typed("Hi.", "More.")
    code, out, _ = run("chat", folder, *GREEDY)
    assert code == 0
    assert [len(line) for line in out.splitlines()] == [2, 8]


def test_interrupt_elsewhere_ends_with_130(run, folder, monkeypatch):
    def interrupted(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert run("chat", folder)[0] == 130


# ---- calibrate, info, convert -------------------------------------------------------------------


def test_calibrate_then_generate(run, folder, engine, tmp_path):
    data, output = tmp_path / "texts.jsonl", tmp_path / "thresholds.json"
    data.write_text('{"text": "One text."}\n\n{"text": "Another.", "id": 2}\n')
    code, out, err = run("calibrate", folder, "--data", data, "--error", "0.3", "-o", output)
    assert code == 0
    assert "thresholds of 2 layers" in out
    assert "2/2" in err  # the progress bar
    thresholds = Thresholds.load(str(output))
    assert (thresholds.texts, thresholds.error) == (2, 0.3)
    assert thresholds.values == engine.calibrate(["One text.", "Another."], error=0.3).values

    _, out, _ = run("generate", folder, PROMPT, *SHORT, "--tda", f"thresholds={output}", "--json")
    assert json.loads(out)["stats"]["ffn_active"] < 1


def test_calibrate_json(run, folder, tmp_path):
    data, output = tmp_path / "texts.jsonl", tmp_path / "thresholds.json"
    data.write_text('{"text": "One text."}')
    code, out, err = run("calibrate", folder, "--data", data, "-o", output, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["error"] == 0.1
    assert result["values"] == Thresholds.load(str(output)).values


def test_calibrate_losses_into_the_folder(run, folder, tmp_path):
    """Where TDA(loss=...) looks for them without being told."""
    model, data = tmp_path / "model", tmp_path / "texts.jsonl"
    shutil.copytree(folder, model)
    data.write_text('{"text": "One text."}\n{"text": "Another."}')
    code, out, _ = run("calibrate", model, "--weights", "graded", "--data", data)
    assert code == 0
    assert "inputs 0.5" in out
    assert out.count("%") == 2 * len(Thresholds.load(model / "tda.json").inputs)
    setting = ("--weights", "graded", "--tda", "loss=0.1", "--json")
    code, out, _ = run("generate", model, PROMPT, *SHORT, *setting)
    assert "for a loss of 10%" in json.loads(out)["stats"]["tda"]


def test_info(run, folder, engine):
    code, out, _ = run("info", folder, "--json")
    info = json.loads(out)
    assert code == 0
    assert info["fingerprint"] == engine.fingerprint
    assert info["config"]["rope"]["theta"] == 10000
    assert info["config"]["intermediate_size"] == 80
    # 2 layers of q and o [48, 48], k and v [24, 48], three FFN matrices [80, 48] and two norms
    # [48]; embedding and head [96, 48], the last norm.
    assert info["parameters"] == 2 * (6 * 48 * 24 + 3 * 80 * 48 + 96) + 2 * 96 * 48 + 48
    assert set(info["files"]) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {(each["format"], each["bits_per_weight"]) for each in info["matrices"]} == {("f32", 32)}
    assert [(each["matrices"], each["layers"]) for each in info["matrices"]] == [
        ("embedding", 0),
        ("q, k, v", 2),
        ("attention output", 2),
        ("gate, up", 2),
        ("down", 2),
        ("head", 0),
    ]
    assert 32 < info["bits_per_weight"] < 34  # vectors are padded
    code, out, _ = run("info", folder)
    assert code == 0
    assert re.search(r"  gate, up +f32, 32\.00 bits per weight\n", out)
    assert engine.fingerprint in out
    assert f"{info['parameters']:,}" in out


def test_convert(run, folder, tmp_path, expected):
    code, out, _ = run("convert", folder, tmp_path / "new", "--dtype", "f32", "--json")
    assert code == 0
    assert "model.safetensors" in json.loads(out)["files"]
    assert run("generate", tmp_path / "new", PROMPT, *SHORT)[1] == expected + "\n"
    code, out, err = run("convert", folder, tmp_path / "newer")
    assert code == 0
    assert "bytes in" in out
    assert "100%" in err


# ---- help ---------------------------------------------------------------------------------------


def parsers() -> dict[str, argparse.ArgumentParser]:
    parser = cli.make_parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {"tdaengine": parser, **commands.choices}


@pytest.mark.parametrize("command", parsers())
def test_every_option_has_help_and_tells_its_default(command):
    parser = parsers()[command]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert all(choice.help for choice in action._choices_actions)
            continue
        name = action.option_strings or action.dest
        assert action.help and action.help is not argparse.SUPPRESS, name
        if action.option_strings and not action.required and action.dest not in ("help", "version"):
            assert "(default: " in action.help, name
            assert "None" not in action.help and "SUPPRESS" not in action.help, name
    assert parser.format_help()  # no stray % in it


# ---- a process ----------------------------------------------------------------------------------


def process(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "tdaengine", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        # As in a terminal, also where the tests themselves run with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_process(folder, expected):
    with process("generate", folder, PROMPT, *SHORT) as child:
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, expected + "\n")
    assert "tokens/s" in err
    with process("generate", "absent", PROMPT) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["generate", "{}", PROMPT, *SHORT], ["info", "{}"]])
def test_nobody_reads_the_output(folder, monkeypatch, arguments):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with process(*(argument.format(folder) for argument in arguments)) as child:
        child.stdout.close()
        child.stdout = None
        _, err = child.communicate(timeout=60)
    assert child.returncode == 141
    assert err == ""


def test_interrupted_process(folder):
    with process("chat", folder, *SHORT) as child:
        child.stdin.write("Hi.\n")
        child.stdin.flush()
        late = threading.Timer(60, child.kill)
        late.start()
        printed = ""  # the answer, which may have several lines, and the next question's prompt
        while not printed.endswith("\n> "):
            character = child.stdout.read(1)
            assert character, f"the chat ended after {printed!r}"
            printed += character
        late.cancel()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__ == version("tdaengine")
