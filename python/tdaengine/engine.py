"""The engine with text on both sides: prompts and chats in, pieces of text out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np

from . import _native, hub
from ._native import (
    TDA,
    CalibrateOptions,
    ContextOverflow,
    GenerateOptions,
    GenerationStats,
    OptionError,
    Thresholds,
)
from .chat import ChatTemplate
from .tokenizer import TextStream, Tokenizer, has_tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Output:
    """What was generated. text: None if the checkpoint has no tokenizer. finish_reason: "stop"
    (end-of-text token or stop string), "length" (max_new_tokens), "cancelled" (Stream.cancel, or an
    exception), or None while under way. stats: GenerationStats.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str | None
    stats: GenerationStats


class Stream(Iterator[str]):
    """Pieces of text as they are generated. `output` holds what there is so far, and the whole once
    the pieces are exhausted; its text is the pieces put together.

    One thread at a time takes pieces, a second one gets an OptionError; `cancel` and `output` are
    for any thread.
    """

    def __init__(
        self, generation: _native.Generation, text: TextStream | None, stop: tuple[str, ...]
    ) -> None:
        self._generation = generation
        self._text = text
        self._stop = StopStrings(stop)
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._is_done = False
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
        )

    def _advance(self) -> str:
        try:
            token = self._generation.next()
        finally:
            self._finish_reason = self._generation.finish_reason
            self._stats = self._generation.stats
        if token is not None:
            self._token_ids.append(token)
        if self._text is None:
            self._is_done = token is None
            return ""
        if token is not None:
            piece = self._stop.push(self._text.push(token))
        else:
            piece = self._stop.push(self._text.flush()) + self._stop.flush()
        if self._stop.is_found:
            self._finish_reason = "stop"
        self._is_done = token is None or self._stop.is_found
        return piece


