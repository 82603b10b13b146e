"""The command line, through main() and once as a process of its own."""

import json
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import PROMPT

from tdaengine import TDA, Engine, GenerateOptions, Thresholds, __version__, cli
from tdaengine.engine import Stream

SHORT = ["--max-new-tokens", "8", "--ignore-eos"]


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
    assert err.startswith("11 prompt tokens, 8 new, ")
    assert err.endswith("100% of FFN neurons, 100% of FFN bytes\n")


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
        "seed": 7,
    }
    assert {*options, "ignore_eos"} == set(GenerateOptions.fields)
    stream, seen = Engine.stream, {}
    monkeypatch.setattr(
        Engine, "stream", lambda self, prompt, **o: seen.update(o) or stream(self, prompt, **o)
    )
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert run("generate", folder, PROMPT, *given, "--ignore-eos")[0] == 0
    assert seen == {**options, "ignore_eos": True, "stop": None}


def test_generate_stop(run, folder, expected):
    arguments = ("--stop", "\x7f", "--stop", expected[4:6])
    _, out, _ = run("generate", folder, PROMPT, *SHORT, *arguments)
    assert out == expected[: expected.find(expected[4:6])] + "\n"


@pytest.mark.parametrize(
    ("arguments", "tda"),
    [
        (["--tda-error", "0.3"], {"error": 0.3}),
        (["--tda-active", "0.5"], {"active": 0.5}),
        (["--tda-active", "0.25", "--refresh", "3"], {"active": 0.25, "refresh": 3}),
    ],
)
def test_generate_with_tda(run, folder, engine, arguments, tda):
    _, out, _ = run("generate", folder, PROMPT, *SHORT, *arguments, "--json")
    result = json.loads(out)
    same = engine.generate(PROMPT, max_new_tokens=8, ignore_eos=True, tda=TDA(**tda))
    assert result["token_ids"] == same.token_ids
    assert result["stats"]["ffn_active"] == same.stats.ffn_active < 1


def test_generate_with_a_sparse_head(run, folder):
    arguments = ("--weights", "int8", "--tda-active", "0.5", "--tda-head", "0.5", "--json")
    code, out, _ = run("generate", folder, PROMPT, *SHORT, *arguments)
    assert code == 0
    assert json.loads(out)["stats"]["head_bytes_fraction"] < 1


# ---- chat ---------------------------------------------------------------------------------------


def test_chat_message(run, folder, engine):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    expected = engine.chat(messages, max_new_tokens=8, ignore_eos=True)
    arguments = ("chat", folder, "--system", "Be brief.", "--message", "Hi.", *SHORT)
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
    code, out, _ = run("chat", folder, *SHORT)
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n")


def test_chat_goes_on_after_an_error(run, typed, folder):
    typed("x" * 200, "Hi.")
    code, out, err = run("chat", folder, *SHORT)
    assert code == 0
    assert err.startswith("error: ")
    assert "max_context 128" in err
    assert len(out) == 9


def test_interrupt_stops_the_answer_not_the_chat(run, typed, folder, monkeypatch):
    advance, calls = Stream.__next__, []

    def interrupted(stream: Stream) -> str:
        calls.append(stream)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return advance(stream)

    monkeypatch.setattr(Stream, "__next__", interrupted)
    typed("Hi.", "More.")
    code, out, _ = run("chat", folder, *SHORT)
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

    _, out, _ = run("generate", folder, PROMPT, *SHORT, "--tda-thresholds", output, "--json")
    assert json.loads(out)["stats"]["ffn_active"] < 1


def test_calibrate_json(run, folder, tmp_path):
    data, output = tmp_path / "texts.jsonl", tmp_path / "thresholds.json"
    data.write_text('{"text": "One text."}')
    code, out, err = run("calibrate", folder, "--data", data, "-o", output, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["error"] == 0.1
    assert result["values"] == Thresholds.load(str(output)).values


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
    code, out, _ = run("info", folder)
    assert code == 0
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


# ---- errors -------------------------------------------------------------------------------------


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
        child.stdout.readline()  # the answer
        assert child.stdout.read(2) == "> "  # now it waits for more
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__ == version("tdaengine")
