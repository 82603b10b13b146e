"""What is generated: whole, or in pieces as it comes."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from . import _native
from ._native import GenerateOptions, GenerationStats, OptionError
from .masks import Mask
from .tokenizer import TextStream


class TokenLogprobs(NamedTuple):
    """One token's log-probability (natural logarithm) and the likeliest tokens at its place, the
    most likely first. They are the model's own, before bias, penalties, masks and temperature.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Output:
    """What was generated. text: None if the checkpoint has no tokenizer. finish_reason: "stop"
    (end-of-text token or stop string), "length" (max_new_tokens), "cancelled" (Stream.cancel, or an
    exception), or None while under way. stats: GenerationStats. logprobs: a TokenLogprobs for each
    of token_ids, or None if the option of that name was not given. str() of it is the text.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str | None
    stats: GenerationStats
    logprobs: list[TokenLogprobs] | None

    def __str__(self) -> str:
        return str(self.token_ids) if self.text is None else self.text


class Stream(Iterator[str]):
    """Pieces of text as they are generated. `output` holds what there is so far, and the whole once
    the pieces are exhausted; its text is the pieces put together.

    One thread at a time takes pieces, a second one gets an OptionError; `cancel` and `output` are
    for any thread.
    """

    def __init__(
        self,
        generation: _native.Generation,
        text: TextStream | None,
        stop: tuple[str, ...],
        options: GenerateOptions,
        mask: Mask | None = None,
    ) -> None:
        self._generation = generation
        self._mask = mask
        self._most = options.max_new_tokens
        self._logprobs: list[TokenLogprobs] | None = None if options.logprobs is None else []
        self._text = text
        self._stop = StopStrings(stop)
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._is_done = False
        self._is_complete = False  # nothing may follow, by the mask
        # As of the last token, since while the next one is made nobody may look.
        self._finish_reason: str | None = None
        self._stats = generation.stats
        self._taking = Lock()

    def __next__(self) -> str:
        """The next piece, not empty. Raises what `generate` raises while computing."""
        if self._taking.locked():
            raise OptionError("stream: found it in use by another thread, expected one at a time")
        # Not acquire(): a signal handler that raises just behind it would leave the lock taken. Of
        # two threads that come here at the same moment one waits for its turn instead.
        with self._taking:
            while not self._is_done:
                piece = self._advance()
                if piece:
                    self._pieces.append(piece)
                    return piece
            raise StopIteration

    def _next_or_none(self) -> str | None:
        return next(self, None)

    async def __aiter__(self) -> AsyncIterator[str]:
        """The same for `async for`: each piece is waited for in a thread. A task that is cancelled
        while it waits cancels the stream."""
        # Not asyncio's threads: all of them could wait for memory that one under way has, which
        # then had no thread to go on in.
        thread = ThreadPoolExecutor(1, "tdaengine-stream")
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        try:
            while True:
                piece = await loop.run_in_executor(thread, context.run, self._next_or_none)
                if piece is None:
                    return
                yield piece
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            thread.shutdown(wait=False)

    def cancel(self) -> None:
        """Ends the stream, from any thread: after the token under way, or in the midst of a long
        prompt, the iteration ends and finish_reason is "cancelled".
        """
        self._generation.cancel()

    @property
    def output(self) -> Output:
        """What there is so far."""
        return Output(
            text=None if self._text is None else "".join(self._pieces),
            token_ids=list(self._token_ids),
            finish_reason=self._finish_reason,
            stats=self._stats,
            logprobs=None if self._logprobs is None else list(self._logprobs),
        )

    def _next_token(self) -> int | None:
        """None at the end, which is also where a grammar ends."""
        if self._is_complete:
            self._generation.cancel()  # which frees its memory
            self._finish_reason = "stop"
            return None
        try:
            allowed = None
            chooses = self._finish_reason is None and len(self._token_ids) < self._most
            if self._mask is not None and chooses:
                allowed = self._mask.allowed()
            token = self._generation.next(allowed)
            if token is not None and self._mask is not None:
                self._is_complete = not self._mask.take(token)
        except BaseException:
            self._generation.cancel()
            raise
        finally:
            self._finish_reason = self._generation.finish_reason
            self._stats = self._generation.stats
        if token is not None:
            self._token_ids.append(token)
            if self._logprobs is not None:
                self._logprobs.append(TokenLogprobs(token, *self._generation.logprobs))
        return token

    def _advance(self) -> str:
        token = self._next_token()
        if self._text is None:
            self._is_done = token is None
            return ""
        if token is None:
            piece = self._stop.push(self._text.flush()) + self._stop.flush()
        else:
            piece = self._stop.push(self._text.push(token), self._text.hidden(token))
        if self._stop.is_found:
            self._generation.cancel()
            self._finish_reason = "stop"
        self._is_done = token is None or self._stop.is_found
        return piece


def whole(stream: Stream) -> Output:
    """Once it has ended."""
    for _ in stream:
        pass
    return stream.output


class StopStrings:
    """Cuts a text, given in pieces, before the first stop string. Special tokens, which the text
    does not show, are searched too.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        # The end of the text that may be the beginning of a stop string, and which of its
        # characters are shown.
        self._held, self._shown = "", ""
        self.is_found = False

    def push(self, piece: str, hidden: str = "") -> str:
        """What is shown of the text that is now certain to stand before any stop string. hidden:
        the text of a special token behind the piece.
        """
        text = self._held + piece + hidden
        shown = self._shown + "+" * len(piece) + "-" * len(hidden)
        # The one complete first, whatever the pieces; of several with one end the longest.
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.is_found = True
            certain, kept = min(ends)[1], len(text)
        else:
            certain = len(text) - max((overlap(text, stop) for stop in self._stop), default=0)
            kept = certain
        self._held, self._shown = text[kept:], shown[kept:]
        return _visible(text[:certain], shown[:certain])

    def flush(self) -> str:
        held = _visible(self._held, self._shown)
        self._held, self._shown = "", ""
        return held


def _visible(text: str, shown: str) -> str:
    return "".join(itertools.compress(text, (flag == "+" for flag in shown)))


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that stop, as a whole longer, begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
