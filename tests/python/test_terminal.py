"""What is printed: on terminals, in encodings with few letters, to nobody, to full disks."""

import io
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from checkpoints import TEMPLATE
from tokenizers import Tokenizer, decoders, models

from tdaengine import Engine, cli
from tdaengine.terminal import Output

EMOJI, ESCAPE, BIDI = "\N{SLIGHTLY SMILING FACE}", "\x1b]0;owned\x07", "\u202e\x9b31m\r"
SHORT = ["--max-new-tokens", "6", "--ignore-eos"]


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a buffer still holds at the end of a process must not fail there."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that says nothing but emojis, controls, tabs and newlines."""
    folder = tiny.write(tmp_path_factory.mktemp("checkpoints") / "odd", "llama")
    texts = [EMOJI, "\x1b", "]0;owned\x07", BIDI, "\t", "\n"]
    vocabulary = {"a": 0} | {texts[i % 6] + "\u200b" * (i // 6): i + 1 for i in range(95)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tdaengine", *map(str, arguments)]


def shell(redirection: str, *arguments: object, stdin: str = "", **variables: str):
    """Runs a command with the redirection of a shell, as 2>&-."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command(*arguments)],
        input=stdin.encode(),
        capture_output=True,
        timeout=60,
        env=os.environ | variables,
        check=False,
    )


def on_a_terminal(*arguments: object) -> tuple[int, str]:
    return seen_by_a_terminal(command(*arguments))


def seen_by_a_terminal(program: list[str], typed: bytes = b"") -> tuple[int, str]:
    """Exit code and what a terminal gets to see, of both streams and of what is typed."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(program[0], program)
    os.write(terminal, typed)
    seen = b""
    try:
        while select.select([terminal], [], [], 60)[0] and (part := os.read(terminal, 4096)):
            seen += part
    except OSError:  # the other end is closed
        pass
    status = os.waitpid(child, 0)[1]
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), seen.decode().replace("\r\n", "\n")


def is_harmless(text: str) -> bool:
    return not set(text) & set("\x1b\x07\x9b\r\u202e")


# ---- encodings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "utf-16", "latin-1:replace"])
def test_every_encoding_takes_every_text(odd: Path, encoding: str):
    text = Engine(odd, threads=1).generate("a", max_new_tokens=40, ignore_eos=True).text
    assert {EMOJI, BIDI[0]} <= set(text)
    arguments = ("generate", odd, "a", "--max-new-tokens", 40, "--ignore-eos")
    done = shell("", *arguments, PYTHONIOENCODING=encoding)
    name, _, errors = encoding.partition(":")
    expected = text.encode(name, errors or "backslashreplace")
    assert done.returncode == 0
    assert done.stdout.decode(name) == expected.decode(name) + "\n"
    assert b"40 new" in done.stderr.replace(b"\0", b"")


def test_json_is_ascii(odd: Path):
    text = Engine(odd, threads=1).generate("a", max_new_tokens=40, ignore_eos=True).text
    arguments = ("generate", odd, "a", "--max-new-tokens", 40, "--ignore-eos", "--json")
    done = shell("", *arguments, PYTHONIOENCODING="ascii")
    assert is_harmless(done.stdout.decode("ascii"))
    assert json.loads(done.stdout)["text"] == text


def test_names_of_raw_bytes(tmp_path: Path):
    """Linux allows any bytes in a file's name."""
    done = shell("", "info", os.fsdecode(b"caf\xe9"))
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"no such folder" in done.stderr
    assert b"Traceback" not in done.stderr


def test_what_is_typed_may_be_no_text(folder: Path):
    arguments = command("chat", folder, *SHORT, "--temperature", "0")
    done = subprocess.run(
        arguments, input=b"caf\xe9\nHi.\n", capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert done.stderr.startswith(b"error: text: found '\\udce9' at position ")
    assert len(done.stdout.split(b"\n")[0]) == len("> > ") + 6


# ---- terminals ----------------------------------------------------------------------------------


def test_a_terminal_obeys_nothing(odd: Path):
    engine = Engine(odd, threads=1)
    text = engine.generate("a", max_new_tokens=40, ignore_eos=True).text
    assert not is_harmless(text)
    code, seen = on_a_terminal("generate", odd, "a", "--max-new-tokens", 40, "--ignore-eos")
    for raw in "\x1b\x07\x9b\r\u202e":
        text = text.replace(raw, repr(raw)[1:-1].replace("\\r", "\\x0d"))
    assert (code, is_harmless(text)) == (0, True)
    assert f"\r{text}\n1 prompt tokens, 40 new" in seen  # behind the bar of packing


def test_names_and_messages_on_a_terminal(tmp_path: Path, folder: Path):
    hostile = tmp_path / f"a{ESCAPE}"
    for arguments in (
        ["info", hostile],
        ["generate", folder, "x", f"--{ESCAPE}"],
        ["generate", folder, "x", "--tda", f"thresholds={hostile}"],
    ):
        code, seen = on_a_terminal(*arguments)
        assert code == 2
        assert "\\x1b]0;owned\\x07" in seen
        assert is_harmless(seen)


def test_template_errors_on_a_terminal(odd: Path, tmp_path: Path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in odd.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text('{{ raise_exception("\x1b[31mno\x9b") }}')
    code, seen = on_a_terminal("chat", folder, "--message", "a")
    assert code == 2
    message = seen.rpartition("\r")[2]  # behind the bar of packing
    assert message.endswith("\\x1b[31mno\\x9b\n")
    assert is_harmless(message)


def test_bars_still_move(folder: Path, tmp_path: Path):
    code, seen = on_a_terminal("convert", folder, tmp_path / "new")
    assert code == 0
    assert "\r100%" in seen


def test_the_example_chat_on_a_terminal(odd: Path):
    """One turn, and Ctrl-D."""
    text = Engine(odd, threads=1).generate("aa", max_new_tokens=40).text
    assert not is_harmless(text)
    chat = Path(__file__).parents[2] / "build" / "tda_chat"
    program = [str(chat), str(odd), "--before", "a", "--after", "", "--max-new-tokens", "40"]
    code, seen = seen_by_a_terminal(program, b"a\n\x04")
    for raw in "\x1b\x07\x9b\r\u202e":
        text = text.replace(raw, repr(raw)[1:-1].replace("\\r", "\\x0d"))
    assert (code, is_harmless(seen)) == (0, True)
    assert f"> {text}\n> " in seen
    code, seen = seen_by_a_terminal([str(chat), f"a{ESCAPE}"])
    assert code == 1
    assert "a\\x1b]0;owned\\x07: no such folder" in seen


def test_pieces_are_escaped_one_by_one():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    for piece in ("a\x1b", "[31", "m\u2066\n\tb", EMOJI, "\udc9b", "\x7f\x85"):
        print(piece, end="", file=Output(stream))
    assert stream.getvalue() == f"a\\x1b[31m\\u2066\n\tb{EMOJI}\\udc9b\\x7f\\x85"


# ---- streams that are closed or full ------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(engine: Engine) -> bytes:
    return engine.generate("The sky", max_new_tokens=6, ignore_eos=True).text.encode() + b"\n"


@pytest.mark.parametrize("redirection", ["<&- 2>&-", "2>/dev/full", "2</dev/null"])
def test_work_goes_on_without_messages(folder: Path, expected: bytes, redirection: str):
    done = shell(redirection, "generate", folder, "The sky", *SHORT)
    assert (done.returncode, done.stdout) == (0, expected)
    assert (done.stderr == b"") == ("2" in redirection)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_conversion_goes_on_without_a_bar(folder: Path, tmp_path: Path, redirection: str):
    done = shell(redirection, "convert", folder, tmp_path / "new", "--weights", "int8")
    assert done.returncode == 0
    assert b"bytes in" in done.stdout
    assert Engine(tmp_path / "new", threads=1).weights == "int8"


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        (">&-", b"Bad file descriptor"),
        (">/dev/full", b"No space left on device"),
        ("1</dev/null", b"Bad file descriptor"),
    ],
)
@pytest.mark.parametrize("arguments", [["generate", "{}", "x", *SHORT], ["--help"]])
def test_output_that_is_lost_is_an_error(folder, redirection, reason, arguments):
    done = shell(redirection, *(argument.format(folder) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == b"error: standard output: " + reason
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", "<&- >&- 2>&-"])
def test_nowhere_to_tell(folder: Path, redirection: str):
    done = shell(redirection, "generate", folder, "x", *SHORT)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.mark.parametrize("redirection", ["<&-", "</dev/null"])
def test_chat_without_input_ends(folder: Path, redirection: str):
    done = shell(redirection, "chat", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"> ", b"")


def test_a_file_does_not_take_a_closed_streams_number(folder: Path, tmp_path: Path):
    """Else a library's message on descriptor 2 would end up in it."""
    program = (
        "import os, sys\n"
        "from tdaengine import terminal\n"
        "with terminal.standard_streams():\n"
        "    file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "    sys.exit(0 if file > 2 else 1)\n"
    )
    for redirection in ("2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            [
                "sh",
                "-c",
                f'"$@" {redirection}',
                "sh",
                sys.executable,
                "-c",
                program,
                tmp_path / "x",
            ],
            timeout=60,
            check=False,
        )
        assert done.returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_that_nobody_reads(unbuffered: str):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("evaluate", "--help"),
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_streams_are_given_back(capsys, folder: Path):
    before = sys.stdin, sys.stdout, sys.stderr
    assert cli.main(["info", str(folder)]) == 0
    assert (sys.stdin, sys.stdout, sys.stderr) == before
