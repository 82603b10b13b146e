"""Tokens in the midst of a text: those it has there, and the bytes that each stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes printable bytes of Latin-1 as themselves, and the others, in order, as
    the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


_BYTES = _byte_of_character()


def token_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """Of each token, as it stands in the midst of a text; special tokens as they are spelled."""
    anchor, before = tokenizer._anchor
    found = []
    for token in ids:
        if tokenizer.is_special(token):
            text = tokenizer.decode([token], skip_special_tokens=False)
        else:
            text = tokenizer.decode([*anchor, token])[len(before) :]
        found.append(_of_piece(tokenizer.piece(token)) if UNKNOWN in text else text.encode())
    return found


def encode_behind(tokenizer: Tokenizer, part: str, parse_special: bool) -> list[int]:
    """The part as it is encoded in the midst of a text: some tokenizers put a space before one."""
    line = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + part, False, parse_special)
    if ids[: len(line)] == line:
        return ids[len(line) :]
    return tokenizer.encode(part, False, parse_special)


def _of_piece(piece: str) -> bytes:
    """Of a token that is no text by itself."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    if all(character in _BYTES for character in piece):
        return bytes(_BYTES[character] for character in piece)
    return piece.encode()
