"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from .work import Finished

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    def __init__(self, gauges: Iterable[tuple[str, str, Callable[[], float]]]) -> None:
        """gauges: name, text and function of what is looked up when asked for."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "tdaengine_requests",
            "Requests by path and status; 499: the client went away.",
            ("path", "status"),
            registry=self._registry,
        )
        self.seconds = self._histogram("request_seconds", "From a request to its answer's end.")
        self.first = self._histogram("first_piece_seconds", "From a request to its first piece.")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_tokens", "Of them, those kept from earlier prompts.")
        self._generated = self._counter("generated_tokens", "Tokens generated.")
        self._decode = self._counter("decode_seconds", "Time spent on tokens but the first.")
        self._bytes = self._counter("read_bytes", "Weight and KV bytes that decoding read.")
        self._decoded = self._counter("decoded_tokens", "Tokens but the first of each answer.")
        self._active = self._counter(
            "active_tokens",
            "Sum over decoded tokens of the share of FFN neurons used; by decoded_tokens: the mean "
            "share.",
        )
        self._batched = self._counter(
            "batched_tokens",
            "Sum over decoded tokens of the sequences in the same step; by decoded_tokens: the "
            "mean batch.",
        )
        for name, text, function in gauges:
            gauge = Gauge(f"tdaengine_{name}", text, registry=self._registry)
            gauge.set_function(function)

    def count(self, finished: Finished) -> None:
        """One answer that came to its end."""
        self._prompt.inc(finished.prompt_tokens)
        self._cached.inc(finished.cached_tokens)
        self._generated.inc(finished.new_tokens)
        if finished.stats is not None:
            stats, decoded = finished.stats, max(0, finished.new_tokens - 1)
            self._decode.inc(stats.decode_seconds)
            self._bytes.inc(stats.bytes_per_token * decoded)
            self._decoded.inc(decoded)
            self._active.inc(stats.ffn_active * decoded)
            self._batched.inc(stats.mean_batch * decoded)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"tdaengine_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"tdaengine_{name}", text, buckets=SECONDS, registry=self._registry)
