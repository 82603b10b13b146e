"""Every bad input in BAD_INPUTS.md gives the error that stands beside it.

    python tests/python/test_bad_inputs.py

fills in the table: a new row needs the input alone; "..." in a message stands for anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import predictors
import pytest
import tiny
import tiny_quantized
from checkpoints import write_checkpoint
from conftest import MESSAGES
from error_tables import fill_in
from safetensors.numpy import load_file

import tdaengine
from tdaengine import Engine, cli
from tdaengine.bench import bench
from tdaengine.convert import convert
from tdaengine.evaluate import evaluate
from tdaengine.options import parse_tda

TABLE = Path(__file__).with_name("BAD_INPUTS.md")
# What commands find in their folder.
DATA = {
    "texts.jsonl": b'{"text": "Some text."}\n',
    "empty.jsonl": b"\n",
    "numbers.jsonl": b'{"text": "a"}\n\n{"text": 5}\n',
    "broken.jsonl": b'{"text": "a"}\n{"text": ',
    "latin.jsonl": b'{"text": "\xe9"}\n',
    "new.gguf": b"GGUF" + struct.pack("<IQQ", 4, 0, 0),
    "mxfp4.gguf": b"GGUF" + struct.pack("<IQQQcIQIQ", 3, 1, 0, 1, b"t", 1, 32, 39, 0) + bytes(64),
}


class Row(NamedTuple):
    bad_input: str  # an expression, an assignment or a command line
    error: str = ""
    message: str = ""  # its first line

    @staticmethod
    def parse(line: str) -> Row | None:
        cells = [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        return Row(cells[0][1:-1], *cells[1:]) if cells and cells[0].startswith("`") else None

    def __str__(self) -> str:
        cells = (f"`{self.bad_input}`", self.error, self.message)
        return "".join(f"| {cell.replace('|', chr(92) + '|')} " for cell in cells) + "|"

    def agrees(self, found: Row) -> bool:
        pattern = ".*".join(map(re.escape, self.message.split("...")))
        return self.error == found.error and re.fullmatch(pattern, found.message) is not None


# ---- what the inputs may name -------------------------------------------------------------------


@contextlib.contextmanager
def limit(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def full_disk(call: Callable[[], Any]) -> None:
    """No file may get longer than a few bytes."""
    with limit(resource.RLIMIT_FSIZE, 100):
        call()


def little_memory(call: Callable[[], Any]) -> None:
    """Address space for 256 MiB more than there is now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with limit(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + 2**28):
        call()


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def unreadable(file: Path) -> None:
    """Even for root."""
    file.unlink()
    file.symlink_to("/proc/self/mem")


def nan_at_the_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4] + b"\xff" * 4)


