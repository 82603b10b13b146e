"""Texts that tokenizers must agree on: prose, code, and every character there is."""

import random

SUBJECTS = "The minister|Officials|Researchers in Zürich|The company's chief|Москва|東京都|O'Neill"
VERBS = "said|didn't say|announced|confirmed that|has rejected|will've seen|couldn't confirm"
OBJECTS = "a 12.5% rise|the $1,234,567 deal|plans for 2031|more than 3½ years|“no comment”|café's"
TIMES = "on Monday|at 10:45 a.m.|in the 1990s|, he'd added|last week (again)|— twice|since 9/11"
CODE = [
    "    return x[i] += 0x1F;  // ok\n",
    "\tif (a<b) { f(&a, *b); }\r\n",
    "def f(x):\n\n\n    pass",
    "https://example.org/a?b=c&d=%20#e",
    "CamelCaseAndHTTPServer __init__",
    "\x00\x01\x1b[0m\x7f",
]
SCRIPTS = [
    "it's IT'S we'Re I'LL you'D it'ſo xſo yſo éſo 'x '",
    "e\u0301\u0323o\u0323\u0301 ﷺ ﬁ Å \u212b \u2126",
    "\u1100\u1161\u11a8한국어 \uac00\u11a8",
    "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd",
    "नमस्ते दुनिया สวัสดี שלום مرحبا ٣٤٥ Ⅷ ½ ² ①",
    "\u200b\ufeff\u2028\u3000\xa0\x85\ufffd\ue000",
]
TOKENS = [
    *("<s>", "</s>", "<unk>", "<0x41>", "<|im_start|>user\n", "<tool>", "  <mask>  "),
    *("[X]", "a[X]b", "▁", "▁▁a"),
]
PIECES = [*CODE, *SCRIPTS, *TOKENS]
# Assigned in Unicode 17; to the C++ tables, of Unicode 16, they are no characters yet.
NEWER_DIGITS = {*range(0x11DE0, 0x11DEA), 0x16FF4, 0x16FF5, 0x16FF6}


def sentences(rng: random.Random, count: int) -> list[str]:
    parts = [each.split("|") for each in (SUBJECTS, VERBS, OBJECTS, TIMES)]
    return [" ".join(rng.choice(part) for part in parts * rng.randint(1, 3)) for _ in range(count)]


def mixtures(rng: random.Random, count: int) -> list[str]:
    """Pieces, spaces, newlines, digits and letters in any order."""

    def part() -> str:
        kind = rng.randrange(6)
        if kind < 2:
            return rng.choice(PIECES)
        if kind == 2:
            return rng.choice(" \n\t\r\xa0\u3000") * rng.randint(1, 9)
        if kind == 3:
            return str(rng.randrange(10 ** rng.randint(1, 12)))
        if kind == 4:
            return rng.choice(
                ["a", "Ab", "éÉ", "世界", "ж", "'", "/", "-", "\u0301"]
            ) * rng.randint(1, 4)
        return "".join(rng.choice("abcdeABCDE .,'sStT\n") for _ in range(rng.randint(1, 20)))

    return ["".join(part() for _ in range(rng.randint(1, 8))) for _ in range(count)]


def every_character(rng: random.Random) -> list[str]:
    """Each once, in random order, many beside letters, digits, spaces or marks."""
    codes = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c not in NEWER_DIGITS]
    rng.shuffle(codes)
    # Most characters are private or not assigned: those that occur come again, among themselves.
    codes += rng.sample([c for c in codes if c < 0x3400 or 0xA000 <= c < 0xAC00], 12000) * 4
    between = [*([""] * 8), " ", "a", "B", "1", "\n", "\u0301", "'s", "  ", "."]
    texts = []
    for i in range(0, len(codes), 120):
        texts.append("".join(chr(c) + rng.choice(between) for c in codes[i : i + 120]))
    return texts


def make_texts() -> list[str]:
    rng = random.Random(0)
    texts = ["", " ", "a", "\n", *PIECES, *(" " * n for n in range(2, 40))]
    texts += ["a" * 3000, " a" * 2000, "1" * 500, "世" * 700, "\u0301" * 300, "'s" * 400]
    texts += sentences(rng, 1500) + mixtures(rng, 2500) + every_character(rng)
    texts += [rng.randbytes(rng.randint(1, 60)).decode(errors="replace") for _ in range(300)]
    assert len(texts) >= 10_000
    return texts
