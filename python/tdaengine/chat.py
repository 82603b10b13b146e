"""Conversations as one text, by the checkpoint's own chat template (Jinja)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from ._native import CheckpointError, OptionError
from .contents import Contents
from .files import MAX_TEMPLATE
from .sandbox import BoundedEnvironment
from .token_bytes import encode_behind
from .tokenizer import Tokenizer
from .tokenizer_files import Settings

Tools = Sequence[Mapping[str, Any]]


class _GenerationBlock(Extension):
    """{% generation %} marks an assistant's words for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own it leaves <, > and & as they are; arguments may be given by position."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> BoundedEnvironment:
    """What templates written for `transformers` expect to find."""
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.bound_filters()
    return environment


class ChatTemplate:
    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        """name: of the file, for messages. Raises CheckpointError if the source is no template."""
        self._name = name
        self.source = source
        self._special_tokens = special_tokens
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        # Jinja's own, but also what Python says of the code it makes, as of too many nested blocks.
        except Exception as error:
            raise CheckpointError(f"{name}: chat template: {error}") from error

    @staticmethod
    def load(checkpoint: Path | str | Contents) -> ChatTemplate:
        """From chat_template.jinja and additional_chat_templates/, or else tokenizer_config.json,
        of a folder or of what a GGUF file has in their place. Raises CheckpointError.
        """
        contents = Contents.of(checkpoint)
        folder = "additional_chat_templates"
        named = contents.named(folder, ".jinja")
        if contents.has("chat_template.jinja"):
            named.setdefault("default", "chat_template.jinja")
        if named:
            name = _default_of(named, contents.label(folder))
            source = contents.text(name, "a chat template", MAX_TEMPLATE)
            special_tokens = Settings.read(contents).special_tokens
            return ChatTemplate(source, special_tokens, contents.label(name))
        label = contents.label("tokenizer_config.json")
        stored = contents.json_object("tokenizer_config.json").get("chat_template")
        if stored is None:
            raise CheckpointError(
                f"{contents.path}: no chat template, looked for chat_template.jinja "
                "and chat_template in tokenizer_config.json"
            )
        if isinstance(stored, list):
            stored = {each["name"]: each["template"] for each in stored if _is_named(each)}
        if isinstance(stored, dict):
            stored = _default_of(stored, f"{label}: chat_template")
        if not isinstance(stored, str):
            found = type(stored).__name__
            raise CheckpointError(
                f"{label}: chat_template: found {found}, expected str or several with names"
            )
        return ChatTemplate(stored, Settings.read(contents).special_tokens, label)

    @cached_property
    def takes_tools(self) -> bool:
        tree = self._environment.parse(self.source)
        return any(name.name == "tools" for name in tree.find_all(nodes.Name))

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Tools | None = None) -> str:
        """The conversation and the beginning of the assistant's answer."""
        _check_messages(messages)
        self._check_tools(tools, messages)
        try:
            values: dict[str, Any] = {
                "messages": messages,
                "tools": tools or None,
                "documents": None,
                "add_generation_prompt": True,
            }
            return self._environment.render(self._template, {**values, **self._special_tokens})
        except Exception as error:  # whatever a template does with what it did not expect
            raise OptionError(f"messages: refused by the template {self._name}: {error}") from error

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        parse_special: bool = True,
        check: Callable[[str], None] = lambda text: None,
        tools: Tools | None = None,
    ) -> list[int]:
        """Token ids of the rendered conversation.

        parse_special, tools: see Engine.chat_prompt. check: may refuse the text before it is
        encoded.
        """
        control = [token for token in tokenizer.added_tokens if not token.isspace()]
        if parse_special or not control:
            text = self.render(messages, tools)
            check(text)
            # The template writes all special tokens itself.
            return tokenizer.encode(text, add_special_tokens=False)
        _check_messages(messages)
        self._check_tools(tools, messages)
        begin, end = _unused_characters([messages, tools])
        longest_first = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
        mark = partial(re.compile(longest_first).sub, rf"{begin}\g<0>{end}")
        marked, marked_tools = _map_strings(messages, mark), _map_strings(tools, mark)
        # Alternately text that may hold control tokens, and a marked one. What the template has
        # taken apart leaves single marks behind.
        parts = re.split(
            f"{begin}({longest_first}){end}|[{begin}{end}]", self.render(marked, marked_tools)
        )
        check("".join(filter(None, parts)))
        ids = tokenizer.encode(parts[0], add_special_tokens=False)
        for i, part in enumerate(parts[1:], start=1):
            if part:
                found = encode_behind(tokenizer, part, parse_special=i % 2 == 0)
                token = tokenizer.added_tokens.get(part)
                if i % 2 == 1 and token in found and tokenizer.is_special(token):
                    raise OptionError(
                        f"messages: found {part!r}, which this tokenizer can't encode as text"
                    )
                ids += found
        return ids

    def _check_tools(self, tools: Any, messages: Sequence[Mapping[str, Any]]) -> None:
        """Else a template without tools would leave them out."""
        tools = [] if tools is None else tools
        if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
            raise OptionError(
                f"tools: found {tools!r}, expected a list of "
                "{'type': 'function', 'function': {...}}"
            )
        if tools and not self.takes_tools:
            found = f"tools: found {len(tools)}, expected none"
            raise OptionError(f"{found}: the template {self._name} takes none")
        calls = [i for i, message in enumerate(messages) if message.get("tool_calls")]
        if calls and not self.takes_tools:
            place = f"messages[{calls[0]}]['tool_calls']"
            raise OptionError(f"{place}: expected none: the template {self._name} takes no tools")


def _unused_characters(value: Any) -> tuple[str, str]:
    """Two private use characters that no string within the value has."""
    used: set[str] = set()
    _map_strings(value, used.update)
    unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    return next(unused), next(unused)


def _map_strings(value: Any, function: Callable[[str], Any]) -> Any:
    """The value with function(string) for all strings within, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {
            _map_strings(key, function): _map_strings(each, function) for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_strings(each, function) for each in value]
    return value


def _default_of(named: Mapping[str, Any], place: str) -> Any:
    """Of several templates, by name."""
    if "default" not in named:
        raise CheckpointError(f'{place}: found no "default" among {sorted(named)}, expected one')
    return named["default"]


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and {"name", "template"} <= entry.keys()


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise OptionError(
            f"messages: found {messages!r}, expected a list of {{'role': ..., 'content': ...}}"
        )
    if isinstance(messages[0], list | tuple):
        raise OptionError(
            f"messages: found a list of {len(messages)} conversations, expected one conversation"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            found = type(message).__name__
            raise OptionError(f"messages[{i}]: found {found}, expected a dict")
        for key in ("role", "content"):
            if key == "content" and message.get("tool_calls") and message.get(key) is None:
                continue
            if not isinstance(message.get(key), str):
                raise OptionError(
                    f"messages[{i}][{key!r}]: found {message.get(key)!r}, expected a string"
                )
