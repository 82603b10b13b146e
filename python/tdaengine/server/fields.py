"""What a request may hold. Every field is used, or listed as IGNORED, or refused by name."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from .._native import TDA, OptionError, Thresholds
from ..grammar import Grammar
from .base import MOST_SHOWN, Fields, misplaced, shown
from .faults import ApiError
from .formats import ResponseFormat, TextOptions
from .messages import ChatMessage, Message
from .tools import CLOSE, Choice, Tools, grammar_of_calls

Item = TypeVar("Item")
MOST_CHOICES = 128  # prompts x n
MOST_STOPS, MOST_STOP_CHARACTERS = 64, 1000

# Sent by many clients, of no meaning here and without effect on the answer.
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
# What the engine cannot do: the values that ask for nothing, which are taken, and the reason why
# others are not.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((False,), "log-probabilities come with chat and completions"),
    "top_logprobs": ((0,), "log-probabilities come with logprobs of chat and completions"),
    "response_format": (({"type": "text"},), "schemas are for chat, and responses as text.format"),
    "text": (({}, {"format": {"type": "text"}}), "schemas are for responses and chat"),
    "tools": (([],), "tools are for chat"),
    "tool_choice": (("none", "auto"), "tools are for chat"),
    "parallel_tool_calls": ((True, False), "tools are for chat"),
    "functions": (([],), "tools took their place"),
    "function_call": (("none", "auto"), "tool_choice took its place"),
    "modalities": ((["text"],), "there is only text"),
    "audio": ((), "there is only text"),
    "prediction": ((), "predicted output is not used"),
    "reasoning_effort": (("none",), "the effort cannot be set"),
    "reasoning": (({},), "the effort cannot be set"),
    "verbosity": (("medium",), "the length cannot be set but by max_tokens"),
    "web_search_options": ((), "there is no web search"),
    "suffix": (("",), "text is continued at its end"),
    "best_of": ((1,), "answers are not compared"),
    "previous_response_id": ((), "responses are not kept"),
    "conversation": ((), "conversations are not kept"),
    "background": ((False,), "responses are not kept"),
    "include": (([],), "there is nothing more to include"),
    "truncation": (("disabled",), "prompts are not cut"),
    "max_tool_calls": ((), "tools are not called here"),
}


class StreamOptions(Fields):
    include_usage: bool = False
    include_stats: bool = False
    include_obfuscation: Literal[False] = False


# A list's first fault is enough: a body may hold a million of them.
Prompts = Annotated[list[Item], Field(fail_fast=True, max_length=MOST_CHOICES)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=1)]
Answers = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
Likeliest = Annotated[int, Field(ge=0, le=20)]
Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]


SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "ignore_eos"),
)


class Sampling(Fields):
    """What all endpoints take. The ranges of numbers are the engine's to check."""

    model: str
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    tda: bool | dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, fields: Any) -> Any:
        """Takes what is ignored out, and what asks for nothing."""
        if not isinstance(fields, dict):
            return fields
        kept = {}
        for name, value in fields.items():
            neutral, reason = REFUSED.get(name, ((), ""))
            if reason and value is not None and name not in cls.model_fields:
                if not any(value == each for each in neutral):
                    accepted = " or ".join(json.dumps(each) for each in (*neutral, None))
                    raise ApiError(
                        400,
                        f"{name}: found {shown(value)}, expected {accepted}: {reason}",
                        param=name,
                        code="unsupported_parameter",
                    )
            elif name in cls.model_fields or (name not in IGNORED and not reason):
                kept[name] = value
        return kept

    def sampling(self) -> dict[str, Any]:
        """The fields of GenerateOptions that are given."""
        given = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        if self.logit_bias:
            given["logit_bias"] = dict(map(_bias, self.logit_bias.items()))
        return given

    def grammar(self) -> Grammar | None:
        """What the answer must look like."""
        return None

    def likeliest(self) -> int | None:
        """How many log-probabilities of the likeliest tokens are asked for, if any."""
        return None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def setting(self) -> TDA | bool | None:
        """As Engine.generate takes it."""
        if self.tda is None or self.tda is False:
            return self.tda
        return TDA() if self.tda is True else _tda(self.tda)


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Answers | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Likeliest | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None

    def plain(self) -> list[dict[str, Any]]:
        return [message.plain(f"messages[{i}]") for i, message in enumerate(self.messages)]

    def likeliest(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise misplaced("top_logprobs", "expected only with logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def offered_tools(self) -> list[dict[str, Any]] | None:
        """As templates take them."""
        if self.tool_choice == "none" or not self.tools:
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def grammar(self) -> Grammar | None:
        form = None if self.response_format is None else self.response_format.grammar()
        choice = self.tool_choice
        if not self.tools and choice not in (None, "none", "auto"):
            raise misplaced("tool_choice", "expected only with tools")
        if form is not None and self.offered_tools():
            raise misplaced("response_format", "expected none with tools, or tool_choice none")
        return form or grammar_of_calls(self.tools or [], choice, self.parallel_tool_calls)

    def stops(self) -> list[str]:
        """One call at most ends with that call."""
        is_one = self.offered_tools() and self.parallel_tool_calls is False
        return [*super().stops(), CLOSE] if is_one and not self.is_forced() else super().stops()

    def is_forced(self) -> bool:
        """Whether the answer must call a tool."""
        return self.tool_choice not in (None, "none", "auto")


class CompletionRequest(Sampling):
    prompt: str | Prompts[str] | Ids | Prompts[Ids]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Answers | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: Likeliest | None = None

    def likeliest(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)


class ResponsesRequest(Sampling):
    input: str | Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None

    def grammar(self) -> Grammar | None:
        return None if self.text is None or self.text.format is None else self.text.format.grammar()

    def messages(self) -> list[dict[str, Any]]:
        system = [] if self.instructions is None else [("system", self.instructions)]
        if isinstance(self.input, str):
            return [_message(*each) for each in (*system, ("user", self.input))]
        plain = [message.plain(f"input[{i}]") for i, message in enumerate(self.input)]
        return [*(_message(*each) for each in system), *plain]


def _tda(fields: Mapping[str, Any]) -> TDA:
    """thresholds are those of the file that `tdaengine calibrate` writes, as an object: no file of
    the server's is named by clients."""
    for name in fields:
        if name not in TDA.fields:
            message = f"tda.{name[:MOST_SHOWN]}: expected one of {', '.join(TDA.fields)}"
            raise ApiError(400, message, param="tda", code="unknown_parameter")
    values = dict(fields)
    if "thresholds" in values:
        if not isinstance(values["thresholds"], dict):
            raise ApiError(
                400,
                f"tda.thresholds: found {shown(values['thresholds'])}, expected an object, the "
                "content of a file that `tdaengine calibrate` wrote",
                param="tda.thresholds",
                code="invalid_value",
            )
        values["thresholds"] = _thresholds(values["thresholds"])
    try:
        return TDA(**values)
    except (OptionError, TypeError) as error:
        message = re.sub("^(tda: )?(?!tda)", "tda: ", str(error))
        raise ApiError(400, message, param="tda", code="invalid_value") from error


def _thresholds(value: dict[str, Any]) -> Thresholds:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tda.thresholds")
        path.write_text(json.dumps(value))
        try:
            return Thresholds.load(path)
        except Exception as error:
            message = str(error).replace(str(path), "tda.thresholds")
            raise ApiError(400, message, param="tda.thresholds", code="invalid_value") from error


def _bias(item: tuple[str, float]) -> tuple[int, float]:
    token, bias = item
    if not re.fullmatch("[0-9]{1,9}", token):
        message = f"logit_bias: found {shown(token)}, expected a token id"
        raise ApiError(400, message, param="logit_bias", code="invalid_value")
    return int(token), bias


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
