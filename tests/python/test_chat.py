"""Chat templates: where they are found, what they may use, and broken ones."""

import json
from datetime import datetime

import pytest

from tdaengine import CheckpointError, OptionError
from tdaengine.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi."}]


def render(source: str, messages=MESSAGES, **tokens: str) -> str:
    return ChatTemplate(source, tokens, "template").render(messages)


def test_the_file_of_its_own_comes_first(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "config"}))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "config"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "jinja"


def test_of_named_templates_the_default_is_taken(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "b"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(CheckpointError, match=r"no \"default\" among \['rag'\]"):
        ChatTemplate.load(tmp_path)


def test_special_tokens(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "A", "eos_token": "B"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "C"}}')
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "A|C|"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "<é>"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("  {% if add_generation_prompt %}\nx\n  {% endif %}\ny", "x\ny"),
    ],
)
def test_what_templates_may_use(source, expected):
    assert render(source, [{"role": "user", "content": "<é>"}]) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ 1 + messages[0].content }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
    ],
)
def test_refusals_name_the_template(source):
    with pytest.raises(OptionError, match="refused by the template"):
        render(source)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% unknown %}"])
def test_a_broken_template(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("template", [5, {"default": "x"}, [{"name": "default", "template": 1}]])
def test_a_template_that_is_none(tmp_path, template):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate.load(tmp_path)


def test_no_template(tmp_path):
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja and chat_template in"):
        ChatTemplate.load(tmp_path)
