"""Tools: what a request says of them, and the calls that a model writes.

Models are taught several forms of a call. This is the most common one, of Hermes and Qwen:
<tool_call>{"name": "...", "arguments": {...}}</tool_call>, any number of them, with text before.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from ..grammar import JSON_STYLE, Grammar, check_levels
from ..stream import overlap
from .base import Fields
from .faults import ApiError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_TOOLS = 128
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(Fields):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class ChosenFunction(Fields):
    name: str


class ChosenTool(Fields):
    type: Literal["function"]
    function: ChosenFunction


class CalledFunction(Fields):
    name: str
    arguments: str


class ToolCall(Fields):
    """Of an earlier answer, in a message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self, place: str) -> dict[str, Any]:
        """As templates take it, which write the arguments as JSON themselves."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ApiError(
                400,
                f"{place}.function.arguments: expected a JSON object, as text",
                param=f"{place}.function.arguments",
                code="invalid_value",
            )
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)]
Choice = Literal["none", "auto", "required"] | ChosenTool


def grammar_of_calls(
    tools: Sequence[Tool], choice: Any, is_parallel: bool | None
) -> Grammar | None:
    """What an answer that must call looks like; None where it need not."""
    if choice in (None, "none", "auto"):
        return None
    chosen = [tool.function for tool in tools]
    if isinstance(choice, ChosenTool):
        chosen = [function for function in chosen if function.name == choice.function.name]
        if not chosen:
            message = f"tool_choice: found {choice.function.name[:100]!r}, expected one of tools"
            raise ApiError(400, message, param="tool_choice", code="invalid_value")
    rules = ['start: call ("\\n" call)*' if is_parallel is not False else "start: call"]
    names = " | ".join(f"call_{i}" for i in range(len(chosen)))
    rules.append(f'call: "{OPEN}\\n" ({names}) "\\n{CLOSE}"')
    for i, function in enumerate(chosen):
        # References within the parameters begin at their root.
        parameters = {"type": "object", **(function.parameters or {}), "x-guidance": JSON_STYLE}
        check_levels(parameters)
        beginning = json.dumps(f'{{"name": "{function.name}", "arguments": ')
        rules.append(f'call_{i}: {beginning} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json.dumps(parameters)}")
    return Grammar.lark("\n".join(rules))


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def fields(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallReader:
    """Finds calls in an answer that comes piece by piece. What is no call, as one whose JSON is
    broken, stays text; spaces before a call and at the end are dropped."""

    def __init__(self) -> None:
        self._held = ""  # text that may be the beginning of a tag, or what follows OPEN
        self._spaces = ""  # of the text before it
        self._is_inside = False

    def push(self, piece: str) -> Iterator[str | Call]:
        self._held += piece
        while True:
            before, tag, after = self._held.partition(CLOSE if self._is_inside else OPEN)
            if not tag:
                break
            self._held = after
            yield from self._call(before, CLOSE) if self._is_inside else self._text(before)
            self._is_inside = not self._is_inside
        if not self._is_inside:
            certain = len(self._held) - overlap(self._held, OPEN)
            text, self._held = self._held[:certain], self._held[certain:]
            yield from self._text(text)

    def flush(self) -> Iterator[str | Call]:
        """A call that lacks its end is one if its JSON is complete."""
        held, self._held = self._held, ""
        yield from self._call(held, "") if self._is_inside else self._text(held)

    def _text(self, text: str) -> Iterator[str]:
        shown = (self._spaces + text).rstrip()
        self._spaces = (self._spaces + text)[len(shown) :]
        if shown:
            yield shown

    def _call(self, content: str, end: str) -> Iterator[str | Call]:
        try:
            call = json.loads(content)
        except (ValueError, RecursionError):
            call = None
        if isinstance(call, dict):
            name, arguments = call.get("name"), call.get("arguments", {})
            if isinstance(name, str) and isinstance(arguments, dict):
                self._spaces = ""
                yield Call(name, json.dumps(arguments, ensure_ascii=False))
                return
        yield from self._text(OPEN + content + end)