class StopStrings:
    """Cuts a text, given in pieces, before the first stop string."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""  # the end of the text that may be the beginning of a stop string
        self.is_found = False

    def push(self, piece: str) -> str:
        """What of the text is now certain to stand before any stop string."""
        text = self._held + piece
        # The one complete first, whatever the pieces; of several with one end the longest.
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.is_found = True
            self._held = ""
            return text[: min(ends)[1]]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that stop, as a whole longer, begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Engine(_native.Engine):
    """A loaded model. Any number of threads may use it, and so may a child of fork(), with threads
    of its own; computation is one call at a time. It is not pickled: load one in each process that
    is spawned (from an engine folder they share its pages).

    model: a checkpoint folder, or a Hugging Face hub id.
    device: auto | cpu | cuda (f32 and bf16 weights).
    weights: auto | f32 | bf16 | int8 | int4 | bf16c (bf16, compressed without loss).
    kv: how keys and values are cached, auto | f32 | bf16 | int8.
    threads: default as many as this process may run on.
    max_context: in tokens, default the checkpoint's own.
    progress(done, total): of packing, in bytes of weights; those of an engine folder are packed.
    tda: used wherever a call gives none; `tda=False` in a call turns it off there.
    Raises CheckpointError, OptionError or DeviceError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        device: str = "auto",
        weights: str = "auto",
        threads: int | None = None,
        max_context: int | None = None,
        kv: str = "auto",
        tda: TDA | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.path: Path = hub.find(model)
        self.tda = _check_tda(tda)
        super().__init__(
            str(self.path),
            device=_check(device, "device", str),
            weights=_check(weights, "weights", str),
            kv=_check(kv, "kv", str),
            threads=_count(threads, "threads", 2**31 - 1),
            max_context=_count(max_context, "max_context"),
            progress=_check_progress(progress),
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError if the checkpoint has none."""
        return Tokenizer.load(self.path, self.config.vocab_size)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Raises CheckpointError if the checkpoint has none."""
        return ChatTemplate.load(self.path)

    def generate(
        self,
        prompt: Prompt | list[str] | list[Sequence[int]],
        *,
        stop: str | Sequence[str] | None = None,
        tda: TDA | bool | None = None,
        **options: Any,
    ) -> Output | list[Output]:
        """Continues `prompt`, a text or a list of token ids; of several in a list each by itself,
        in order.

        stop: strings that end the text, which stops before them.
        tda: TDA for this call, False for none; without it that of the engine.
        options: the fields of GenerateOptions, as max_new_tokens=128, temperature=0.0 (greedy),
        top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=None, ignore_eos=False.
        Raises OptionError, or ContextOverflow if prompt and max_new_tokens exceed max_context.
        """
        if isinstance(prompt, list | tuple) and prompt and not _is_id(prompt[0]):
            encoded = [self._encode(each, f"prompt[{i}]") for i, each in enumerate(prompt)]
            return [self._generate(each, stop, tda, options) for each in encoded]
        return self._generate(cast(Prompt, prompt), stop, tda, options)

    def stream(
        self,
        prompt: Prompt,
        *,
        stop: str | Sequence[str] | None = None,
        tda: TDA | bool | None = None,
        **options: Any,
    ) -> Stream:
        """`generate` for one `prompt`, piece by piece; for a chat pass `chat_prompt(messages)`.

        stop, tda and options: as in `generate`. What is wrong with them raises here, what goes
        wrong in computing raises with the piece.
        """
        self.tokenizer  # noqa: B018  raises where there is none: ids alone make no pieces
        return self._stream(prompt, stop, tda, options)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stop: str | Sequence[str] | None = None,
        tda: TDA | bool | None = None,
        **options: Any,
    ) -> Output:
        """Answers `messages`, [{"role": "user", "content": "..."}, ...].

        stop, tda and options: as in `generate`. Raises what `chat_prompt` and `generate` raise.
        """
        return self._generate(self.chat_prompt(messages), stop, tda, options)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, `messages`, up to where the answer begins.

        Raises CheckpointError if the checkpoint has no chat template, OptionError for messages that
        are of the wrong shape or that the template refuses.
        """
        # The template writes all special tokens itself.
        tokenizer, text = self.tokenizer, self.chat_template.render(messages)
        self._check_length(text, "messages")
        return tokenizer.encode(text, add_special_tokens=False)

    def score(  # type: ignore[override]  # what has text on both sides takes other arguments
        self,
        token_ids: Sequence[int],
        prompt_tokens: int,
        tda: TDA | bool | None = None,
    ) -> np.ndarray:
        """Log-probability of each of `token_ids` [T] after the first `prompt_tokens`,
        [T - prompt_tokens] f32.

        The prompt is prefilled, the rest goes through the decode path that `generate` uses.
        tda: as in `generate`. Raises OptionError, or ContextOverflow if T exceeds max_context.
        """
        count = _count(prompt_tokens, "prompt_tokens")
        return super().score(token_ids, count, self._tda(tda)).log_probabilities

    def calibrate(  # type: ignore[override]
        self,
        texts: Sequence[str | Sequence[int]] | None = None,
        error: float | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Thresholds:
        """Searches, per layer, the largest threshold whose error (see TDA) on the texts stays at or
        under `error` (default 0.1). Without texts the model writes its own.

        options: the further fields of CalibrateOptions, scope="sequence" or "token"; bytes: instead
        of error, with scope "token", the share of FFN bytes to read; max_tokens=512 and
        sample_tokens=32 of each text; self_texts=16 texts of self_tokens=128 that the model writes
        from seed=0 on. progress(done, total) counts texts, then
        (for a budget of bytes) layers.
        Raises OptionError.
        """
        if texts is not None:
            if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) == 0:
                raise OptionError(f"texts: found {texts!r}, expected a list of texts, or None")
            for name in ("self_texts", "self_tokens", "seed"):
                if name in options:
                    raise OptionError(f"{name} {options[name]!r}: expected only without texts")
        if error is not None:
            if options.get("bytes") is not None:
                raise OptionError(f"error {error!r}: expected only without bytes")
            options["error"] = error
        # Of these, however long, the beginning is taken.
        ids = [
            self._encode(text, f"texts[{i}]", is_prompt=False) for i, text in enumerate(texts or ())
        ]
        return super().calibrate(ids, CalibrateOptions(**options), _check_progress(progress))

    def _generate(
        self,
        prompt: Prompt,
        stop: str | Sequence[str] | None,
        tda: TDA | bool | None,
        options: dict[str, Any],
    ) -> Output:
        stream = self._stream(prompt, stop, tda, options)
        for _ in stream:
            pass
        return stream.output

    def _stream(
        self,
        prompt: Prompt,
        stop: str | Sequence[str] | None,
        tda: TDA | bool | None,
        options: dict[str, Any],
    ) -> Stream:
        stop = _check_stop(stop)
        needs_text = bool(stop) or has_tokenizer(self.path)
        text = self.tokenizer.stream() if needs_text else None
        generation = self.start(self._encode(prompt), GenerateOptions(**options), self._tda(tda))
        return Stream(generation, text, stop)

    def _encode(self, text: Prompt, name: str = "prompt", is_prompt: bool = True) -> Sequence[int]:
        if isinstance(text, str):
            if is_prompt:
                self._check_length(text, name)
            return self.tokenizer.encode(text)
        if isinstance(text, Mapping | bytes) or not isinstance(text, Iterable):
            raise OptionError(f"{name}: found {text!r}, expected a text or a list of token ids")
        return text

    def _check_length(self, text: str, name: str) -> None:
        least = self.tokenizer.least_tokens(text)
        if least > self.max_context:
            raise ContextOverflow(
                f"{name}: found {len(text)} characters, which are {least} tokens or more, "
                f"expected at most max_context {self.max_context}"
            )

    def _tda(self, tda: TDA | bool | None) -> TDA | None:
        if tda is False:
            return None
        return self.tda if tda is None else _check_tda(tda)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer)


def _check(value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, kind):
        raise OptionError(f"{name}: found {value!r}, expected {kind.__name__}")
    return value


def _check_tda(tda: Any) -> TDA | None:
    return None if tda is None else _check(tda, "tda", TDA)


def _check_stop(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise OptionError(f"stop: found {stop!r}, expected a string or several, none of them empty")
    return tuple(strings)


def _check_progress(progress: Any) -> Callable[[int, int], None] | None:
    if progress is not None and not callable(progress):
        raise OptionError(f"progress: found {progress!r}, expected a function of (done, total)")
    return cast(Callable[[int, int], None] | None, progress)


def _count(value: int | None, name: str, most: int = 2**63 - 1) -> int:
    """The engine takes 0 for "not given"."""
    if value is None:
        return 0
    if isinstance(value, bool) or not _is_id(value) or not 1 <= value <= most:
        raise OptionError(f"{name}: found {value!r}, expected an integer from 1 to {most}")
    return int(value)
