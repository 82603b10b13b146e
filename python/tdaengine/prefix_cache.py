"""Keys and values of earlier prompts, within a limit of memory."""

from __future__ import annotations

import re

from . import _native
from ._native import OptionError

DEFAULT_LIMIT = "512 MiB"  # of `tdaengine chat` and `serve`
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class PrefixCache(_native.PrefixCache):
    """The beginnings of prompts, the least recently used out first: a prompt that begins like one
    of them prefills only the rest, and what is generated is the same, bit for bit, as without.

        engine = Engine("path/to/checkpoint", prefix_cache="512 MiB")  # of all its prompts
        chat = PrefixCache()
        engine.generate(prompt, prefix_cache=chat)  # of this chat alone
        chat.save("chat.prefixes")  # to go on another day: PrefixCache().load("chat.prefixes")

    Generated tokens are not kept: as a part of the next prompt they are prefilled, once. One cache
    serves one model, the first it meets, and any number of threads and engines of it.

    limit: of memory, in bytes or as "512 MiB". Raises OptionError.
    """

    def __init__(self, limit: int | str = DEFAULT_LIMIT) -> None:
        super().__init__(size(limit, "limit"))


def size(value: int | str, name: str, least: int = 1) -> int:
    """Bytes. Raises OptionError that begins with `name`."""
    found = re.fullmatch(r"(\d+) *((?:KiB|MiB|GiB)?)", str(value).strip())
    number = int(found[1]) * UNITS[found[2]] if found else -1
    if isinstance(value, bool) or not least <= number < 2**63:
        raise OptionError(
            f"{name}: found {value!r}, expected bytes from {least} on, or a text like '512 MiB'"
        )
    return number


def check_prefix_cache(value: PrefixCache | int | str | None) -> PrefixCache | None:
    """What an engine keeps prompts in, if anything."""
    if value is None or isinstance(value, PrefixCache):
        return value
    limit = size(value, "prefix_cache", least=0)
    return PrefixCache(limit) if limit else None
