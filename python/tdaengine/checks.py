"""Checks of what callers give, and the messages that name what is wrong with it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from ._native import TDA, Error, OptionError


def warn_caller(messages: list[str], category: type[Warning]) -> None:
    """Names the line outside of this package that called."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("tdaengine"):
        level, frame = level + 1, frame.f_back
    for message in messages:
        warnings.warn(message, category, stacklevel=level)


@contextmanager
def naming(item: str) -> Iterator[None]:
    """Errors begin with the item's name, if it has one."""
    try:
        yield
    except Error as error:
        if not item:
            raise
        raise type(error)(f"{item}: {error}") from error


def is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer)


def check_type(value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, kind):
        raise OptionError(f"{name}: found {value!r}, expected {kind.__name__}")
    return value


def check_tda(tda: Any) -> TDA | None:
    return None if tda is None else check_type(tda, "tda", TDA)


def check_stop(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise OptionError(f"stop: found {stop!r}, expected a string or several, none of them empty")
    return tuple(strings)


def check_progress(progress: Any) -> Callable[[int, int], None] | None:
    if progress is not None and not callable(progress):
        raise OptionError(f"progress: found {progress!r}, expected a function of (done, total)")
    return cast(Callable[[int, int], None] | None, progress)


def check_count(value: int | None, name: str, most: int = 2**63 - 1) -> int:
    """The engine takes 0 for "not given"."""
    if value is None:
        return 0
    if isinstance(value, bool) or not is_id(value) or not 1 <= value <= most:
        raise OptionError(f"{name}: found {value!r}, expected an integer from 1 to {most}")
    return int(value)
