"""What TDA settings cost in quality and gain in speed, against dense, on texts of one's own."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__, _native
from ._native import TDA, OptionError
from .engine import Engine, Prompt
from .files import MAX_DATA, check_output, parse_json, read
from .options import RECOMMENDED

DENSE = "dense"

SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
ERRORS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
INPUTS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)

Run = tuple[Engine, TDA | None]
Rows = list[dict[str, Any]]  # one per text: its "text" (a digest) and the figures of every setting


def lines_of(settings: Mapping[str, TDA]) -> dict[str, dict[str, TDA]]:
    """Settings that differ in their last value alone make up a line of the picture."""
    lines: dict[str, dict[str, TDA]] = {}
    for name, tda in settings.items():
        lines.setdefault(name.rpartition("=")[0] or name, {})[name] = tda
    return {
        f"{names[0]} to {names[-1].rpartition('=')[2]}" if len(names) > 1 else names[0]: line
        for line in lines.values()
        for names in [list(line)]
    }


def frontier(engine: Engine) -> dict[str, dict[str, TDA]]:
    """Families of settings from harmless to harmful, by name, that fit this engine. Masks are
    compact where they can be."""
    if engine.weights == "graded":
        settings = {f"inputs {share:g}": TDA(inputs=share) for share in INPUTS}
        return {"by input": settings | {"all at 4 bits": TDA(inputs=0)}}
    compact = engine.device.startswith("cpu")
    return {
        "one threshold": {f"token {a:g}": TDA(scope="token", active=a) for a in SHARES},
        "sequence TDA": {f"sequence, error {e:g}": TDA(error=e, compact=compact) for e in ERRORS},
        "GRIFFIN": {
            f"GRIFFIN {a:g}": TDA(estimate="hidden", active=a, compact=compact) for a in SHARES
        },
        "CATS": {f"CATS {a:g}": TDA.cats(active=a) for a in SHARES},
    }


def evaluate(
    engine: Engine,
    texts: Sequence[Prompt],
    settings: Mapping[str, TDA],
    *,
    others: Mapping[str, Run] | None = None,
    prompt_tokens: int = 256,
    score_tokens: int = 256,
    output: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores every text under dense, every setting, and every other engine (of the same checkpoint
    in another format of weights) with a setting or dense, text by text. The order goes round from
    text to text, so that a machine that grows slower does not favour any.

    Of each text the first prompt_tokens are the prompt and the next score_tokens are scored
    teacher-forced through the decode path.
    output: a file that takes a line per text as it is done. If it exists, the texts in it are not
    scored again; it must come from the same model and settings.

    Returns per name what summary() says. Raises OptionError for a text that is too short, a name
    given twice, or an output file of something else.
    """
    runs = runs_of(engine, settings, others or {})
    if prompt_tokens < 1 or score_tokens < 2:
        raise OptionError(
            f"prompt_tokens {prompt_tokens}, score_tokens {score_tokens}: expected at least 1 and 2"
        )
    encoded = encode(engine, texts, prompt_tokens + score_tokens)
    header = {
        "tdaengine": __version__,
        "model": engine.fingerprint,
        "prompt_tokens": prompt_tokens,
        "score_tokens": score_tokens,
        "settings": {name: describe_run(*run) for name, run in runs.items()},
    }
    rows = [] if output is None else begin_rows(output, header, encoded)
    names = list(runs)
    for i in range(len(rows), len(encoded)):
        turn = i % len(names)
        scores = {
            name: _native.Engine.score(runs[name][0], encoded[i], prompt_tokens, runs[name][1])
            for name in names[turn:] + names[:turn]
        }
        row = {name: _figures(scores[name], scores[DENSE]) for name in names}
        rows.append({"text": digest(encoded[i]), **row})
        if output is not None:
            append_row(output, rows[-1])
        if progress:
            progress(i + 1, len(encoded))
    return {name: summary([row[name] for row in rows], score_tokens) for name in names}


def runs_of(
    engine: Engine, settings: Mapping[str, TDA], others: Mapping[str, Run]
) -> dict[str, Run]:
    """Dense, every setting and every other run, by name. Raises OptionError for a name given twice
    or an engine of another checkpoint."""
    runs: dict[str, Run] = {DENSE: (engine, None)}
    for name, run in (
        *((name, (engine, tda)) for name, tda in settings.items()),
        *others.items(),
    ):
        if name in runs:
            raise OptionError(f"settings: found {name!r} twice ({DENSE!r} is always there)")
        runs[name] = run
    for name, (other, _) in others.items():
        if other.fingerprint != engine.fingerprint:
            raise OptionError(f"{name}: found another checkpoint, expected that of the model")
    return runs


def encode(engine: Engine, texts: Sequence[Prompt], length: int) -> list[list[int]]:
    """The first `length` tokens of every text. Raises OptionError for one that has fewer."""
    encoded = []
    for i, text in enumerate(texts):
        ids = engine.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if len(ids) < length:
            raise OptionError(f"text {i}: found {len(ids)} tokens, expected {length} or more")
        encoded.append(ids[:length])
    if not encoded:
        raise OptionError("texts: found none, expected 1 or more")
    return encoded


