"""The log: one JSON object a line on stderr, without the text of prompts or answers."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from typing import Any

from ..engine import TdaWarning

logger = logging.getLogger("tdaengine.server")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log(event: str, level: int = logging.INFO, exc_info: bool = False, **fields: Any) -> None:
    logger.log(level, event, exc_info=exc_info, extra={"fields": fields})


def set_up() -> None:
    """Whatever is said, by libraries and in warnings, too, becomes such lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(logging.INFO)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        log("warning", logging.WARNING, message=str(message))

    warnings.showwarning = show
    warnings.simplefilter("ignore", TdaWarning)  # told to whom it concerns, in an answer's stats
