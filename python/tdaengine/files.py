"""Files, checked: what is read is a regular file within a limit, and what is written can be."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ._native import CheckpointError, Error, OptionError

# In bytes and levels. Far beyond what any checkpoint has: a hostile one must not cost more memory.
MAX_TOKENIZER = 100_000_000  # JSON or SentencePiece; the native module has the same limit
MAX_TEMPLATE = 1_000_000
MAX_DATA = 1_000_000_000  # texts to calibrate or evaluate on, and results
MAX_LINE = 10_000_000  # one text
MAX_JSON_DEPTH = 64  # as in the native module


def open_regular(path: Path, expected: str, error: type[Error] = CheckpointError) -> BinaryIO:
    """Opens a file for reading. Raises an `error` that names it if it is a folder, a pipe, a
    device or the like, any of which could block or never end."""
    try:
        # O_NONBLOCK: else open() would wait for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as reason:  # ValueError: a null character in the name
        raise _failed(path, reason, expected, error) from reason
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise error(f"{path}: found {_kind(mode)}, expected {expected}")


def read(path: Path, expected: str, most: int, error: type[Error] = CheckpointError) -> bytes:
    """All of a regular file of at most `most` bytes. Raises an `error` that names it."""
    with open_regular(path, expected, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise error(f"{path}: found {size} bytes, expected {expected} of at most {most}")
        try:
            content = file.read(size + 1)
        except OSError as reason:
            raise _failed(path, reason, expected, error) from reason
    if len(content) > size:
        raise error(f"{path}: found more than its {size} bytes, expected {expected} at rest")
    return content


def read_text(path: Path, expected: str, most: int) -> str:
    """As `read`, of UTF-8. Raises CheckpointError."""
    try:
        return read(path, expected, most).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json_object(path: Path, optional: bool = False) -> dict[str, Any]:
    """Raises CheckpointError naming the file if it is not a JSON object; `optional`: {} if there is
    no such file."""
    if optional and not os.path.lexists(path):
        return {}
    return parse_json_object(read_text(path, "a JSON file", MAX_TOKENIZER), str(path))


def parse_json_object(text: str, name: str) -> dict[str, Any]:
    """name: of the file. Raises CheckpointError."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}, expected a JSON file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: found {type(content).__name__}, expected a JSON object")
    return content


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line of a JSONL file stands, for messages, and its value; blank lines count for
    nothing. Raises OptionError."""
    with open_regular(path, "a JSONL file", OptionError) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise OptionError(f"{path}: found a line of more than {MAX_LINE} bytes")
            if file.tell() > MAX_DATA:
                raise OptionError(f"{path}: found more than {MAX_DATA} bytes of texts")
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, parse_json(line)
            except ValueError as error:
                raise OptionError(f"{where}: {error}") from error


def read_texts(path: Path) -> list[str]:
    """The field "text" of every line of a JSONL file. Raises OptionError."""
    texts: list[str] = []
    for where, entry in json_lines(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise OptionError(f'{where}: expected {{"text": "..."}}')
        texts.append(entry["text"])
    if not texts:
        raise OptionError(f"{path}: found no texts")
    return texts


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError, also for what is nested too deep, which json.loads alone would only refuse
    with a RecursionError, or leave to be one for whoever walks through the result."""
    too_deep = ValueError(f"JSON has more than {MAX_JSON_DEPTH} levels")
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        parents = [each for each in level if isinstance(each, dict | list)]
        if not parents:
            return value
        level = [
            child
            for each in parents
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    raise too_deep


def check_output(path: str | os.PathLike[str]) -> None:
    """To be called before hours of work. Raises OptionError if no file can be written to `path`, or
    something else than a regular file would be lost; of a symbolic link its target counts."""
    try:
        reason = _why_not_writable(Path(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    if reason is not None:
        raise OptionError(f"{path}: cannot be written: {reason}")


def write(path: Path, content: bytes) -> None:
    """Makes `content` the file's, or leaves what was there; of a symbolic link its target's. Raises
    OSError."""
    target = Path(os.path.realpath(path))
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        new = Path(folder, target.name)
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            new.chmod(stat.S_IMODE(target.stat().st_mode))
        new.replace(target)


def _why_not_writable(path: Path) -> str | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            return "no such folder"
        return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} is read-only"
    if not stat.S_ISREG(status.st_mode):
        return f"found {_kind(status.st_mode)}, expected a regular file or none"
    for number in (1, 2):
        # As /dev/stdout is with `> FILE`: what is printed would be lost with the file replaced.
        if _is_same(status, number):
            return "found a standard stream, expected a file of its own"
    # Mode bits, too: to root access() grants everything.
    if not status.st_mode & 0o222 or not os.access(path, os.W_OK):
        return "found a read-only file"
    return None


def _is_same(status: os.stat_result, descriptor: int) -> bool:
    try:
        return os.path.samestat(status, os.fstat(descriptor))
    except OSError:  # closed
        return False


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def _failed(path: Path, reason: Exception, expected: str, error: type[Error]) -> Error:
    found = getattr(reason, "strerror", None) or str(reason)
    return error(f"{path}: {found}, expected {expected}")
