"""Every request in SERVER_ERRORS.md gives the error that stands beside it.

    python tests/python/test_server_errors.py

fills in the table: a new row needs the request alone; "..." in a message stands for anything.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from checkpoints import write_checkpoint
from error_tables import fill_in
from serving import Reply, Server, serving

from tdaengine import OptionError, cli
from tdaengine.server.faults import ApiError, Told

TABLE = Path(__file__).with_name("SERVER_ERRORS.md")
NONE = object()  # leaves a field out
VALID: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"prompt": "a"},
    "responses": {"input": "Hi"},
}


class Row(NamedTuple):
    request: str  # an expression or a command line
    status: str = ""
    code: str = ""
    field: str = ""
    message: str = ""

    @staticmethod
    def parse(line: str) -> Row | None:
        cells = [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        return Row(cells[0][1:-1], *cells[1:]) if cells and cells[0].startswith("`") else None

    def __str__(self) -> str:
        cells = (f"`{self.request}`", *self[1:])
        return "".join(f"| {cell.replace('|', chr(92) + '|')} " for cell in cells) + "|"

    def agrees(self, found: Row) -> bool:
        pattern = ".*".join(map(re.escape, self.message.split("...")))
        return self[:4] == found[:4] and re.fullmatch(pattern, found.message) is not None


class World:
    """Carries requests out."""

    def __init__(self, server: Server, root: Path) -> None:
        self.server, self.root = server, root
        self.names = {
            "NONE": NONE,
            "get": lambda path, key=None: self._ask("GET", path, key),
            "post": lambda path, body, content_type="application/json": self._ask(
                "POST", path, None, body, {"Content-Type": content_type}
            ),
            "chat": lambda **fields: self._post("chat/completions", fields),
            "complete": lambda **fields: self._post("completions", fields),
            "respond": lambda **fields: self._post("responses", fields),
        }
        self.paths = {
            "FOLDER": str(root / "FOLDER"),
            "BARE": str(tiny.write(root / "BARE", "llama")),
            "BROKEN": str(write_checkpoint(root / "BROKEN")),
            "USED": server.url.rsplit(":", 1)[1],
        }
        (root / "BROKEN" / "model.safetensors").write_bytes(b"nothing")

    def _post(self, endpoint: str, fields: dict[str, Any]) -> Reply:
        key = fields.pop("key", None)
        body = {"model": "tiny", **VALID[endpoint], **fields}
        body = {name: value for name, value in body.items() if value is not NONE}
        return self._ask("POST", f"/v1/{endpoint}", key, body)

    def _ask(self, method: str, path: str, key: str | None, *more: Any) -> Reply:
        body, headers = (*more, None, None)[:2]
        given = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.server.ask(method, path, body, {**(headers or {}), **given})

    def run(self, request: str) -> Row:
        if request.startswith("tdaengine "):
            return self._command(request)
        reply = eval(request, dict(self.names))
        assert reply.headers["Content-Type"] == "application/json", reply
        error = reply.json.get("error") or {"code": "none", "param": None, "message": ""}
        assert error.get("type", "none") != "server_error", error
        fields = (error["code"] or "", error["param"] or "", error["message"])
        return Row(request, str(reply.status), *fields)

    def _command(self, request: str) -> Row:
        words = [self.paths.get(word, word) for word in shlex.split(request)[1:]]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: Any = cli.main(words)
            except SystemExit as exited:  # argparse
                code = exited.code
        message = err.getvalue().splitlines()[-1].replace(f"{self.root}/", "")
        assert out.getvalue() == ""
        for name, value in self.paths.items():
            message = message.replace(value, name)
        return Row(request, str(code), "", "", message)


@contextlib.contextmanager
def opened(root: Path) -> Iterator[World]:
    model = write_checkpoint(root / "FOLDER")
    with serving(model, "--name", "tiny", "--cache-memory", "45 KiB", key="right") as server:
        yield World(server, root)


ROWS = [row for row in map(Row.parse, TABLE.read_text().splitlines()) if row]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with opened(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.mark.parametrize("row", ROWS, ids=[row.request for row in ROWS])
def test_error(world: World, row: Row):
    found = world.run(row.request)
    assert row.agrees(found), f"found {found}"
    assert found.status == "2" or 400 <= int(found.status) < 500
    assert str(world.root) not in found.message


def test_the_server_survives_them_all(world: World):
    assert len(ROWS) == len({row.request for row in ROWS}) >= 130
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 3, "temperature": 0}
    whole = world.server.client.completions.create(**asked)
    assert whole.usage.completion_tokens == 3
    assert world.server.metric("running") == 0


def test_paths_are_told_to_the_log_alone(world: World):
    message = {"role": "tool", "content": "Hi", "tool_call_id": "a"}
    for stream in (False, True):
        body = {"model": "tiny", "messages": [message], "stream": stream}
        reply = world.server.ask("POST", "/v1/chat/completions", body)
        told = reply.json["error"]["message"]
        assert told == "messages: refused by the template tokenizer_config.json: no such role: tool"
        (logged,) = [
            line["message"]
            for line in world.server.log()
            if line["event"] == "refused" and line["id"] == reply.headers["X-Request-Id"]
        ]
        assert logged == told.replace("tokenizer_config", f"{world.root}/FOLDER/tokenizer_config")


@pytest.mark.parametrize("name", ["models/m", "models/m.gguf", "m", ".", ".."])
def test_paths_however_the_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    (tmp_path / "models" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    told = Told(Path(name), "tiny")
    for path in (Path(name), tmp_path / name):
        for found, shown in (
            (f"{path}: no chat template", "tiny: no chat template"),
            (f"the template {path}/chat.jinja: x", "the template chat.jinja: x"),
            (f"{path.parent}/n.tda.json: broken", "n.tda.json: broken"),
        ):
            message = told(OptionError(f"a ... b. {found}"), "id").detail
            assert str(tmp_path) not in message and "models" not in message
            if path.is_absolute() and name not in (".", ".."):
                assert message == f"a ... b. {shown}"
    own = ApiError(400, f"what a client wrote: {tmp_path / name}")
    assert told(own, "id") is own


def test_a_missing_extra_is_named(world: World):
    program = "import sys; sys.modules['fastapi'] = None\n"
    program += f"from tdaengine.cli import main; sys.exit(main(['serve', {world.paths['BARE']!r}]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: serve needs fastapi: pip install 'tdaengine[server]'\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root, opened(Path(root)) as world:
        fill_in(TABLE, Row.parse, lambda row: world.run(row.request))
