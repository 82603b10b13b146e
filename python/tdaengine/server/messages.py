"""Messages of a conversation, as requests have them and as templates take them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import Fields, misplaced
from .faults import ApiError
from .tools import ToolCall

CONTENT = 'a text or a list of {"type": "text", "text": "..."}'


class TextPart(Fields):
    type: Literal["text", "input_text", "output_text"]
    text: str


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    type: Literal["message"] = "message"

    def plain(self, place: str) -> dict[str, Any]:
        """As templates take it. What OpenAI calls developer they know as system."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text(self.content)}


class ChatMessage(Fields):
    """Also an earlier answer that called tools, and what those gave."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: None = None  # as answers have it, which come back in the next request

    def plain(self, place: str) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": _text(self.content or "")}
        if self.tool_calls:
            if role != "assistant":
                raise misplaced(f"{place}.tool_calls", "expected only of the role assistant")
            calls = enumerate(self.tool_calls)
            message["tool_calls"] = [call.plain(f"{place}.tool_calls[{i}]") for i, call in calls]
        elif self.content is None:
            raise _no_content(f"{place}.content", "content" in self.model_fields_set)
        if (self.tool_call_id is not None) != (role == "tool"):
            reason = "missing" if role == "tool" else "expected only of the role tool"
            raise misplaced(f"{place}.tool_call_id", reason)
        if role == "tool":
            message["tool_call_id"] = self.tool_call_id
        return message


def _no_content(place: str, is_null: bool) -> ApiError:
    if not is_null:
        return misplaced(place, "missing")
    return misplaced(place, f"found null, expected {CONTENT}")


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