def summary(rows: Rows, score_tokens: int) -> dict[str, Any]:
    """One setting over all texts. Means, but medians of speeds; speed-ups compare with dense on the
    same text, and come with their quartiles."""
    count = len(rows)
    mean = {
        name: statistics.mean(row[name] for row in rows)
        for name in ("log_probability", "loss", "agreed", "active", "coarse", "ffn_bytes")
    }
    losses = [row["loss"] / score_tokens for row in rows]
    ratios = [row["speedup"] for row in rows]
    quartiles = statistics.quantiles(ratios, method="inclusive") if count > 1 else ratios * 3
    by_layer = zip(*(row["active_by_layer"] for row in rows), strict=True)
    return {
        "texts": count,
        "tda": rows[0]["tda"],
        "perplexity": math.exp(-mean["log_probability"] / score_tokens),
        # Relative to dense, and the standard error of that over the texts.
        "perplexity_change": math.expm1(mean["loss"] / score_tokens),
        "perplexity_error": statistics.stdev(losses) / math.sqrt(count) if count > 1 else None,
        "top1_agreement": mean["agreed"] / score_tokens,
        "active": mean["active"],
        "coarse": mean["coarse"],
        "active_by_layer": [statistics.mean(layer) for layer in by_layer],
        "ffn_bytes": mean["ffn_bytes"],
        "bytes_per_token": round(statistics.mean(row["bytes_per_token"] for row in rows)),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
        "speedup": quartiles[1],
        "speedup_quartiles": [quartiles[0], quartiles[2]],
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results as markdown."""
    lines = [
        "| setting | exact + coarse | FFN bytes | MB per token | perplexity | as dense, top-1 "
        "| tokens/s | speed-up (quartiles) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        change = f"{row['perplexity_change']:+.1%}"
        if row["perplexity_error"] is not None:
            change += f" ± {row['perplexity_error']:.1%}"
        low, high = row["speedup_quartiles"]
        lines.append(
            f"| {name} | {row['active'] - row['coarse']:.2f} + {row['coarse']:.2f} "
            f"| {row['ffn_bytes']:.3f} | {row['bytes_per_token'] / 1e6:.1f} "
            f"| {row['perplexity']:.2f} ({change}) | {row['top1_agreement']:.3f} "
            f"| {row['tokens_per_second']:.1f} | {row['speedup']:.2f} ({low:.2f}..{high:.2f}) |"
        )
    if RECOMMENDED in results:
        lines.append(f"\n{RECOMMENDED}: {results[RECOMMENDED]['tda']}")
    return "\n".join(lines)


def _figures(score: _native.ScoreResult, dense: _native.ScoreResult) -> dict[str, Any]:
    """One setting on one text; sums over its tokens."""
    stats, log_probabilities = score.stats, score.log_probabilities.astype("float64")
    loss = dense.log_probabilities.astype("float64") - log_probabilities
    return {
        "log_probability": float(log_probabilities.sum()),
        "loss": float(loss.sum()),
        "agreed": int((score.top_tokens == dense.top_tokens).sum()),
        "tda": stats.tda,
        "active": stats.ffn_active,
        "coarse": stats.ffn_coarse,
        "active_by_layer": stats.ffn_active_by_layer,
        "ffn_bytes": stats.ffn_bytes_fraction,
        "bytes_per_token": stats.bytes_per_token,
        "tokens_per_second": stats.tokens_per_second,
        "speedup": stats.tokens_per_second / dense.stats.tokens_per_second,
    }


def digest(value: Any) -> str:
    """Stands for what is too long to be written to every row."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def describe_run(engine: Engine, tda: TDA | None) -> dict[str, Any]:
    """What must be the same for results to be put together."""
    options = {} if tda is None else {name: getattr(tda, name) for name in TDA.fields}
    if thresholds := options.get("thresholds"):
        numbers = ("values", "inputs", "losses", "prior")
        options["thresholds"] = digest([getattr(thresholds, name) for name in numbers])
    if predictor := options.get("predictor"):
        content = read(Path(predictor.file), "a predictor", 10 * MAX_DATA)
        options["predictor"] = hashlib.sha256(content).hexdigest()[:16]
    names = ("weights", "kv", "device", "threads")
    return {name: getattr(engine, name) for name in names} | {"tda": options or None}


def begin_rows(path: Path, header: dict[str, Any], texts: Sequence[Any]) -> Rows:
    """The rows that stand in the file, which is ready for more: a last line that was cut off while
    it was written is cut away. texts: what the rows are of, in order. Raises OptionError for a file
    of something else."""
    check_output(path)
    content = read(path, "results", MAX_DATA, OptionError) if path.exists() else b""
    if not content:
        append_row(path, header)
        return []
    whole = content[: content.rfind(b"\n") + 1]
    try:
        found, *rows = map(parse_json, whole.splitlines())
        for name, expected in json.loads(json.dumps(header)).items():
            _compare(path, name, found[name], expected)
        if len(rows) > len(texts):
            raise OptionError(f"{path}: found {len(rows)} texts, expected at most {len(texts)}")
        for i, row in enumerate(rows):
            _compare(path, f"text {i}", row["text"], digest(texts[i]))
    except (ValueError, TypeError, KeyError):
        raise OptionError(f"{path}: found something else than results of evaluate") from None
    if whole != content:
        os.truncate(path, len(whole))
    return rows


def append_row(path: Path, line: dict[str, Any]) -> None:
    """On disk when this returns."""
    with path.open("ab") as file:
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _compare(path: Path, name: str, found: Any, expected: Any) -> None:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in expected | found:
            _compare(path, f"{name}: {key}", found.get(key), expected.get(key))
    elif found != expected:
        raise OptionError(
            f"{path}: these are other results: {name}: found {found!r}, expected {expected!r}"
        )
