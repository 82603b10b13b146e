"""Folders that appear complete, with checksums of their files, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ._native import CheckpointError, OptionError

# In the format of `sha256sum`, so that it can be checked without this package, too.
CHECKSUMS = "checksums.sha256"


def check_destination(destination: Path) -> None:
    """Raises OptionError if no new folder can be there."""
    if not destination.parent.is_dir():
        raise OptionError(f"{destination}: {destination.parent} is not a folder, expected one")
    if destination.is_dir():
        if any(destination.iterdir()):
            raise OptionError(f"{destination}: the folder is not empty, expected a new one")
    elif destination.exists() or destination.is_symlink():
        raise OptionError(f"{destination}: found a file, expected a new folder")


@contextlib.contextmanager
def working_folder(destination: Path) -> Iterator[Path]:
    """An empty folder beside the destination, for it is where there is room, that vanishes in the
    end. What a process that was killed has left there is removed first.

    Raises CheckpointError if another process is writing the same destination."""
    with _only_writer(destination):
        folder = _beside(destination, "partial")
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _only_writer(destination: Path) -> Iterator[None]:
    """Holds a lock, which the system takes back however the process ends."""
    path = _beside(destination, "lock")
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, path):
                break
        except BlockingIOError:
            os.close(lock)
            raise CheckpointError(
                f"{destination}: another process is writing it, expected none (its lock: {path})"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # the file has been removed by its last holder meanwhile
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _beside(destination: Path, kind: str) -> Path:
    place = Path(os.path.abspath(destination))  # "." has no name
    return place.parent / f".{place.name}.{kind}"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def publish(folder: Path, destination: Path, sums: dict[str, str]) -> None:
    """Makes the folder the destination, flushed to disk and with checksums. `sums` has those of
    what was to be written, as far as they are known. Raises CheckpointError if a file is not what
    was to be written."""
    lines = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if "\n" in name:
            raise CheckpointError(f"{destination}: found a file named {name!r}, expected one line")
        _fsync(path)
        found = _sha256(path)
        if sums.get(name, found) != found:
            raise CheckpointError(f"{destination}: {name} read back differs from what was written")
        lines.append(f"{found}  {name}\n")
    (folder / CHECKSUMS).write_bytes(os.fsencode("".join(lines)))
    for path in (folder / CHECKSUMS, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _fsync(path)
    folder.rename(destination)
    _fsync(destination.parent)


def verify(folder: Path) -> int:
    """Compares all files that convert wrote to their checksums; how many. Raises CheckpointError
    naming those that differ, or saying that there are no checksums."""
    path = folder / CHECKSUMS
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {CHECKSUMS}, expected the one that convert writes: the folder was made "
            "by another program or an older version"
        )
    sums = {}
    for line in path.read_bytes().splitlines():
        match = re.fullmatch(rb"([0-9a-f]{64})  (\S.*)", line)
        if match is None:
            raise CheckpointError(f"{path}: found {line[:80]!r}, expected a checksum and a name")
        sums[os.fsdecode(match[2])] = match[1].decode()
    wrong = [name for name, expected in sums.items() if _sum_or_none(folder / name) != expected]
    if wrong or not sums:
        raise CheckpointError(
            f"{folder}: {', '.join(wrong) or 'no file'} is not as {CHECKSUMS} says, expected the "
            "files that convert wrote"
        )
    return len(sums)


def _sum_or_none(path: Path) -> str | None:
    try:
        return _sha256(path) if path.is_file() else None
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _sha256(path: Path) -> str:
    """Of what is on disk, not in memory, where the system allows to tell them apart."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
