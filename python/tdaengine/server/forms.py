"""How answers look: whole and in pieces, by endpoint."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ..info import fields_of
from ..tokenizer import Tokenizer
from .logprobs import LogprobShapes, Place
from .tools import Call, CallReader
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
        self._cached: dict[int, int] = {}  # by prompt

    def add(self, finished: Finished, per_prompt: int) -> None:
        """per_prompt: how many answers each prompt has."""
        prompt, answer = divmod(finished.index, per_prompt)
        if answer == 0:
            self.prompt += finished.prompt_tokens
        # The answers that found most had it from the one which computed it for this request.
        cached = finished.cached_tokens
        self._cached[prompt] = min(cached, self._cached.get(prompt, cached))
        self.new += finished.new_tokens

    def fields(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
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
            self.usage.add(event, self._per_prompt)

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

    def __init__(
        self,
        kind: str,
        *args: Any,
        include_usage: bool = False,
        tokenizer: Tokenizer | None = None,
        likeliest: int = 0,
    ) -> None:
        """tokenizer: with log-probabilities, of `likeliest` tokens beside those chosen."""
        super().__init__(kind, *args)
        self._include_usage = include_usage
        self._tokenizer, self._likeliest = tokenizer, likeliest
        self._places: dict[int, list[Place]] = {}
        self._shapes: dict[int, LogprobShapes] = {}  # of answers that are streamed

    def note(self, event: Piece | Finished) -> None:
        super().note(event)
        self._places.setdefault(event.index, []).extend(event.places)

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index) for index in sorted(self.finished)]
        return {**self._base(self._whole_name), "choices": choices, "usage": self.usage.fields()}

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        if self._include_usage:
            yield {**self._base(self._chunk_name), "choices": [], "usage": self.usage.fields()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._base(self._chunk_name), "choices": [choice]}
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _chunk_logprobs(self, event: Piece | Finished) -> dict[str, Any] | None:
        if self._tokenizer is None or not event.places:
            return None
        shapes = self._shapes.setdefault(event.index, LogprobShapes(self._tokenizer))
        return self._logprobs(shapes, event.places)

    def _all_logprobs(self, index: int) -> dict[str, Any] | None:
        if self._tokenizer is None:
            return None
        return self._logprobs(LogprobShapes(self._tokenizer), self._places[index])

    _whole_name = _chunk_name = ""

    def _choice(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, shapes: LogprobShapes, places: Sequence[Place]) -> dict[str, Any]:
        raise NotImplementedError


class ChatForm(Choices):
    _whole_name, _chunk_name = "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, has_tools: bool = False, **settings: Any) -> None:
        super().__init__("chatcmpl", *args, **settings)
        self._opened: set[int] = set()
        self._readers: dict[int, CallReader] | None = {} if has_tools else None
        self._calls: dict[int, list[Call]] = {}
        self._parts: list[str | Call] = []  # of the last event

    def note(self, event: Piece | Finished) -> None:
        super().note(event)
        self._parts = [event.text] if isinstance(event, Piece) else []
        if self._readers is not None:
            self._read(event, self._readers.setdefault(event.index, CallReader()))

    def _read(self, event: Piece | Finished, reader: CallReader) -> None:
        before = self.texts.get(event.index, "")
        if isinstance(event, Piece):
            self._parts = list(reader.push(event.text))
            before = before.removesuffix(event.text)
        else:
            self._parts = list(reader.flush())
        texts = [part for part in self._parts if isinstance(part, str)]
        self.texts[event.index] = before + "".join(texts)
        calls = [part for part in self._parts if isinstance(part, Call)]
        self._calls.setdefault(event.index, []).extend(calls)

    def chunks(self, event: Piece | Finished) -> Iterator[dict[str, Any]]:
        deltas = list(self._deltas(event.index))
        if event.index not in self._opened:
            self._opened.add(event.index)
            first, *others = deltas or [{}]
            deltas = [{"role": "assistant", "content": "", **first}, *others]
        logprobs, end = self._chunk_logprobs(event), self._end(event)
        if isinstance(event, Finished) or ((logprobs or end) and not deltas):
            deltas.append({})
        for i, delta in enumerate(deltas):
            choice = {"index": event.index, "delta": delta, "logprobs": None, "finish_reason": None}
            is_last = i + 1 == len(deltas)
            yield self._chunk({**choice, **({"logprobs": logprobs, **end} if is_last else {})})

    def _deltas(self, index: int) -> Iterator[dict[str, Any]]:
        calls = self._calls.get(index, [])
        for part in self._parts:
            if isinstance(part, str):
                yield {"content": part}
            else:
                yield {"tool_calls": [{"index": calls.index(part), **part.fields()}]}

    def _choice(self, index: int) -> dict[str, Any]:
        text, calls = self.texts.get(index, ""), self._calls.get(index)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.fields() for call in calls]}
        logprobs, end = self._all_logprobs(index), self._end(self.finished[index])
        return {"index": index, "message": message, "logprobs": logprobs, **end}

    def _end(self, event: Piece | Finished) -> dict[str, Any]:
        end = _end(event)
        if end.get("finish_reason") == "stop" and self._calls.get(event.index):
            end["finish_reason"] = "tool_calls"
        return end

    def _logprobs(self, shapes: LogprobShapes, places: Sequence[Place]) -> dict[str, Any]:
        return shapes.chat(places)


class CompletionForm(Choices):
    _whole_name = _chunk_name = "text_completion"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__("cmpl", *args, **settings)

    def chunks(self, event: Piece | Finished) -> Iterator[dict[str, Any]]:
        text = event.text if isinstance(event, Piece) else ""
        logprobs = self._chunk_logprobs(event)
        choice = {"index": event.index, "text": text, "logprobs": logprobs, "finish_reason": None}
        yield self._chunk({**choice, **_end(event)})

    def _choice(self, index: int) -> dict[str, Any]:
        text, logprobs = self.texts.get(index, ""), self._all_logprobs(index)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            **_end(self.finished[index]),
        }

    def _logprobs(self, shapes: LogprobShapes, places: Sequence[Place]) -> dict[str, Any]:
        return shapes.completion(places, self._likeliest)


def _end(event: Piece | Finished) -> dict[str, Any]:
    """Of an answer's last chunk why it ends, and the engine's stats; of others at most stats."""
    if isinstance(event, Piece):
        return {} if event.stats is None else {"stats": event.stats}
    end: dict[str, Any] = {"finish_reason": event.reason}
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
                "input_tokens_details": usage["prompt_tokens_details"],
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
