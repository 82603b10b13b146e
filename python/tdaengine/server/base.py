"""What all objects in a request share."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from .faults import ApiError

MOST_SHOWN = 100  # characters of a value in a message


class Fields(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: Any) -> Any:
        """Of unknown fields, of which there may be a million, the first one is enough."""
        if isinstance(fields, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for name in fields:
                if name not in known:
                    raise PydanticCustomError("unknown_field", "unknown field", {"name": name})
        return fields


def misplaced(place: str, reason: str) -> ApiError:
    code = "missing_parameter" if reason == "missing" else "invalid_value"
    return ApiError(400, f"{place}: {reason}", param=place, code=code)


def shown(value: Any) -> str:
    """A value in a message, not all of a long one."""
    if isinstance(value, str | list):
        value = value[:MOST_SHOWN]
    text = json.dumps(value, default=str)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
