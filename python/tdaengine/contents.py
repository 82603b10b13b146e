"""What stands beside a checkpoint's weights, by the names of files: those of a folder, or what a
GGUF file says in their place."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from . import _native
from .files import MAX_TOKENIZER, parse_json_object, read


class Contents:
    """The files of a checkpoint folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def of(checkpoint: str | os.PathLike[str] | Contents) -> Contents:
        """checkpoint: a folder or a GGUF file."""
        if isinstance(checkpoint, Contents):
            return checkpoint
        path = Path(checkpoint)
        return GgufContents(path) if os.path.isfile(path) else Contents(path)

    def label(self, name: str) -> str:
        """Where `name` is, for messages."""
        return str(self.path / name)

    def has(self, name: str) -> bool:
        """A link that leads nowhere counts: reading it says what is wrong."""
        return os.path.lexists(self.path / name)

    def named(self, folder: str, suffix: str) -> dict[str, str]:
        """Of the files of a folder within that end so: name without suffix -> name."""
        found = (self.path / folder).glob(f"*{suffix}")
        return {path.name.removesuffix(suffix): f"{folder}/{path.name}" for path in found}

    def read(self, name: str, expected: str, most: int) -> bytes:
        """Raises CheckpointError, as the methods that follow."""
        return read(self.path / name, expected, most)

    def text(self, name: str, expected: str, most: int) -> str:
        try:
            return self.read(name, expected, most).decode()
        except UnicodeDecodeError as error:
            raise _native.CheckpointError(f"{self.label(name)}: {error}") from error

    def json_object(self, name: str) -> dict[str, Any]:
        """{} if there is no such file."""
        if not self.has(name):
            return {}
        return parse_json_object(self.text(name, "a JSON file", MAX_TOKENIZER), self.label(name))


class GgufContents(Contents):
    """What convert would write beside the weights, read when it is needed."""

    @cached_property
    def _files(self) -> dict[str, bytes]:
        model = _native.GgufModel(str(self.path))
        return {"config.json": model.config.encode(), **model.tokenizer_files()}

    def label(self, name: str) -> str:
        return f"{self.path} ({name})"

    def has(self, name: str) -> bool:
        return name in self._files

    def named(self, folder: str, suffix: str) -> dict[str, str]:
        return {}

    def read(self, name: str, expected: str, most: int) -> bytes:
        content = self._files[name]
        if len(content) > most:
            raise _native.CheckpointError(
                f"{self.label(name)}: found {len(content)} bytes, expected {expected} of at most "
                f"{most}"
            )
        return content


def thresholds_file(checkpoint: Path) -> Path:
    """Where the engine looks for thresholds: in a folder, or beside a GGUF file."""
    if checkpoint.is_dir():
        return checkpoint / "tda.json"
    return checkpoint.with_suffix(".tda.json")
