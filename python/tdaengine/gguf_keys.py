"""The keys of a GGUF file, checked as they are asked for."""

from __future__ import annotations

from typing import Any

from ._native import CheckpointError, GgufModel


class Keys:
    """All that fails is a CheckpointError."""

    def __init__(self, model: GgufModel) -> None:
        self.file: str = model.files[0]
        self._model = model

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of `key`, which is of the kind; if it is missing the default, if any."""
        value = self._value(key)
        if value is None:
            if default is ...:
                raise self.error(key, "missing", kind.__name__)
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"{value!r:.80}", kind.__name__)
        return value

    def get_list(self, key: str, kind: type, default: Any = ...) -> list[Any]:
        """The list under `key`, all of whose items are of the kind."""
        values: list[Any] = self.get(key, list, default)
        for i, value in enumerate(values):
            if not isinstance(value, kind):
                raise self.error(f"{key}[{i}]", repr(value), kind.__name__)
        return values

    def expect(self, key: str, expected: Any) -> None:
        """Refuses any other value."""
        value = self._value(key)
        if value is not None and value != expected:
            raise self.error(key, f"{value!r:.80}", repr(expected))

    def error(self, key: str, found: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {key} is {found}, expected {expected}")

    def _value(self, key: str) -> Any:
        value = self._model.value(key)
        try:
            if isinstance(value, bytes):
                return value.decode()
            if isinstance(value, list) and value and isinstance(value[0], bytes):
                return [text.decode() for text in value]
        except UnicodeDecodeError as error:
            raise self.error(key, repr(error.object), "UTF-8") from error
        return value
