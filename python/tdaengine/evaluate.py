"""What a TDA setting costs in quality and gains in speed, against dense, on texts of one's own."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _native
from ._native import TDA, OptionError, Thresholds
from .engine import Engine

DENSE = "dense"


@dataclass
class Result:
    """One setting over all texts."""

    log_probability: float = 0.0  # sum over all scored tokens
    tokens: int = 0  # scored
    agreed: int = 0  # of them, where the most likely token is that of dense
    active: list[float] = field(default_factory=list)  # share of FFN neurons, per text
    coarse: list[float] = field(default_factory=list)  # of them, those at 4 bits
    ffn_bytes: list[float] = field(default_factory=list)  # relative to dense, per text
    speeds: list[float] = field(default_factory=list)  # tokens/s while decoding, per text
    speedups: list[float] = field(default_factory=list)  # relative to dense on the same text

    def summary(self) -> dict[str, Any]:
        return {
            "perplexity": math.exp(-self.log_probability / self.tokens),
            "top1_agreement": self.agreed / self.tokens,
            "active": statistics.mean(self.active),
            "coarse": statistics.mean(self.coarse),
            "ffn_bytes": statistics.mean(self.ffn_bytes),
            "tokens_per_second": statistics.median(self.speeds),
            "speedup": statistics.median(self.speedups),
        }


def evaluate(
    engine: Engine,
    texts: Sequence[str | Sequence[int]],
    settings: Mapping[str, TDA],
    *,
    prompt_tokens: int = 256,
    score_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores every text under dense and under every setting, one after the other, text by text.

    Of each text the first prompt_tokens are the prompt and the next score_tokens are scored
    teacher-forced through the decode path. Returns, per setting, Result.summary(); speeds are
    medians over the texts, a speed-up compares with dense on the same text, a moment earlier.
    Raises OptionError for a text that is too short.
    """
    if DENSE in settings:
        raise OptionError(f"settings: {DENSE!r} is always there, as what the others compare with")
    length = prompt_tokens + score_tokens
    encoded = []
    for i, text in enumerate(texts):
        ids = engine.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if len(ids) < length:
            raise OptionError(f"text {i}: found {len(ids)} tokens, expected {length} or more")
        encoded.append(ids[:length])
    results = {name: Result() for name in (DENSE, *settings)}
    for done, ids in enumerate(encoded, 1):
        scores = {
            name: _native.Engine.score(engine, ids, prompt_tokens, settings.get(name))
            for name in results
        }
        dense = scores[DENSE]
        for name, score in scores.items():
            result, stats = results[name], score.stats
            result.log_probability += float(score.log_probabilities.sum(dtype="float64"))
            result.tokens += score_tokens
            result.agreed += int((score.top_tokens == dense.top_tokens).sum())
            result.active.append(stats.ffn_active)
            result.coarse.append(stats.ffn_coarse)
            result.ffn_bytes.append(stats.ffn_bytes_fraction)
            result.speeds.append(stats.tokens_per_second)
            result.speedups.append(stats.tokens_per_second / dense.stats.tokens_per_second)
        if progress:
            progress(done, len(encoded))
    return {name: result.summary() for name, result in results.items()}


def parse_setting(text: str) -> TDA:
    """TDA from "name=value,name=value", as the option --tda takes it. A thresholds file brings its
    scope along. Raises OptionError or CheckpointError."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator:
            raise OptionError(f"--tda {text}: found {part!r}, expected NAME=VALUE")
        if name == "thresholds":
            values[name] = Thresholds.load(value)
            values.setdefault("scope", values[name].scope)
            continue
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return TDA(**values)
