"""How fast an engine is, beside how fast this machine can read memory at all."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ._native import TDA, GenerateOptions, GenerationStats, OptionError, measure_read_bandwidth
from .engine import Engine
from .evaluate import DENSE


class Run(NamedTuple):
    """One generation; of a single new token if only its prompt matters."""

    setting: str
    length: int  # of the prompt, in tokens
    new_tokens: int


def bench(
    engine: Engine,
    settings: Mapping[str, TDA] | None = None,
    *,
    prefill: Sequence[int] = (128, 512),
    context: Sequence[int] = (128, 1024),
    new_tokens: int = 64,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures everything once per round, the memory read roof first; round 0 warms up and counts
    for nothing.

    prefill: lengths of prompts, dense. context: lengths of the prompts after which new_tokens are
    generated, dense and under every setting; the first of them still comes out of the prompt.

    Returns a dict with
      read_roof         bytes/s
      prefill           per length: tokens, tokens_per_second
      decode            per length and setting: context (tokens), setting, bytes_per_token (weights
                        and KV cache), tokens_per_second, bytes_per_second, roof_share
      peak_rss_bytes    of this process up to the end of round 0; mapped files count
    and new_tokens and rounds. Speeds and shares are {"median", "min", "max"} over the rounds; a
    share compares with the roof of its round. Raises OptionError.
    """
    settings = settings or {}
    _check(engine, settings, prefill, context, new_tokens, rounds)
    runs = [Run(DENSE, length, 1) for length in prefill]
    runs += [Run(name, length, new_tokens) for length in context for name in (DENSE, *settings)]
    speeds: dict[Run, list[float]] = {run: [] for run in runs}
    total = (rounds + 1) * len(speeds)
    roofs, sizes, done = [], {}, 0
    for round_ in range(rounds + 1):
        if round_ == 1:
            peak_rss = _peak_rss()  # measuring the roof takes memory, too
        if round_ > 0:
            roofs.append(measure_read_bandwidth(engine.threads))
        for run in speeds:
            stats = _generate(engine, run, settings.get(run.setting))
            done += 1
            if progress:
                progress(done, total)
            if round_ == 0:
                sizes[run] = stats.bytes_per_token
            elif run.new_tokens > 1:
                speeds[run].append(stats.tokens_per_second)
            else:
                speeds[run].append(run.length / stats.prefill_seconds)

    def decode(run: Run) -> dict[str, Any]:
        bandwidths = [speed * sizes[run] for speed in speeds[run]]
        shares = [b / roof for b, roof in zip(bandwidths, roofs, strict=True)]
        return {
            "context": run.length,
            "setting": run.setting,
            "bytes_per_token": sizes[run],
            "tokens_per_second": _summary(speeds[run]),
            "bytes_per_second": _summary(bandwidths),
            "roof_share": _summary(shares),
        }

    return {
        "new_tokens": new_tokens,
        "rounds": rounds,
        "peak_rss_bytes": peak_rss,
        "read_roof": _summary(roofs),
        "prefill": [
            {"tokens": run.length, "tokens_per_second": _summary(speeds[run])}
            for run in speeds
            if run.new_tokens == 1
        ],
        "decode": [decode(run) for run in speeds if run.new_tokens > 1],
    }


def _check(
    engine: Engine,
    settings: Mapping[str, TDA],
    prefill: Sequence[int],
    context: Sequence[int],
    new_tokens: int,
    rounds: int,
) -> None:
    if DENSE in settings:
        raise OptionError(f"settings: {DENSE!r} is always there")
    if new_tokens < 2:
        raise OptionError(f"new_tokens: found {new_tokens}, expected 2 or more")
    if rounds < 1:
        raise OptionError(f"rounds: found {rounds}, expected 1 or more")
    for name, lengths, new in (("prefill", prefill, 1), ("context", context, new_tokens)):
        limit = engine.max_context - new
        for length in lengths:
            if not 1 <= length <= limit:
                raise OptionError(
                    f"{name}: found {length}, expected 1 to {limit} tokens "
                    f"(max_context {engine.max_context}, {new} new)"
                )


def _generate(engine: Engine, run: Run, tda: TDA | None) -> GenerationStats:
    prompt = [(37 * i + 100) % engine.config.vocab_size for i in range(run.length)]
    options = GenerateOptions(max_new_tokens=run.new_tokens, ignore_eos=True)
    generation = engine.start(prompt, options, tda)
    while generation.next() is not None:
        pass
    return generation.stats


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _peak_rss() -> int:
    """Bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(result: Mapping[str, Any]) -> str:
    """What `tdaengine bench` measured, as markdown. result: of bench(), with what the engine is."""

    def spread(summary: dict[str, float], form: str, unit: float = 1) -> str:
        low, middle, high = (format(summary[n] / unit, form) for n in ("min", "median", "max"))
        return f"{middle} ({low}..{high})"

    weights, peak = result["weight_bytes"] / 1e6, result["peak_rss_bytes"] / 1e6
    lines = [
        f"{result['path']}: weights {result['weights']}, kv {result['kv']}, {result['device']}, "
        f"{result['threads']} threads",
        f"loaded in {result['load_seconds']:.2f} s; weights {weights:.0f} MB, "
        f"peak of the process {peak:.0f} MB",
        f"read roof {spread(result['read_roof'], '.1f', 1e9)} GB/s; "
        f"median (min..max) of {result['rounds']} rounds",
        "",
        "| prefill of | tokens/s |",
        "|---|---|",
    ]
    for row in result["prefill"]:
        lines.append(f"| {row['tokens']} | {spread(row['tokens_per_second'], '.1f')} |")
    lines += [
        "",
        f"| decode {result['new_tokens']} after | setting | tokens/s | MB per token | GB/s "
        "| share of the roof |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["decode"]:
        lines.append(
            f"| {row['context']} | {row['setting']} | {spread(row['tokens_per_second'], '.1f')} "
            f"| {row['bytes_per_token'] / 1e6:.1f} "
            f"| {spread(row['bytes_per_second'], '.1f', 1e9)} "
            f"| {spread(row['roof_share'], '.0%')} |"
        )
    return "\n".join(lines)
