"""Every example in README.md and docs/ does what the page says, with the real model.

A block that is run stands alone: ```python is a program, ```console a list of shell commands behind
"$ ", both in a folder that holds models/SmolLM2-135M-Instruct. A ```text block directly behind it
is what it prints, line by line; since speeds and the late tokens of a text depend on the machine,
of each line the words up to the first figure or the end of a sentence count. "..." stands for any
lines. Blocks of other kinds are not run; the C++ program is that of tests/embed, which CI builds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    page: str
    line: int
    language: str
    source: str
    printed: str | None  # what the page says


def examples_of(text: str, page: str = "page.md") -> list[Example]:
    blocks = list(FENCE.finditer(text))
    found = []
    for i, block in enumerate(blocks):
        if block[1] not in ("python", "console"):
            continue
        printed = None
        if i + 1 < len(blocks) and blocks[i + 1][1] == "text":
            between = text[block.end() : blocks[i + 1].start()]
            printed = blocks[i + 1][2] if not between.strip() else None
        line = text.count("\n", 0, block.start()) + 1
        found.append(Example(page, line, block[1], block[2], printed))
    return found


EXAMPLES = [
    example
    for page in PAGES
    for example in examples_of(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
]


def shell_commands(source: str) -> str:
    """The lines behind "$ ", with those that a backslash continues."""
    kept, continues = [], False
    for line in source.splitlines():
        if line.startswith("$ ") or continues:
            kept.append(line if continues else line[2:])
            continues = line.endswith("\\")
    return "\n".join(kept) + "\n"


def opening(line: str) -> str:
    """The words of a line up to the first figure or the end of a sentence."""
    return " ".join(re.split(r"\d|(?<=[.!?])\s", line.strip(), maxsplit=1)[0].split())


def first_difference(expected: str, found: str) -> str | None:
    """The first line of the page that does not come in what was printed, in order."""
    lines = [opening(line) for line in found.splitlines() if line.strip()]
    at, anywhere = 0, False
    for line in expected.splitlines():
        if not line.strip():
            continue
        if line.strip() == "...":
            anywhere = True
            continue
        wanted = opening(line)
        places = range(at, len(lines)) if anywhere else range(at, min(at + 1, len(lines)))
        place = next((i for i in places if lines[i] == wanted), None)
        if place is None:
            return line
        at, anywhere = place + 1, False
    return None


def fault(text: str) -> str | None:
    """What makes a text not worth reading."""
    words = re.findall(r"[^\W\d_]{2,}", text)
    if not words:
        return "has no words"
    if match := re.search(r"([^\w\s=|#-])(?:\s*\1){3,}", text):
        return f"repeats {match[1]!r}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(lines[i] == lines[i + 1] == lines[i + 2] for i in range(len(lines) - 2)):
        return "repeats a line"
    if match := re.search(r"\b(\w+(?:\W+\w+){0,3})(?:\W+\1\b){3,}", text):
        return f"repeats {match[1]!r}"
    return None


def run(example: Example, folder: Path, model: Path) -> str:
    """What it prints, errors included."""
    (folder / "models").mkdir()
    (folder / "models" / model.name).symlink_to(model.resolve())
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", example.source]
    if example.language == "console":
        command = ["bash", "-euo", "pipefail", "-c", shell_commands(example.source)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e.page}:{e.line}")
def test_example(example: Example, smollm2: Path, tmp_path: Path):
    printed = run(example, tmp_path, smollm2)
    assert fault(printed) is None, printed
    assert "warning: " not in printed and "Warning: " not in printed, printed
    if example.printed is not None:
        assert first_difference(example.printed, printed) is None, printed


def test_there_are_examples():
    assert {example.language for example in EXAMPLES} >= {"python", "console"}
    assert any(example.printed for example in EXAMPLES)


def test_the_cpp_program_is_the_one_that_is_built():
    program = (ROOT / "tests" / "embed" / "main.cpp").read_text()
    blocks = [block[2] for block in FENCE.finditer(PAGES[0].read_text()) if block[1] == "cpp"]
    assert blocks == [program]


# ---- that these tests can fail ------------------------------------------------------------------


def test_blocks_and_what_belongs_to_them():
    page = "```python\na\n```\n\n```text\nA\n```\n```sh\nx\n```\n"
    page += "```console\n$ b \\\n  c\nd\n$ e\n```\nand\n```text\nB\n```\n"
    first, second = examples_of(page)
    assert (first.language, first.source, first.printed) == ("python", "a\n", "A\n")
    assert (second.line, second.printed) == (11, None)
    assert shell_commands(second.source) == "b \\\n  c\ne\n"


@pytest.mark.parametrize(
    "text", ["is the French.\n\n.\n......\n", "", "12 34\n", "a b. a b. a b. a b.", "x\nx\nx\n"]
)
def test_what_is_not_worth_reading(text: str):
    assert fault(text) is not None


def test_what_is_worth_reading():
    assert fault("The capital of France is Paris.\n11 prompt tokens, 52.1 tokens/s\n") is None


def test_lines_are_compared_up_to_figures():
    printed = "The capital is Paris. It lies.\n\n12 tokens\n35.1 tokens/s, all read\n"
    assert first_difference("The capital is Paris. It is.\n...\n99.9 tokens/s\n", printed) is None
    assert first_difference("The capital is Lyon.\n", printed) == "The capital is Lyon."
    assert first_difference("...\nRome.\n", printed) == "Rome."
    assert first_difference("12 tokens\n", printed) == "12 tokens"
