"""What every request passes: who may ask, how large a body may be, the log and the counts."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .faults import INTERNAL, ApiError
from .logs import log
from .metrics import Metrics

OPEN_PATHS = ("/", "/page.css", "/page.js", "/health")
BODY_SECONDS = 30  # in which a body must have come
CLIENT_GONE = 499


@dataclass
class Record:
    """A request's line in the log; what computes it adds to `fields`."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)
    fields: dict[str, Any] = field(default_factory=dict)
    status: int = CLIENT_GONE

    def seconds(self) -> float:
        return time.monotonic() - self.started


@dataclass(frozen=True)
class Rules:
    api_key: str | None
    most_bytes: int
    hosts: frozenset[str] | None  # that a browser may know this server by; None: any


class Gate:
    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics, paths: frozenset[str]) -> None:
        """paths: those that have a metric of their own."""
        self._app, self._rules, self._metrics, self._paths = app, rules, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope["record"] = Record()
        has_started = False

        async def noting(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, await self._with_body(scope, receive), noting)
        except ApiError as error:
            await error.response()(scope, receive, noting)
        except ClientGone:
            pass
        except Exception:
            log("failed", logging.ERROR, id=record.id, path=scope["path"], exc_info=True)
            record.status = 500
            if not has_started:
                await ApiError(500, INTERNAL).response()(scope, receive, noting)
        finally:
            self._note(scope, record)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        hosts = self._rules.hosts
        if hosts and re.sub(r":\d+$", "", headers.get("host", "")) not in hosts:
            # Else a page from anywhere whose name is made to lead to this machine could ask.
            raise ApiError(
                403,
                f"Host: found {headers.get('host', '')!r}, expected {' or '.join(sorted(hosts))}; "
                "with an API key any is taken",
                code="wrong_host",
            )
        key = self._rules.api_key
        if key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(
                401,
                "Authorization: expected Bearer and the API key of this server",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that gives the body, which is here by now, and then what else comes."""
        most = self._rules.most_bytes
        length = Headers(scope=scope).get("content-length", "0")
        too_large = ApiError(
            413, f"body: found more than {most} bytes, expected at most so many", code="too_large"
        )
        if length.isdigit() and int(length) > most:
            raise too_large
        try:
            body = await asyncio.wait_for(_read(receive, most), BODY_SECONDS)
        except asyncio.TimeoutError:
            message = f"body: found it incomplete after {BODY_SECONDS} s, expected all of it"
            raise ApiError(408, message, code="timeout") from None
        if body is None:
            raise too_large
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return replay

    def _note(self, scope: Scope, record: Record) -> None:
        seconds = record.seconds()
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.requests.labels(path, str(record.status)).inc()
        self._metrics.seconds.observe(seconds)
        log(
            "request",
            id=record.id,
            method=scope["method"],
            path=scope["path"],
            status=record.status,
            seconds=round(seconds, 4),
            **record.fields,
        )


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def _read(receive: Receive, most: int) -> bytes | None:
    """The body, or None if it has more bytes than that."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            return None
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)
