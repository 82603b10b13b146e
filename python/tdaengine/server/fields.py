"""What a request may hold. Every field is used, or listed as IGNORED, or refused by name."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .._native import TDA, OptionError, Thresholds
from .faults import ApiError

Item = TypeVar("Item")
MOST_CHOICES = 128  # prompts x n
MOST_SHOWN = 100  # characters of a value in a message
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
    "frequency_penalty": ((0,), "there are no penalties but repetition_penalty"),
    "presence_penalty": ((0,), "there are no penalties but repetition_penalty"),
    "logit_bias": (({},), "logits are not changed"),
    "logprobs": ((False,), "log-probabilities are not kept while generating"),
    "top_logprobs": ((0,), "log-probabilities are not kept while generating"),
    "response_format": (({"type": "text"},), "output follows no schema"),
    "text": (({}, {"format": {"type": "text"}}), "output follows no schema"),
    "tools": (([],), "tools are not called"),
    "tool_choice": (("none", "auto"), "tools are not called"),
    "parallel_tool_calls": ((True, False), "tools are not called"),
    "functions": (([],), "tools are not called"),
    "function_call": (("none", "auto"), "tools are not called"),
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
    "max_tool_calls": ((), "tools are not called"),
}


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: Any) -> Any:
        """Of unknown fields, of which there may be a million, the first one is enough."""
        if isinstance(fields, dict):
            for name in fields:
                if name not in cls.model_fields:
                    raise PydanticCustomError("unknown_field", "unknown field", {"name": name})
        return fields


class StreamOptions(_Fields):
    include_usage: bool = False
    include_stats: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(_Fields):
    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    type: Literal["message"] = "message"

    def plain(self) -> dict[str, str]:
        """As templates take it. What OpenAI calls developer they know as system."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


# A list's first fault is enough: a body may hold a million of them.
Prompts = Annotated[list[Item], Field(fail_fast=True, max_length=MOST_CHOICES)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=1)]
Answers = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]


class Sampling(_Fields):
    """What all endpoints take. The ranges of numbers are the engine's to check."""

    model: str
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
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
                        f"{name}: found {_shown(value)}, expected {accepted}: {reason}",
                        param=name,
                        code="unsupported_parameter",
                    )
            elif name in cls.model_fields or (name not in IGNORED and not reason):
                kept[name] = value
        return kept

    def sampling(self) -> dict[str, Any]:
        """The fields of GenerateOptions that are given."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def setting(self) -> TDA | bool | None:
        """As Engine.generate takes it."""
        if self.tda is None or self.tda is False:
            return self.tda
        return TDA() if self.tda is True else _tda(self.tda)


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Answers | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(Sampling):
    prompt: str | Prompts[str] | Ids | Prompts[Ids]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Answers | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

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

    def messages(self) -> list[dict[str, str]]:
        system = [] if self.instructions is None else [("system", self.instructions)]
        if isinstance(self.input, str):
            return [_message(*each) for each in (*system, ("user", self.input))]
        return [*(_message(*each) for each in system), *(each.plain() for each in self.input)]


# Of fields that take several types pydantic complains about one at a time.
UNIONS = {
    "prompt": "a text, token ids, or a list of texts or of lists of token ids",
    "stop": "a text or a list of texts",
    "input": "a text or a list of messages",
    "content": 'a text or a list of {"type": "text", "text": "..."}',
    "tda": "true, false, or an object with options of TDA",
}
# What pydantic expected, by the type of its complaint.
EXPECTED = {
    "string_type": "a text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "{expected}",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "at most {le}",
    "too_short": "{min_length} or more items",
    "too_long": "at most {max_length} items",
    "string_too_short": "{min_length} or more characters",
    "string_too_long": "at most {max_length} characters",
}
NO_JSON = ApiError(
    400,
    "body: expected a JSON object, sent as Content-Type: application/json",
    code="invalid_json",
)


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One of pydantic's complaints, about the field as the client wrote it."""
    error = min(errors, key=_order)
    kind, param = error["type"], _param(error)
    if kind == "unknown_field":
        param = ".".join(filter(None, (param, error["ctx"]["name"][:100])))
        return ApiError(400, f"{param}: unknown field", param=param, code="unknown_parameter")
    if kind == "json_invalid":
        return ApiError(400, f"body: {error['ctx']['error']}, expected JSON", code="invalid_json")
    if not param:
        return NO_JSON
    if kind == "missing":
        return ApiError(400, f"{param}: missing", param=param, code="missing_parameter")
    name = param.rsplit(".", 1)[-1]
    if name in UNIONS and _is_of_type(error):
        expected = UNIONS[name]
    elif kind in EXPECTED:
        expected = EXPECTED[kind].format(**error.get("ctx", {}))
    else:
        expected = str(error["msg"])
    shown = _shown(error["input"])
    if kind in ("too_long", "string_too_long"):
        shown = str(len(error["input"]))
    message = f"{param}: found {shown}, expected {expected}"
    return ApiError(400, message, param=param, code="invalid_value")


def _is_of_type(error: Mapping[str, Any]) -> bool:
    return str(error["type"]).endswith("_type")


def _order(error: Mapping[str, Any]) -> tuple[bool, int]:
    """Where a field takes several types, the one that fits in all but a value comes first, the
    deepest; where none fits, what the field holds as a whole."""
    is_of_type = _is_of_type(error)
    return is_of_type, len(error["loc"]) if is_of_type else -len(error["loc"])


def _param(error: Mapping[str, Any]) -> str:
    """As messages[0].content. Pydantic also names which type of a union it tried, as "list[str]",
    "constrained-str" or "TextPart"."""
    param = ""
    for place in error["loc"][1:]:
        if isinstance(place, int):
            param += f"[{place}]"
        elif re.fullmatch("[a-z_]+", place) and place not in ("str", "int", "bool"):
            param += f".{place}" if param else place
    return param


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
                f"tda.thresholds: found {_shown(values['thresholds'])}, expected an object, the "
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


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _shown(value: Any) -> str:
    """A value in a message, not all of a long one."""
    if isinstance(value, str | list):
        value = value[:MOST_SHOWN]
    text = json.dumps(value, default=str)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
