"""Writes cpp/text/unicode_tables.inc: the categories that the tokenizers' patterns use, and NFC.

pip install unicodedata2==16.0.0 tokenizers, then: python tools/unicode_tables.py

The categories are those of Unicode 16, as in the regular expressions of `tokenizers`. Its NFC has
an older Unicode version: characters that it does not change are not changed here either.
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import unicodedata2
from tokenizers import normalizers

OUTPUT = Path(__file__).parents[1] / "cpp" / "text" / "unicode_tables.inc"
CATEGORIES = {  # enum class Category of cpp/text/unicode.h; all others are 0
    **{"Lu": 1, "Lt": 2, "Ll": 3, "Lm": 4, "Lo": 4, "Mn": 5, "Mc": 5, "Me": 5},
    **{"Nd": 6, "Nl": 7, "No": 8, "Pc": 9},
}
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic
CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]

nfc = normalizers.NFC().normalize_str
nfd = normalizers.NFD().normalize_str


def runs(values: Iterable[tuple[int, int]]) -> list[int]:
    """(code, value), codes ascending -> code << 8 | value wherever the value changes."""
    result, last = [], 0
    for code, value in values:
        if value != last:
            result.append(code << 8 | value)
            last = value
    return result


def combining_class(character: str) -> int:
    """0 if the library does not treat the character as combining."""
    value = unicodedata2.combining(character)
    after = f"q\u0301{character}"  # after a mark of class 230
    before = f"q{character}\u0334"  # before a mark of class 1
    moves = nfd(after) != after or nfd(before) != before or value in (1, 230)
    if value in (1, 230):  # marks of equal class do not reorder, so these need another probe
        probe = f"q\u0323{character}" if value == 1 else f"q{character}\u0323"
        moves = nfd(probe) != probe
    return value if moves else 0


def decomposition(character: str) -> list[int] | None:
    """One step: one or two characters."""
    fields = unicodedata2.decomposition(character).split()
    if not fields or fields[0].startswith("<") or nfd(character) == character:
        return None
    return [int(field, 16) for field in fields]


def table(name: str, comment: str, values: Iterable[int]) -> str:
    body = textwrap.indent(textwrap.fill(", ".join(map(hex, values)), 96), "    ")
    return f"// {comment}\nconstexpr std::uint32_t {name}[] = {{\n{body}}};\n"


def main() -> None:
    assert unicodedata2.unidata_version == "16.0.0"
    categories = runs((ord(c), CATEGORIES.get(unicodedata2.category(c), 0)) for c in CHARACTERS)
    classes = runs((ord(c), combining_class(c)) for c in CHARACTERS)
    singles, pairs, excluded = [], [], []
    for character in CHARACTERS:
        if ord(character) in HANGUL or not (parts := decomposition(character)):
            continue
        if len(parts) == 1:
            singles += [ord(character), *parts]
        elif nfc("".join(map(chr, parts))) == character:
            pairs += [ord(character), *parts]
        else:  # never composed again
            excluded += [ord(character), *parts]
    OUTPUT.write_text(
        "// Made by tools/unicode_tables.py, not by hand.\n// clang-format off\n"
        + table("category_runs", "first code << 8 | category", categories)
        + table("class_runs", "first code << 8 | canonical combining class", classes)
        + table("single_decompositions", "code, what it stands for", singles)
        + table("pair_decompositions", "code, its two parts, which compose to it", pairs)
        + table("broken_pairs", "code, its two parts, which stay apart", excluded)
    )


if __name__ == "__main__":
    main()
