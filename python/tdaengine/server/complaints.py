"""What is wrong with a request, in the words of this server instead of pydantic's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .base import shown
from .faults import ApiError
from .messages import CONTENT

# Of fields that take several types pydantic complains about one at a time.
UNIONS = {
    "prompt": "a text, token ids, or a list of texts or of lists of token ids",
    "stop": "a text or a list of texts",
    "input": "a text or a list of messages",
    "content": CONTENT,
    "tda": "true, false, or an object with options of TDA",
    "tool_choice": '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
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
    "dict_type": "an object",
    "none_required": "null",
    "string_pattern_mismatch": "a text that matches {pattern}",
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
    text = shown(error["input"])
    if kind in ("too_long", "string_too_long"):
        text = str(len(error["input"]))
    message = f"{param}: found {text}, expected {expected}"
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
