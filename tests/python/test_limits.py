"""What a prompt or a chat template may cost before it is refused."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import MESSAGES
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tdaengine import CheckpointError, OptionError
from tdaengine.chat import ChatTemplate

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
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)\n"
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
