"""Conversations as one text, by the checkpoint's own chat template (Jinja)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from ._native import CheckpointError, OptionError
from .files import MAX_TEMPLATE, read_text
from .sandbox import BoundedEnvironment
from .tokenizer import read_settings


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


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike Jinja's own it leaves <, > and & as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


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
        self._special_tokens = special_tokens
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        # Jinja's own, but also what Python says of the code it makes, as of too many nested blocks.
        except Exception as error:
            raise CheckpointError(f"{name}: chat template: {error}") from error

    @staticmethod
    def load(folder: Path) -> ChatTemplate:
        """From chat_template.jinja, or else tokenizer_config.json. Raises CheckpointError."""
        settings = read_settings(folder)
        tokens = {
            name: token
            for name, token in settings.items()
            if name.endswith("_token") and isinstance(token, str)
        }
        path = folder / "chat_template.jinja"
        if os.path.lexists(path):
            source = read_text(path, "a chat template", MAX_TEMPLATE)
            return ChatTemplate(source, tokens, str(path))
        path = folder / "tokenizer_config.json"
        named = settings.get("chat_template")
        if named is None:
            raise CheckpointError(
                f"{folder}: no chat template, looked for chat_template.jinja "
                "and chat_template in tokenizer_config.json"
            )
        return ChatTemplate(_default_of(named, path), tokens, str(path))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation and the beginning of the assistant's answer."""
        _check_messages(messages)
        try:
            values: dict[str, Any] = {
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
            }
            return self._environment.render(self._template, {**values, **self._special_tokens})
        except Exception as error:  # whatever a template does with what it did not expect
            raise OptionError(f"messages: refused by the template {self._name}: {error}") from error


def _default_of(source: Any, path: Path) -> str:
    """chat_template is one template, or a list of them with names."""
    if isinstance(source, list):
        named = {each["name"]: each["template"] for each in source if _is_named(each)}
        if "default" not in named:
            raise CheckpointError(f'{path}: chat_template has no "default" among {list(named)}')
        source = named["default"]
    if not isinstance(source, str):
        found = type(source).__name__
        raise CheckpointError(f"{path}: chat_template: found {found}, expected str or a list")
    return source


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
            if not isinstance(message.get(key), str):
                raise OptionError(
                    f"messages[{i}][{key!r}]: found {message.get(key)!r}, expected a string"
                )
