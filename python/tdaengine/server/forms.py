"""How answers look: whole and in pieces, by endpoint."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from ..info import fields_of
from .work import Finished, Piece

ENDED = b"data: [DONE]\n\n"


def sent_event(value: dict[str, Any]) -> bytes:
    """One server-sent event; those of /v1/responses are named by their type."""
    name = f"event: {value['type']}\n" if isinstance(value.get("type"), str) else ""
    return f"{name}data: {json.dumps(value)}\n\n".encode()


class Usage:
    """Token counts of a request. A prompt with several answers counts once."""

    def __init__(self) -> None:
        self.prompt, self.new = 0, 0

    def add(self, finished: Finished, is_new_prompt: bool) -> None:
        self.prompt += finished.prompt_tokens if is_new_prompt else 0
        self.new += finished.new_tokens

    def fields(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
        }


class Form:
    """What the forms of all endpoints share: they are told each event, and asked for the chunks of
    a stream or for the whole."""

    def __init__(self, kind: str, model: str, fingerprint: str, per_prompt: int = 1) -> None:
        """per_prompt: how many answers each prompt has."""
        self._id = f"{kind}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model, self._fingerprint = model, fingerprint
        self._per_prompt = per_prompt
        self.usage = Usage()
        self.texts: dict[int, str] = {}
        self.finished: dict[int, Finished] = {}

    def note(self, event: Piece | Finished) -> None:
        if isinstance(event, Piece):
            self.texts[event.index] = self.texts.get(event.index, "") + event.text
        else:
            self.finished[event.index] = event
            self.usage.add(event, event.index % self._per_prompt == 0)

    def chunks(self, event: Piece | Finished) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError

    ends_with_done = True

    def _base(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }


class Choices(Form):
    """Chat and text completions: a list of choices."""

    def __init__(self, kind: str, *args: Any, include_usage: bool = False) -> None:
        super().__init__(kind, *args)
        self._include_usage = include_usage

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index) for index in sorted(self.finished)]
        return {**self._base(self._whole_name), "choices": choices, "usage": self.usage.fields()}

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        if self._include_usage:
            yield {**self._base(self._chunk_name), "choices": [], "usage": self.usage.fields()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._base(self._chunk_name), "choices": [choice]}
        return {**chunk, "usage": None} if self._include_usage else chunk

    _whole_name = _chunk_name = ""

    def _choice(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


class ChatForm(Choices):
    _whole_name, _chunk_name = "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__("chatcmpl", *args, **settings)
        self._opened: set[int] = set()

    def chunks(self, event: Piece | Finished) -> Iterator[dict[str, Any]]:
        delta: dict[str, Any] = {}
        if event.index not in self._opened:
            self._opened.add(event.index)
            delta = {"role": "assistant", "content": ""}
        if isinstance(event, Piece):
            delta = {**delta, "content": event.text}
        elif delta:  # an answer of no token
            yield self._chunk(self._delta(event.index, delta))
            delta = {}
        yield self._chunk({**self._delta(event.index, delta), **_end(event)})

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _choice(self, index: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.texts.get(index, ""), "refusal": None}
        end = _end(self.finished[index])
        return {"index": index, "message": message, "logprobs": None, **end}


class CompletionForm(Choices):
    _whole_name = _chunk_name = "text_completion"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__("cmpl", *args, **settings)

    def chunks(self, event: Piece | Finished) -> Iterator[dict[str, Any]]:
        text = event.text if isinstance(event, Piece) else ""
        choice = {"index": event.index, "text": text, "logprobs": None, "finish_reason": None}
        yield self._chunk({**choice, **_end(event)})

    def _choice(self, index: int) -> dict[str, Any]:
        choice = {"index": index, "text": self.texts.get(index, ""), "logprobs": None}
        return {**choice, **_end(self.finished[index])}


def _end(event: Piece | Finished) -> dict[str, Any]:
    """Of an answer's last chunk why it ends, and the engine's stats; of others at most stats."""
    if isinstance(event, Piece):
        return {} if event.stats is None else {"stats": event.stats}
    end: dict[str, Any] = {"finish_reason": event.reason}
    if event.logprobs is not None:
        end["logprobs"] = event.logprobs
    if event.stats is not None:
        end["stats"] = fields_of(event.stats)
    return end


class ResponseForm(Form):
    """/v1/responses: one message, whose stream is a series of named events."""

    ends_with_done = False

    def __init__(self, *args: Any) -> None:
        super().__init__("resp", *args)
        self._item = f"msg_{uuid.uuid4().hex}"
        self._number = 0

    def chunks(self, event: Piece | Finished) -> Iterator[dict[str, Any]]:
        if self._number == 0:
            yield self._event("created", response=self._response("in_progress"))
            yield self._event("in_progress", response=self._response("in_progress"))
            item = {**self._message("in_progress"), "content": []}
            yield self._event("output_item.added", output_index=0, item=item)
            yield self._part("content_part.added", part=self._text(""))
        if isinstance(event, Piece):
            yield self._part("output_text.delta", delta=event.text, logprobs=[])
            return
        text, status = self.texts.get(0, ""), self._status()
        yield self._part("output_text.done", text=text, logprobs=[])
        yield self._part("content_part.done", part=self._text(text))
        yield self._event("output_item.done", output_index=0, item=self._message(status))
        yield self._event(status, response=self.whole())

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def whole(self) -> dict[str, Any]:
        return self._response(self._status())

    def _status(self) -> str:
        return "completed" if self.finished[0].reason == "stop" else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        finished = self.finished.get(0)
        usage = self.usage.fields()
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": status,
            "output": [self._message(status)] if finished else [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }
            if finished
            else None,
            **({"stats": fields_of(finished.stats)} if finished and finished.stats else {}),
        }

    def _message(self, status: str) -> dict[str, Any]:
        content = [self._text(self.texts.get(0, ""))]
        message = {"id": self._item, "type": "message", "role": "assistant"}
        return {**message, "status": status, "content": content}

    def _text(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _part(self, name: str, **fields: Any) -> dict[str, Any]:
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        return self._event(name, **place, **fields)

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        event = {"type": f"response.{name}", "sequence_number": self._number, **fields}
        self._number += 1
        return event