def all_int64(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I64"'))


class World:
    """Carries inputs out, in an empty folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = write_checkpoint(root / "FOLDER")
        engine = Engine(self.folder, threads=1)
        packed = root / "PACKED"
        convert(self.folder, packed, weights="int8")
        self.engine = engine
        self.names = {
            **vars(tdaengine),
            **{f.__name__: f for f in (bench, convert, evaluate, parse_tda)},
            **{f.__name__: f for f in (full_disk, little_memory, missing, truncated, folder)},
            **{f.__name__: f for f in (unreadable, nan_at_the_end, all_int64, self.damaged)},
            "quantized": self.quantized,
            "FOLDER": self.folder,
            "PACKED": packed,
            "MESSAGES": MESSAGES,
            "engine": engine,
            "int8": Engine(packed, threads=1),
            "bare": Engine(tiny.write(root / "bare", "llama"), threads=1),
            "other": Engine(tiny.write(root / "other", "llama_tied"), threads=1),
            "long": Engine(self.folder, device="cpu", threads=1, max_context=2**40),
            "thresholds": engine.calibrate(["Some text."], error=0.2),
            "PREDICTOR": self.predictor("predictor"),
            "EXPERTS": self.predictor("experts", experts=8),
            "bad_predictor": partial(self.predictor, "bad"),
            "nan": math.nan,
            "np": np,
            "pickle": pickle,
        }

    def predictor(
        self, name: str, experts: int = 0, value: float | None = None, **metadata: Any
    ) -> Path:
        """A file of one with rank 8; value: a number that stands in it."""
        layers = predictors.make_layers(self.engine, 8, experts)
        if value is not None:
            layers[1]["second"][0, 0] = value
        path = self.root / f"{name}.safetensors"
        return predictors.write(path, self.engine, layers, **metadata)

    def damaged(self, name: str, change: Any) -> None:
        """Reads all of a checkpoint one file of which has this content, these JSON keys, or went
        through this function.
        """
        copy = self.root / "damaged" / "FOLDER"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        file = copy / name
        if name == "tokenizer.model":  # which is read where there is no
            (copy / "tokenizer.json").unlink()
        if name == "model.safetensors.index.json":
            (copy / "model.safetensors").unlink()
        if callable(change):
            change(file)
        elif isinstance(change, dict):
            before = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(before | change))
        else:
            file.write_bytes(change)
        Engine(copy, threads=1).chat(MESSAGES, max_new_tokens=2)

    def quantized(self, kind: str, config: dict = {}, tensors: dict = {}) -> None:  # noqa: B006
        """Loads a quantised checkpoint with other settings, or other tensors in a layer."""
        copy = self.root / "damaged" / "FOLDER"
        shutil.rmtree(copy, ignore_errors=True)
        tiny_quantized.write(copy, kind)
        settings = json.loads((copy / "config.json").read_text())
        if config is not None:
            config = settings["quantization_config"] | config
        parts = load_file(copy / "model.safetensors")
        parts |= {f"model.layers.1.mlp.up_proj.{name}": value for name, value in tensors.items()}
        shutil.rmtree(copy)
        tiny_quantized.write_folder(
            copy,
            settings | {"quantization_config": config},
            {name: value for name, value in parts.items() if value is not None},
        )
        Engine(copy, threads=1)

    def run(self, bad_input: str) -> Row:
        with tempfile.TemporaryDirectory(dir=self.root) as here:
            before = os.getcwd()
            os.chdir(here)
            try:
                error, message = self._outcome(bad_input)
            finally:
                os.chdir(before)
            left = set(os.listdir(here)) - set(DATA)
            assert not left, f"{bad_input} leaves {left} behind"
            for known in (self.root / "damaged", here, self.root):
                message = message.replace(f"{known}/", "")
        return Row(bad_input, error, message)

    def _outcome(self, bad_input: str) -> tuple[str, str]:
        if bad_input.split(" ")[0] == "tdaengine":
            return self._command(shlex.split(bad_input.replace("FOLDER", str(self.folder)))[1:])
        is_assignment = re.match(r"[^(]*(\([^()]*\))?\.\w+ = ", bad_input)
        try:
            (exec if is_assignment else eval)(bad_input, dict(self.names))
        except Exception as error:
            return type(error).__name__, str(error).split("\n")[0]
        return "none", ""

    def _command(self, arguments: list[str]) -> tuple[str, str]:
        for name, content in DATA.items():
            Path(name).write_bytes(content)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: Any = cli.main(arguments)
            except SystemExit as exited:  # argparse: the usage, then the message
                code = exited.code
        assert out.getvalue() == ""
        *usage, message = err.getvalue().splitlines()
        assert bool(usage) == message.startswith("tdaengine"), usage  # an error is one line
        return f"exit code {code}", message


# ---- the tests ----------------------------------------------------------------------------------

ROWS = [row for row in map(Row.parse, TABLE.read_text().splitlines()) if row]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("row", ROWS, ids=[row.bad_input for row in ROWS])
def test_bad_input(world: World, row: Row):
    if 'device="cuda"' in row.bad_input and os.environ["TDA_DEVICE"] == "cuda":
        pytest.skip("no bad input where there is a GPU")
    found = world.run(row.bad_input)
    assert row.agrees(found), f"found {found}"
    known = [name for name in vars(tdaengine) if name.endswith(("Error", "Overflow"))]
    assert found.error in (*known, "TypeError", "AttributeError", "exit code 2")


def test_the_table_is_large():
    assert len(ROWS) == len({row.bad_input for row in ROWS}) >= 250


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        world = World(Path(root))
        fill_in(TABLE, Row.parse, lambda row: world.run(row.bad_input))
