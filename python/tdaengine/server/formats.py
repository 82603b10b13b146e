"""What an answer must look like."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..grammar import Grammar
from .base import Fields, misplaced


class Schema(Fields):
    """Followed strictly, whether or not that is asked for."""

    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    def grammar(self) -> Grammar | None:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            reason = "missing" if self.json_schema is None else "expected only with that type"
            raise misplaced("response_format.json_schema", reason)
        schema = None if self.json_schema is None else self.json_schema.schema_
        return _grammar(self.type, schema, "response_format.json_schema.schema")


class TextFormat(Fields):
    """The same, as /v1/responses has it."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        return _grammar(self.type, self.schema_, "text.format.schema")


class TextOptions(Fields):
    format: TextFormat | None = None


def _grammar(kind: str, schema: dict[str, Any] | None, place: str) -> Grammar | None:
    if kind == "text":
        return None
    if kind == "json_schema" and schema is None:
        raise misplaced(place, "missing")
    return Grammar.json_schema({"type": "object"} if schema is None else schema)
