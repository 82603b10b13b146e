"""Chat templates: where they are found, what they may use, and broken ones."""

import json
from datetime import datetime

import pytest
import tokenizer_cases

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
    by_name = {"rag": "a", "default": "b"}
    config.write_text(json.dumps({"chat_template": by_name}))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "b"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(CheckpointError, match=r"no \"default\" among \['rag'\]"):
        ChatTemplate.load(tmp_path)


def test_of_templates_in_files_the_default_is_taken(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("a")
    with pytest.raises(CheckpointError, match=r"no \"default\" among \['rag'\]"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("b")
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "b"
    (more / "default.jinja").write_text("c")  # the last word, as in transformers
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "c"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "<s>|</s>||<unk>"),
        ({"tokenizer_class": "LlamaTokenizerFast", "bos_token": None}, "|</s>||<unk>"),
        ({"tokenizer_class": "LlamaTokenizer", "eos_token": "E"}, "<s>|E||<unk>"),
        (
            {"tokenizer_class": "Qwen2Tokenizer"},
            "|<|endoftext|>|<|endoftext|>|<|endoftext|>",
        ),
        ({"tokenizer_class": "GemmaTokenizer"}, "<bos>|<eos>|<pad>|<unk>"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "|||"),
        ({}, "|||"),
    ],
)
def test_special_tokens_of_the_class(tmp_path, config, expected):
    """Defaults of the classes of transformers 5.24, which a template writes."""
    config["chat_template"] = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == expected


def test_special_tokens_of_tokenizer_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_cases.model_file())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ unk_token }}")
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "<s></s><unk>"


def test_special_tokens_without_a_common_role(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ image_token }}{{ eot }}")
    config = {"image_token": "A", "extra_special_tokens": {"eot": "B"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "AB"


def test_special_tokens(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "A", "eos_token": "B"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "C"}}')
    # special_tokens_map.json comes from older versions, as config files without a list of all
    # added tokens do. With such a list it is not read.
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "A|B|"
    config = {"eos_token": {"content": "C"}, "added_tokens_decoder": {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "|C|"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{{ 'é' | tojson(true) }}", '"\\u00e9"'),
        ("{{ [1] | tojson(true, 2) }}", "[\n  1\n]"),
        ("{{ {'b': 1, 'a': 2} | tojson(false, none, (',', ':'), true) }}", '{"a":2,"b":1}'),
        ("{{ [1] | tojson(indent='--') }}", "[\n--1\n]"),
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


@pytest.mark.parametrize("template", [5, {"rag": "x"}, [{"name": "default", "template": 1}]])
def test_a_template_that_is_none(tmp_path, template):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate.load(tmp_path)


def test_no_template(tmp_path):
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja and chat_template in"):
        ChatTemplate.load(tmp_path)
