"""Errors as clients of the OpenAI API expect them: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from .._native import CheckpointError, ContextOverflow, Error, GenerateOptions, OptionError
from .logs import log


class ApiError(HTTPException):
    """A request that cannot be met, with the status it ends in. param: the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


FIELDS = {"prompt", "messages", "tools", "tda", *GenerateOptions.fields}
INTERNAL = "the server failed; its log says more"


def api_error(error: Exception) -> ApiError:
    """What a client is told of any exception: of the engine's own all, of others nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException) and error.status_code == 400:  # nested too deep, no UTF-8
        return ApiError(400, "body: cannot be parsed, expected JSON", code="invalid_json")
    if isinstance(error, HTTPException):  # no such path, no such method
        code = "_".join(str(error.detail).lower().split())
        return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
    if isinstance(error, ContextOverflow):
        return ApiError(400, str(error), param=_param(error), code="context_length_exceeded")
    if isinstance(error, OptionError | CheckpointError):
        return ApiError(400, str(error), param=_param(error), code="invalid_value")
    if isinstance(error, Error):
        return ApiError(500, str(error))
    return ApiError(500, INTERNAL)


class Told:
    """What clients are told of exceptions: as api_error, without where the model lies on this
    machine. The log has the whole."""

    def __init__(self, model: Path, name: str) -> None:
        """name: that clients know the model by."""
        self._hidden: dict[str, str] = {}
        for path in (model.resolve(), model):
            if len(path.parts) > 1:  # else it is a name
                self._hidden |= {f"{path}/": "", str(path): name, f"{path.parent}/": ""}

    def __call__(self, error: Exception, id: str) -> ApiError:
        """id: of the request."""
        known = api_error(error)
        message = known.detail
        if isinstance(error, Error):  # the server's own messages name no files
            for path, shown in self._hidden.items():
                message = message.replace(path, shown)
        if message == known.detail:
            return known
        log("refused", logging.WARNING, id=id, message=known.detail)
        return ApiError(
            known.status_code, message, param=known.param, code=known.code, headers=known.headers
        )


def _param(error: Error) -> str | None:
    """Messages of the engine begin with what they are about."""
    found = re.match(r"\w+", str(error))
    return found[0] if found and found[0] in FIELDS else None
