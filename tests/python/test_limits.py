"""What a prompt or a chat template may cost before it is refused."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import sentencepiece
from conftest import MESSAGES
from jinja2.sandbox import ImmutableSandboxedEnvironment
from texts import PIECES
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from tdaengine import CheckpointError, ContextOverflow, Engine, OptionError
from tdaengine.chat import ChatTemplate
from tdaengine.prompt_length import JsonLengths
from tdaengine.tokenizer import Tokenizer as Loaded

WIDE = "{% for i in range(99999) %}"
END = "{% endfor %}"

ENDLESS = {
    "loops": WIDE * 3 + END * 3,
    "loops of known length": WIDE + "{{ loop.length and '' }}" + WIDE * 2 + END * 3,
    "loops over text": "{% set s = 'x' * 99999 %}" + "{% for i in s %}" * 3 + END * 3,
    "loops of no passes": (WIDE * 2 + "{% for i in range(9999) if false %}" + END) + END * 2,
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "recursive loops": "{% for n in [60] recursive %}{% if n %}{{ loop([n - 1, n - 1]) }}"
    "{% endif %}{% endfor %}",
    "filters": WIDE * 2 + "{{ range(99999) | sum and '' }}" + END * 2,
}
LARGE = {
    "output": WIDE * 2 + "some text" + END * 2,
    "printed": WIDE * 2 + "{{ messages }}" + END * 2,
    "repeated": "{{ 'x' * 10**10 }}",
    "repeated list": "{% set x = [1] * 10**10 %}",
    "repeated bytes": "{% set x = 'x'.encode() * 10**10 %}",
    "doubled by ~": "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubled by +": "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled by format": "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
    "doubled in a block": "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "doubled by a macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}"
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = m(n.s) %}{% endfor %}",
    "a block": "{% set x %}" + WIDE * 2 + "some text" + END * 2 + "{% endset %}",
    "power": "{{ 10 ** 10000000000 }}",
    "product": "{% set n = namespace(i=3) %}{% for i in range(60) %}"
    "{% set n.i = n.i * n.i %}{% endfor %}",
    "padding": "{{ 'x'.ljust(10 ** 10) }}",
    "filter": "{{ 'x' | center(10 ** 10) }}",
    "constant filter": "{{ 'x' | center(10000000000) }}",
    "indentation": "{{ ('x\n' * 10000) | indent(100000) }}",
    "wide format": "{{ '%10000000000d' % 1 }}",
    "replacement": "{{ ('x' * 10**5).replace('x', 'y' * 10**5) }}",
    "replacing filter": "{{ ('x' * 10**5) | replace('x', 'y' * 10**5) }}",
    "joined": "{{ ''.join(['x' * 10**6] * 10**5) }}",
    "joining filter": "{{ (['x' * 10**6] * 10**5) | join }}",
    "nested lists": "{% set n = namespace(l=['x']) %}{% for i in range(40) %}"
    "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "nested lists as JSON": "{% set n = namespace(l=['x']) %}{% for i in range(40) %}"
    "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | tojson | length }}",
}


def render(source: str, messages: list = MESSAGES) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, "template").render(messages)


@pytest.mark.parametrize("case", ENDLESS)
def test_templates_come_to_an_end(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tdaengine.sandbox.MAX_SECONDS", 0.1)
    monkeypatch.setattr("tdaengine.sandbox.MAX_MADE", 10**12)
    start = time.thread_time()
    with pytest.raises(OptionError, match=r"refused by the template template: .*0\.1 s"):
        render(ENDLESS[case])
    assert time.thread_time() - start < 2


def test_templates_stay_small():
    program = (
        "import json, resource, sys\n"
        "from tdaengine import Error\n"
        "from tdaengine.chat import ChatTemplate\n"
        "from tdaengine import sandbox\n"
        "sandbox.MAX_SECONDS = 1\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
        "for source in json.load(sys.stdin):\n"
        "    try:\n"
        "        ChatTemplate(source, {}, 't').render([{'role': 'user', 'content': 'a'}])\n"
        "    except Error as error:\n"
        "        print(error)\n"
        "    else:\n"
        "        print('taken')\n"
        # Not ru_maxrss, which begins with what the parent had when it forked.
        "peak = next(l for l in open('/proc/self/status') if l.startswith('VmHWM:'))\n"
        "print(int(peak.split()[1]) // 1000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(list(LARGE.values())),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    *messages, megabytes = done.stdout.splitlines()
    for case, message in zip(LARGE, messages, strict=True):
        expected = "messages: refused by the template t: it (makes|formats|takes)"
        assert re.match(expected, message), f"{case}: {message}"
    assert int(megabytes) < 1000


@pytest.mark.parametrize(
    "source", ["{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", WIDE * 30 + END * 30]
)
def test_templates_that_python_cannot_compile(source: str):
    with pytest.raises(CheckpointError, match="template: chat template: "):
        render(source)


# Everything that is metered, in amounts that templates have.
FINE = (
    "{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ '%s-%05d' % ('x', 7) }}{{ 'a' + 'b' }}"
    "{{ [1] + [2] }}{{ 'a' ~ 1 ~ messages[0].role }}{{ 'aXbX'.replace('X', '--') }}"
    "{{ 'x' | center(9) }}{{ 'x\ny' | indent(4) }}"
    "{{ messages | map(attribute='role') | join('/') }}"
    "{{ messages | tojson }}{{ ','.join(['p', 'q']) }}{{ '{:>5}'.format('r') }}"
    "{% set x | upper %}{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ m.content }}"
    "{{ '' if loop.last else ', ' }}{% endfor %}{% endset %}{{ x }}{% set y %}{{ x }}{% endset %}"
    "{{ y }}{% macro m(n) %}{{ n }}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(3) }}"
    "{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}"
    "{{ range(5) | sum }}{{ none }}{{ missing }}{{ 'é' | upper }}{{ messages | length }}"
)


def test_limits_change_nothing_else():
    """The same as under Jinja's own sandbox, but that only the template's tojson has its name."""
    from tdaengine.chat import _tojson

    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = _tojson
    expected = plain.from_string(FINE).render(messages=MESSAGES)
    assert render(FINE) == expected
    assert len(expected) > 200


def test_long_conversations_are_fine():
    messages = [{"role": "user", "content": "x" * 1000}] * 1000
    source = (
        "{% set n = namespace(s='') %}{% for m in messages %}"
        "{{ '<|' + m.role + '|>' + m.content.strip() | trim }}\n{% endfor %}"
    )
    assert len(render(source, messages)) == 1000 * (1000 + len("<|user|>\n"))


def test_limits_are_of_one_conversation():
    """On each of several threads, and one after the other."""
    template = ChatTemplate("{{ 'x' * 10000000 }}", {}, "template")
    with ThreadPoolExecutor(3) as threads:
        lengths = list(threads.map(lambda _: len(template.render(MESSAGES)), range(9)))
    assert lengths == [10_000_000] * 9


# ---- the length of a prompt ---------------------------------------------------------------------


def long_texts() -> list[str]:
    random = Random(1)
    alphabets = ("ab c", " ", "\n\t ", "\u0301e", "\u1100\u1161\u11a8", "\U0001f642\u00e9\u4e2d")
    made = ["".join(random.choices(each, k=600)) for each in alphabets]
    decomposed = "\u03b1\u0313\u0300\u0345" * 150  # four characters that NFC makes one
    prose = "The sky is blue, and water is wet. " * 20
    return [*PIECES, *made, decomposed, prose, "<special>" * 90, " <special> " * 90, ""]


def byte_level(normalizer: object = None, lost: str = "", **options: bool) -> Tokenizer:
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(lost))
    pieces = [*alphabet, *("\u0120" * n for n in range(2, 40)), "ab", "aba"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("\u0120", "\u0120" * n) for n in range(1, 39)] + [("a", "b"), ("ab", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken("<special>", **options)])
    return tokenizer


def characters(**options: object) -> Tokenizer:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "?": 3}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], **options))


KNOWN = {
    "byte level": byte_level(),
    "bytes without tokens": byte_level(lost="!\u00c3\u00ff"),
    "NFC": byte_level(normalizers.NFC()),
    "Llama 2": byte_level(
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    ),
    "spaces swallowed": byte_level(lstrip=True, rstrip=True),
    "unknown characters": characters(unk_token="?"),
}
UNKNOWN = {
    "stripped": byte_level(normalizers.Strip()),
    "regex": byte_level(normalizers.Replace(Regex(" +"), " ")),
    "shortened": byte_level(normalizers.Replace("aa", "a")),
    "unknown joined": characters(unk_token="?", fuse_unk=True),
    "unknown dropped": characters(),
    "words": Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")),
}


@pytest.mark.parametrize("case", KNOWN)
def test_no_text_has_fewer_tokens(case: str):
    lengths = JsonLengths(KNOWN[case])
    texts = long_texts()
    for text in texts:
        assert lengths.least(text) <= len(KNOWN[case].encode(text).ids), text[:20]
    assert max(map(lengths.least, texts)) > 10


@pytest.mark.parametrize("case", UNKNOWN)
def test_nothing_is_claimed_where_characters_are_dropped(case: str):
    assert not any(map(JsonLengths(UNKNOWN[case]).least, long_texts()))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [False, True])
def test_no_sentencepiece_text_has_fewer_tokens(tmp_path: Path, model_type, byte_fallback):
    (tmp_path / "corpus").write_text("The sky is blue.\nWater is wet, and so is rain.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type=model_type,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    tokenizer = Loaded.load(tmp_path)
    texts = long_texts()
    for text in texts:
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text)), text[:20]
    assert (max(map(tokenizer.least_tokens, texts)) > 10) == byte_fallback


def test_the_demo_models_tokenizer(smollm2: Path):
    tokenizer = Loaded.load(smollm2)
    for text in long_texts():
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text)), text[:20]
    assert tokenizer.least_tokens("The sky is blue. " * 600_000) > 100_000


def test_prompts_are_refused_before_they_are_encoded(engine: Engine, monkeypatch):
    def encode(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(type(engine.tokenizer), "_encode", encode)
    text = "x" * 10_000_000
    messages = [{"role": "user", "content": text}]
    expected = r"found 1\d{7} characters, which are \d+ tokens or more, expected at most max_co"
    for call in (
        lambda: engine.generate(text),
        lambda: engine.generate([text, "Hi"]),
        lambda: engine.stream(text),
        lambda: engine.chat(messages),
        lambda: engine.chat_prompt(messages),
    ):
        with pytest.raises(ContextOverflow, match=expected):
            call()
    with pytest.raises(OptionError, match=r"found .*udc80. at position 9"):
        engine.generate("x" * 9 + "\udc80")


def test_texts_of_no_prompt_may_be_long(engine: Engine):
    assert engine.calibrate(["x" * 20_000], error=0.3, max_tokens=16).tokens == 16
