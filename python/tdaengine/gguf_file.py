"""Reads GGUF files: keys and values, and where each tensor lies.

Every count in a file is checked against the bytes that are left before anything is made of it, and
arrays of numbers stay in the file until they are asked for.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ._native import CheckpointError
from .files import open_regular
from .tensors import read_array

try:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize
except ImportError as error:
    raise CheckpointError(
        "reading GGUF files needs the package gguf: pip install 'tdaengine[convert]'"
    ) from error

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 has counts of 32 bits
BIG_ENDIAN_VERSIONS = tuple(version << 24 for version in (1, *VERSIONS))

# Far more than any model has. They bound the time and memory that a header can cost.
MAX_HEADER = 1 << 28  # bytes of keys, values and tensor descriptions
MAX_ENTRIES = 1 << 16  # keys; tensors
MAX_KEY = (1 << 16) - 1  # bytes, as the format states
MAX_DIMENSIONS = 4

# The types of values.
U32, STRING, ARRAY, U64 = 4, 8, 9, 10
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    U32: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    U64: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class Numbers:
    """An array of numbers still in its file."""

    file: Path
    dtype: np.dtype[Any]
    count: int
    offset: int

    def tolist(self) -> list[Any]:
        is_bool = self.dtype.kind == "b"  # any byte but 0 is true
        stored = np.dtype("u1") if is_bool else self.dtype
        values = read_array(self.file, stored, self.count, self.offset)
        return list((values != 0 if is_bool else values).tolist())


# Text is kept as bytes: whether it is UTF-8 matters where it is used.
Value = int | float | bool | bytes | list[bytes] | Numbers


@dataclass(frozen=True)
class StoredTensor:
    """A tensor still in its file."""

    file: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # outermost dimension first
    offset: int  # from the beginning of the file
    bytes: int

    def read(self) -> np.ndarray:
        """Its values as f32, [shape]. Raises CheckpointError."""
        data = read_array(self.file, np.dtype("u1"), self.bytes, self.offset)
        rows = data.reshape(*self.shape[:-1], -1)
        try:
            return dequantize(rows, self.type).astype(np.float32, copy=False).reshape(self.shape)
        except NotImplementedError as error:
            raise CheckpointError(
                f'{self.file}: tensor "{self.name}" has type {self.type.name}, expected one of '
                f"those of weights ({error})"
            ) from error


@dataclass(frozen=True)
class GgufFile:
    path: Path
    values: dict[str, Value]
    tensors: dict[str, StoredTensor]


def read_gguf_file(path: Path) -> GgufFile:
    """One file, all of whose keys and tensors are within its bytes. Raises CheckpointError."""
    with open_regular(path, "a GGUF file") as file:
        try:
            return _Header(path, file).read()
        except OSError as error:
            raise CheckpointError(f"{path}: {error}, expected a GGUF file") from error


class _Header:
    """Reads the part of the file before the tensors' data from front to back."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._end = min(self._size, MAX_HEADER)
        self._offset = 0

    def read(self) -> GgufFile:
        self._check_magic()
        tensor_count, key_count = self._count("tensors"), self._count("keys")
        values: dict[str, Value] = {}
        for i in range(key_count):
            key = self._name(f"key {i}", MAX_KEY)
            if key in values:
                raise self._error(f"the key {key} twice", "it once")
            values[key] = self._value(key)
        described = [self._tensor(i) for i in range(tensor_count)]
        return GgufFile(self._path, values, self._place(described, values))

    def _count(self, what: str) -> int:
        count: int = self._number(U64, f"the number of {what}")
        if count > MAX_ENTRIES:
            raise self._error(f"{count} {what}", f"at most {MAX_ENTRIES}")
        return count

    def _error(self, found: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: found {found}, expected {expected}")

    def _check_magic(self) -> None:
        start = self._file.read(8)
        if start[:4] != MAGIC or len(start) < 8:
            raise CheckpointError(
                f"{self._path}: begins with {start[:4]!r}, expected a GGUF file, with {MAGIC!r}"
            )
        version = int.from_bytes(start[4:], "little")
        if version in BIG_ENDIAN_VERSIONS:
            raise self._error("a big-endian GGUF file", "a little-endian one")
        if version not in VERSIONS:
            raise self._error(f"version {version} of GGUF", "2 or 3")
        self._offset = 8

    def _left(self, count: int, what: str) -> int:
        """`count`, if so many bytes of the header are left for `what`."""
        if count > self._end - self._offset:
            limit = "file" if self._end == self._size else "longest header allowed"
            raise self._error(
                f"{count} bytes of {what} at byte {self._offset}",
                f"at most the {self._end - self._offset} up to the end of the {limit}",
            )
        return count

    def _bytes(self, count: int, what: str) -> bytes:
        data = self._file.read(self._left(count, what))
        if len(data) < count:
            raise self._error(f"the end of the file within {what}", f"{count} bytes")
        self._offset += count
        return data

    def _number(self, kind: int, what: str) -> Any:
        dtype = NUMBERS[kind]
        data = self._bytes(dtype.itemsize, what)
        return data != b"\0" if dtype.kind == "b" else np.frombuffer(data, dtype)[0].item()

    def _string(self, what: str) -> bytes:
        length = int.from_bytes(self._bytes(8, f"the length of {what}"), "little")
        return self._bytes(length, what)

    def _name(self, what: str, longest: int) -> str:
        name = self._string(what)
        if len(name) > longest:
            raise self._error(f"{what} with a name of {len(name)} bytes", f"at most {longest}")
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise self._error(f"{what} named {name[:80]!r}", "UTF-8") from error

    def _value(self, key: str) -> Value:
        kind = self._number(U32, f"the type of {key}")
        if kind == STRING:
            return self._string(key)
        if kind == ARRAY:
            return self._array(key)
        if kind in NUMBERS:
            value: Value = self._number(kind, key)
            return value
        raise self._error(f"type {kind} for {key}", "a type of values, 0 to 12")

    def _array(self, key: str) -> Value:
        kind = self._number(U32, f"the type of {key}")
        count = self._number(U64, f"the length of {key}")
        if kind == STRING:
            self._left(count * 8, key)  # for the lengths alone
            return [self._string(key) for _ in range(count)]
        if kind not in NUMBERS:
            raise self._error(f"an array of type {kind} for {key}", "numbers or strings")
        size = self._left(count * NUMBERS[kind].itemsize, key)
        numbers = Numbers(self._path, NUMBERS[kind], count, self._offset)
        self._file.seek(size, os.SEEK_CUR)
        self._offset += size
        return numbers

    def _tensor(self, i: int) -> tuple[str, list[int], GGMLQuantizationType, int]:
        name = self._name(f"tensor {i}", MAX_KEY)
        what = f'tensor "{name}"'
        dimensions = self._number(U32, what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._error(f"{what} with {dimensions} dimensions", f"1 to {MAX_DIMENSIONS}")
        shape = [self._number(U64, what) for _ in range(dimensions)]
        if 0 in shape:
            raise self._error(f"{what} with dimensions {shape}", "none of them 0")
        kind, offset = self._number(U32, what), self._number(U64, what)
        try:
            return name, shape, GGMLQuantizationType(kind), offset
        except ValueError:
            raise self._error(f"{what} of type {kind}", "a type that gguf knows") from None

    def _place(self, described: list[Any], values: dict[str, Value]) -> dict[str, StoredTensor]:
        """The tensors, which follow each other in the file without gaps but for alignment."""
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment {alignment!r:.80}", "a power of two")
        begin = -(-self._offset // alignment) * alignment
        end = 0
        tensors: dict[str, StoredTensor] = {}
        for name, dimensions, kind, offset in described:
            if name in tensors:
                raise self._error(f'the tensor "{name}" twice', "it once")
            if offset != end:
                raise self._error(f'tensor "{name}" at byte {offset} of the data', f"byte {end}")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if dimensions[0] % block:
                raise self._error(
                    f'tensor "{name}" of type {kind.name} with rows of {dimensions[0]}',
                    f"a multiple of {block}",
                )
            # GGUF states the fastest dimension first.
            size = math.prod(dimensions) // block * block_bytes
            shape = tuple(reversed(dimensions))
            if begin + offset + size > self._size:
                raise self._error(
                    f'tensor "{name}" of shape {list(shape)} up to byte {begin + offset + size}',
                    f"no more than the {self._size} of the file",
                )
            tensors[name] = StoredTensor(self._path, name, kind, shape, begin + offset, size)
            end = -(-(offset + size) // alignment) * alignment
        return tensors
