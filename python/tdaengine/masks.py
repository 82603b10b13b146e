"""Which tokens may come next, asked before each choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from ._native import OptionError

# From the token ids generated so far to those that may come next, or None for all.
AllowedTokens = Callable[[list[int]], Iterable[int] | None]


class Mask(Protocol):
    """Of one generation under way."""

    def allowed(self) -> np.ndarray | None:
        """u32 [V / 32], rounded up: bit t % 32 of word t / 32 is that of token t; None: all may."""

    def take(self, token: int) -> bool:
        """Notes the token that was chosen; whether another one may follow."""


class MaskOfFunction(Mask):
    def __init__(self, function: AllowedTokens, vocab_size: int) -> None:
        if not callable(function):
            raise OptionError(
                f"allowed_tokens: found {function!r}, expected a function of the token ids so far"
            )
        self._function, self._vocab_size = function, vocab_size
        self._ids: list[int] = []

    def allowed(self) -> np.ndarray | None:
        ids = self._function(list(self._ids))
        return None if ids is None else _mask_of(ids, self._vocab_size)

    def take(self, token: int) -> bool:
        self._ids.append(token)
        return True


def _mask_of(ids: Any, vocab_size: int) -> np.ndarray:
    flags = np.zeros(-(-vocab_size // 32) * 32, bool)
    found = np.asarray(list(ids) if isinstance(ids, Iterable) else ids)
    if found.size:
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise OptionError(f"allowed_tokens: found {ids!r}, expected token ids")
        wrong = found[(found < 0) | (found >= vocab_size)]
        if wrong.size:
            raise OptionError(
                f"allowed_tokens: found token {wrong[0]}, expected 0 to {vocab_size - 1}"
            )
        flags[found] = True
    return np.packbits(flags, bitorder="little").view("<u4")
