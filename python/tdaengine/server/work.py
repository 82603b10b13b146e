"""What requests have computed: answers, or log-probabilities of prompts."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._native import TDA, ContextOverflow, GenerateOptions, GenerationStats, OptionError
from ..engine import Engine
from ..grammar import Grammar
from ..info import fields_of
from ..stream import Output, Stream
from .faults import ApiError
from .logprobs import Place

MOST_LOGIT_BYTES = 2 << 30
STATS_SECONDS = 0.05  # between the stats of an answer under way


@dataclass(frozen=True)
class Choice:
    """One answer that is asked for."""

    index: int
    ids: list[int]
    options: GenerateOptions
    stop: list[str]
    tda: TDA | bool | None
    echo: str = ""  # what its text begins with
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Piece:
    index: int
    text: str
    stats: dict[str, Any] | None = None
    places: Sequence[Place] = ()  # if log-probabilities are asked for: the tokens since the last


@dataclass(frozen=True)
class Finished:
    """An answer's end. stats: None where nothing was decoded. places: those no piece had."""

    index: int
    reason: str
    prompt_tokens: int
    new_tokens: int
    stats: GenerationStats | None = None
    places: Sequence[Place] = ()

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, those that were kept from earlier ones."""
        return 0 if self.stats is None else self.stats.cached_tokens


def check_prompt(
    engine: Engine, name: str, ids: Sequence[int], new_tokens: int, most_cache_bytes: float
) -> None:
    """What would else be found only when a request has its turn. Raises OptionError or
    ContextOverflow."""
    cache_bytes = (len(ids) + new_tokens) * engine.kv_bytes_per_token
    if len(ids) + new_tokens > engine.max_context:
        raise ContextOverflow(
            f"{name}: found {len(ids)} tokens, which with {new_tokens} new ones exceed the context "
            f"of {engine.max_context} tokens"
        )
    if cache_bytes > most_cache_bytes:
        raise ContextOverflow(
            f"{name}: found {len(ids)} tokens, which with {new_tokens} new ones need a KV cache of "
            f"{cache_bytes} bytes, expected at most the {most_cache_bytes} bytes of "
            "--cache-memory: ask for fewer, or give the server more"
        )
    vocab = engine.config.vocab_size
    for i, token in enumerate(ids):
        if not 0 <= token < vocab:
            raise OptionError(f"{name}: token {i} is {token}, expected 0 to {vocab - 1}")


class Generating:
    """One answer."""

    def __init__(self, engine: Engine, choice: Choice, with_stats: bool) -> None:
        self._engine, self._choice, self._with_stats = engine, choice, with_stats
        tokens = len(choice.ids) + choice.options.max_new_tokens
        self.cache_bytes = tokens * engine.kv_bytes_per_token
        self._stream: Stream | None = None
        self._is_cancelled = False

    def __iter__(self) -> Iterator[Piece | Finished]:
        try:
            yield from self._events()
        finally:
            self._stream = None  # its cache is no longer counted

    def _events(self) -> Iterator[Piece | Finished]:
        choice = self._choice
        # cancel() sets the flag, then looks for a stream; here it is the other way round.
        self._stream = self._engine.stream(
            choice.ids, choice.options, stop=choice.stop, tda=choice.tda, grammar=choice.grammar
        )
        if self._is_cancelled:
            return
        if choice.echo:
            yield Piece(choice.index, choice.echo)
        told = yield from self._pieces(choice.index, self._stream)
        yield _finished(choice, self._stream.output, told)

    def _pieces(self, index: int, stream: Stream) -> Generator[Piece, None, int]:
        """Returns how many tokens' log-probabilities the pieces had."""
        shown, told = 0.0, 0
        for text in stream:
            stats = None
            if self._with_stats and time.monotonic() - shown >= STATS_SECONDS:
                stats = fields_of(stream.output.stats)
                shown = time.monotonic()
            places = _places(stream.output, told)
            told += len(places)
            yield Piece(index, text, stats, places)
        return told

    def cancel(self) -> None:
        self._is_cancelled = True
        if (stream := self._stream) is not None:
            stream.cancel()


class Scoring:
    """Prompts with the log-probabilities of their tokens and, if `has_new`, of the one greedy token
    behind them. All come from the prefill, which is dense and computed for one prompt at a time."""

    def __init__(self, engine: Engine, choices: list[Choice], top: int, has_new: bool) -> None:
        self._engine, self._choices, self._top, self._has_new = engine, choices, top, has_new
        self._is_cancelled = False
        self.cache_bytes = max(len(each.ids) for each in choices) * engine.kv_bytes_per_token
        for choice in choices:
            size = 4 * len(choice.ids) * engine.config.vocab_size
            if size > MOST_LOGIT_BYTES:
                raise ApiError(
                    400,
                    f"prompt: found {len(choice.ids)} tokens, whose logits take {size} bytes, "
                    f"expected at most {MOST_LOGIT_BYTES} bytes with echo and logprobs",
                    param="prompt",
                    code="context_length_exceeded",
                )

    def __iter__(self) -> Iterator[Piece | Finished]:
        for choice in self._choices:
            if self._is_cancelled:
                return
            logits = self._engine.logits(choice.ids)
            new = [int(logits[-1].argmax())] if self._has_new else []
            tokenizer = self._engine.tokenizer
            text = tokenizer.stream()
            continuation = "".join([*map(text.push, new), text.flush()])
            yield Piece(choice.index, choice.echo + continuation)
            places = self._places(choice.ids + new, logits)
            count = len(choice.ids)
            yield Finished(choice.index, "length", count, len(new), places=places)

    def cancel(self) -> None:
        self._is_cancelled = True

    def _places(self, ids: list[int], logits: np.ndarray) -> list[Place]:
        """There is no log-probability of the first token."""
        places = [Place(ids[0], None, ())]
        for row, token in zip(logits, ids[1:], strict=False):
            values = log_softmax(row)
            best = np.argpartition(-values, self._top)[: self._top]
            best = best[np.argsort(-values[best], kind="stable")]
            top = [(int(each), float(values[each])) for each in best]
            places.append(Place(token, float(values[token]), top))
        return places


def _finished(choice: Choice, output: Output, told: int) -> Finished:
    tokens = (len(choice.ids), len(output.token_ids))
    reason = output.finish_reason or "cancelled"
    return Finished(choice.index, reason, *tokens, output.stats, _places(output, told))


def _places(output: Output, first: int) -> list[Place]:
    return [Place(*each) for each in (output.logprobs or [])[first:]]


def log_softmax(row: np.ndarray) -> np.ndarray:
    """[V] f64"""
    shifted: np.ndarray = row.astype(np.float64) - row.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
