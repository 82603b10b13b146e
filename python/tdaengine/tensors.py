"""Tensors on their way from one file to another: read lazily, cast, written one at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ._native import CheckpointError
from .files import open_regular

# How NumPy holds each dtype; it has no bf16, whose bits travel as u16.
STORAGE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor still in its file. `read` returns its values as STORAGE[dtype], of any shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    read: Callable[[], np.ndarray]


def read_array(path: Path, dtype: np.dtype[Any], count: int, offset: int) -> np.ndarray:
    """`count` numbers from byte `offset` of a file on. Raises CheckpointError."""
    try:
        values = np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if len(values) != count:
        raise CheckpointError(
            f"{path}: found {len(values)} numbers from byte {offset} on, expected {count}: "
            "the file has become shorter"
        )
    return values


def read_safetensors(path: Path) -> Iterator[Tensor]:
    """The tensors of one file, in the order of its data. Raises CheckpointError."""
    open_regular(path, "a safetensors file").close()  # safe_open would wait for a pipe's other end
    try:
        with safe_open(path, framework="np"):
            pass  # the package checks the header and its offsets
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}, expected a safetensors file") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        dtype = entry["dtype"]
        if dtype not in STORAGE:
            raise CheckpointError(
                f'{path}: tensor "{name}" has dtype {dtype}, expected {", ".join(STORAGE)}'
            )
        count = (end - begin) // STORAGE[dtype].itemsize

        def read(
            offset: int = 8 + size + begin, dtype: str = dtype, count: int = count
        ) -> np.ndarray:
            return read_array(path, STORAGE[dtype], count, offset)

        yield Tensor(name, dtype, tuple(entry["shape"]), path, read)


def write_safetensors(
    path: Path,
    tensors: Iterable[Tensor],
    dtype: str | None,
    progress: Callable[[int, int], None] | None,
) -> str:
    """Writes tensors cast to `dtype` (None: each keeps its own) with one of them in memory at a
    time, which the safetensors package cannot. `progress(done, total)` counts bytes written.
    Returns the SHA-256 of the file as it was to be written."""
    # Widest first, so that every tensor is aligned to its element.
    tensors = sorted(tensors, key=lambda t: -STORAGE[dtype or t.dtype].itemsize)
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        target = dtype or tensor.dtype
        begin, end = end, end + math.prod(tensor.shape) * STORAGE[target].itemsize
        header[tensor.name] = {
            "dtype": target,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> int:
            digest.update(data)
            return file.write(data)

        write(len(text).to_bytes(8, "little") + text)
        done = 0
        for tensor in tensors:
            values = cast(tensor, dtype or tensor.dtype)
            done += write(np.ascontiguousarray(values).data)
            if progress is not None:
                progress(done, end)
    return digest.hexdigest()


def cast(tensor: Tensor, dtype: str) -> np.ndarray:
    """The tensor's values as STORAGE[dtype], F32 or BF16 if not its own, rounded to nearest even.
    Raises CheckpointError if one is not finite, or no longer."""
    values = tensor.read()
    _check_finite(tensor, values, tensor.dtype)
    if tensor.dtype != dtype:
        values = _to_f32(values, tensor.dtype)
        values = _to_bf16(values) if dtype == "BF16" else values
        _check_finite(tensor, values, dtype)
    return values


def _check_finite(tensor: Tensor, values: np.ndarray, dtype: str) -> None:
    finite = (values & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(values)
    if not finite.all():
        raise CheckpointError(
            f'{tensor.file}: tensor "{tensor.name}" has {finite.size - np.count_nonzero(finite)} '
            f"values that are not finite in {dtype}, expected none"
        )


def _to_f32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """values: finite, so that rounding up never carries out of the 32 bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
