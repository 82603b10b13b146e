"""How many tokens a text becomes at least. Encoding costs some hundred bytes of memory per byte of
text, so that a prompt far beyond the context is refused before.

No token stands for more characters than its own text has. That bounds their number from below,
wherever nothing on the way to the tokens drops or joins characters.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterator
from typing import Any, cast

import sentencepiece
import tokenizers
from tokenizers import models

# Beside Split and Punctuation, which may be told to remove what they find.
_KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Digits", "Metaspace")


class JsonLengths:
    """Of what tokenizer.json describes."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        steps = [*_steps(tokenizer.normalizer), *_steps(tokenizer.pre_tokenizer)]
        kinds = [step["type"] for step in steps]
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        added = tokenizer.get_added_tokens_decoder().values()
        self._is_known = all(map(_keeps, steps)) and _takes_all(tokenizer.model, vocabulary, kinds)
        self._composes = "NFC" in kinds
        self._is_in_bytes = "ByteLevel" in kinds
        characters = _characters_of_bytes()
        # Bytes without a token, as those that no UTF-8 holds often are, vanish.
        self._lost = bytes(i for i in range(256) if characters[i] not in vocabulary)
        # Added tokens may swallow any amount of it.
        self._is_space_free = any(token.lstrip or token.rstrip for token in added)
        prepended = sum(len(step["prepend"]) for step in steps if step["type"] == "Prepend")
        texts = [*map(len, vocabulary), *(len(token.content.encode()) for token in added)]
        self._longest = max(texts, default=0) + prepended

    def least(self, text: str) -> int:
        if not self._is_known or not self._longest:
            return 0
        if self._is_space_free:
            text = "".join(text.split())
        if self._composes:
            text = unicodedata.normalize("NFC", text) if _is_assigned(text) else ""
        size = len(text.encode().translate(None, self._lost)) if self._is_in_bytes else len(text)
        return -(-size // self._longest)


class SentencePieceLengths:
    """Of a tokenizer.model and the tokens beside it."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor, added: list[str]) -> None:
        self._model = model
        # Without tokens for bytes any number of unknown characters is one token.
        private = model.encode("\ue000")
        self._is_known = bool(private) and all(map(model.is_byte, private[-3:]))
        texts = [model.id_to_piece(i) for i in range(model.vocab_size())]
        # A space on either side may be lost to normalization.
        self._longest = max(map(len, [*texts, *map(model.normalize, added), *added])) + 2

    def least(self, text: str) -> int:
        if not self._is_known:
            return 0
        return -(-len(self._model.normalize(text)) // self._longest)


def _steps(component: Any) -> Iterator[dict[str, Any]]:
    """Of a sequence, the parts, as tokenizer.json has them."""
    if component is None:
        return
    stack = [cast(dict[str, Any], json.loads(component.__getstate__()))]
    while stack:
        step = stack.pop()
        parts = step.get("normalizers") or step.get("pretokenizers")
        if parts:
            stack += parts
        else:
            yield step


def _keeps(step: dict[str, Any]) -> bool:
    """Whether this step leaves every character, or something as long."""
    kind = step["type"]
    if kind in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    if kind == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and len(pattern) == len(step["content"])
    return kind in _KEEPING_PRE_TOKENIZERS or kind in ("NFC", "Prepend")


def _takes_all(model: Any, vocabulary: dict[str, int], kinds: list[str]) -> bool:
    """Whether every unknown character becomes a token, one at least."""
    if not isinstance(model, models.BPE):
        return False
    if "ByteLevel" in kinds:  # its bytes are looked at one by one
        return True
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    return model.unk_token in vocabulary and not model.fuse_unk


def _characters_of_bytes() -> list[str]:
    """How ByteLevel writes them: as themselves what Latin-1 can show, from U+0100 on the others."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _is_assigned(text: str) -> bool:
    """Characters of a later Unicode than Python's may compose in ways that it does not know."""
    return all(unicodedata.category(character) != "Cn" for character in set(text))
