"""The keys of a GGUF model, checked as they are asked for, and its parts where it is split."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ._native import CheckpointError
from .gguf_file import GgufFile, Numbers, StoredTensor, Value, read_gguf_file

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
MAX_PARTS = 99_999  # of five digits
QUANTIZATION_VERSION = 2  # what the blocks of quantised tensors look like


def read_gguf_parts(path: Path) -> GgufFile:
    """The model in a file or, if that is the first of several, in all of them; the first has the
    keys. Raises CheckpointError."""
    first = read_gguf_file(path)
    count = first.values.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= MAX_PARTS:
        raise CheckpointError(f"{path}: split.count is {_shown(count)}, expected 1 to {MAX_PARTS}")
    if count <= 1:
        return first
    match = PART.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (1, count):
        raise CheckpointError(
            f"{path}: one of the {count} files of a model, expected the first, its name ending in "
            f"-00001-of-{count:05}.gguf"
        )
    tensors: dict[str, StoredTensor] = {}
    for i in range(count):
        file = path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf")
        part = first if i == 0 else read_gguf_file(file)
        for key, expected in {"split.no": i, "split.count": count}.items():
            if part.values.get(key) != expected:
                raise CheckpointError(
                    f"{file}: {key} is {_shown(part.values.get(key))}, expected {expected}"
                )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f'{file}: tensor "{name}" is in {tensors[name].file.name}, too, expected in one'
                )
            tensors[name] = tensor
    total = first.values.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{path}: found {len(tensors)} tensors in {count} files, expected {_shown(total)} by "
            "split.tensors.count"
        )
    return GgufFile(path, first.values, tensors)


def _shown(value: Value | None) -> str:
    return "missing" if value is None else f"{value!r:.80}"


def _as_f32(value: float) -> float:
    """1e-05 rather than 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


class Metadata:
    """The values of keys; "@" in a key stands for the architecture. All that fails is a
    CheckpointError."""

    def __init__(self, file: GgufFile, architectures: tuple[str, ...]):
        self.file = file.path
        self._values = file.values
        self._read = set[str]()
        self.architecture = ""
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in architectures:
            raise self.error("general.architecture", self.architecture, ", ".join(architectures))
        self.expect("general.type", ("model",))
        self.expect("general.quantization_version", (QUANTIZATION_VERSION,))

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of `key`, which is of the kind; if it is missing the default, if any."""
        value = self._value(key)
        if value is None:
            if default is ...:
                raise self.error(key, "nothing", kind.__name__)
            return default
        if kind is float and isinstance(value, float):
            rounded = _as_f32(value)
            if not math.isfinite(rounded):
                raise self.error(key, value, "a finite number of 32 bits")
            return rounded
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, _shown(value), kind.__name__)
        return value

    def get_list(self, key: str, kind: type, default: Any = ...) -> list[Any]:
        """The list under `key`, all of whose items are of the kind."""
        values: list[Any] = self.get(key, list, default)
        for i, value in enumerate(values):
            if not isinstance(value, kind):
                raise self.error(f"{key}[{i}]", repr(value), kind.__name__)
        return values

    def get_of_layers(self, key: str, layers: int, default: Any = ...) -> int:
        """A size that may be given once, or for each layer but then always the same."""
        value = self._value(key)
        if isinstance(value, list) and len(value) == layers and len(set(value)) == 1:
            value = value[0]
            if type(value) is int:
                return value
        return int(self.get(key, int, default))

    def expect(self, key: str, values: tuple[Any, ...], condition: str = "") -> None:
        """Refuses any other value than these."""
        value = self._value(key)
        if isinstance(value, float):
            value = _as_f32(value)
        if value is not None and value not in values:
            expected = " or ".join(map(str, values)) + (f" {condition}" if condition else "")
            raise self.error(key, _shown(value), expected)

    def refuse_unread(self, without_effect: Iterable[str]) -> None:
        """Refuses the architecture's keys that nobody has asked for, but for these."""
        prefix = f"{self.architecture}."
        for key in self._values:
            known = key in self._read or key.removeprefix(prefix) in without_effect
            if key.startswith(prefix) and not known:
                raise self.error(key, _shown(self._value(key)), "no key of unknown effect")

    def error(self, key: str, found: object, expected: str) -> CheckpointError:
        key = self._full(key)
        return CheckpointError(f"{self.file}: {key} is {found}, expected {expected}")

    def _value(self, key: str) -> Any:
        key = self._full(key)
        self._read.add(key)
        value = self._values.get(key)
        try:
            if isinstance(value, bytes):
                return value.decode()
            if isinstance(value, list):
                return [text.decode() for text in value]
        except UnicodeDecodeError as error:
            raise self.error(key, repr(error.object), "UTF-8") from error
        return value.tolist() if isinstance(value, Numbers) else value

    def _full(self, key: str) -> str:
        return key.replace("@", self.architecture)
