"""Carries a request out and sends the answer, as long as there is someone to send it to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .faults import Told
from .forms import ENDED, Form, sent_event
from .gate import Record
from .logs import log
from .metrics import Metrics
from .scheduler import Scheduler, Work
from .work import Finished, Piece

Events = AsyncIterator[Piece | Finished]


class Answer(Response):
    def __init__(
        self,
        scheduler: Scheduler,
        metrics: Metrics,
        told: Told,
        works: Sequence[Work],
        form: Form,
        is_stream: bool,
    ) -> None:
        super().__init__()
        self._scheduler, self._metrics, self._told = scheduler, metrics, told
        self._works, self._form, self._is_stream = works, form, is_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_gone = await _while_there(self._carry_out(scope, receive, send), receive)
        if is_gone:
            scope["record"].fields["error"] = "client_gone"

    async def _carry_out(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["record"]
        async with self._scheduler.run(self._works) as events:
            record.fields["queue_seconds"] = round(record.seconds(), 4)
            noted = self._noted(events, record)
            if self._is_stream:
                await self._send_stream(noted, record, send)
                return
            async for _ in noted:
                pass
        await JSONResponse(self._form.whole())(scope, receive, send)

    async def _noted(self, events: Events, record: Record) -> Events:
        """The events, counted and told to the form."""
        is_first = True
        async for event in events:
            if is_first:
                self._metrics.first.observe(record.seconds())
                is_first = False
            if isinstance(event, Finished):
                self._metrics.count(event)
            self._form.note(event)
            yield event
        usage = self._form.usage
        record.fields |= {"prompt_tokens": usage.prompt, "new_tokens": usage.new}

    async def _send_stream(self, events: Events, record: Record, send: Send) -> None:
        """What goes wrong before the first event is an error like any other; later it can only be
        said in the stream."""
        first = await anext(events)
        headers = {"content-type": "text/event-stream", "cache-control": "no-store"}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": encoded})

        async def write(content: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": content, "more_body": more})

        try:
            await write(b"".join(map(sent_event, self._form.chunks(first))))
            async for event in events:
                await write(b"".join(map(sent_event, self._form.chunks(event))))
            last = b"".join(map(sent_event, self._form.last_chunks()))
            await write(last + (ENDED if self._form.ends_with_done else b""))
        except Exception as error:
            known = self._told(error, record.id)
            if known.status_code == 500:
                log("failed", logging.ERROR, exc_info=True, id=record.id)
            record.fields["error"] = known.code
            await write(sent_event(known.body))
        await write(b"", more=False)


async def _while_there(carrying_out: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Cancels it when the client goes away; whether that was so."""
    task = asyncio.ensure_future(carrying_out)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        is_gone = not task.done()
    finally:  # also when the server gives this request up
        task.cancel()
        gone.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return is_gone


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
