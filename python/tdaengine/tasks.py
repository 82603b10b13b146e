"""What TDA settings cost in tasks: choices among continuations and last words, each scored by its
log-probability, as the Language Model Evaluation Harness does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__, _native
from ._native import TDA, OptionError
from .engine import Engine
from .evaluate import DENSE, append_row, begin_rows, describe_run, digest, runs_of
from .files import json_lines

KINDS = (  # what a line may hold
    ("query", "choices", "gold"),
    ("contexts", "continuation", "gold"),
    ("context", "continuation"),
)
Results = dict[str, dict[str, dict[str, Any]]]  # by setting, then by task


@dataclass(frozen=True)
class Item:
    """candidates: pairs of a context and what follows it, of which candidate `gold` is right. A
    single candidate is right if greedy decoding gives it."""

    candidates: tuple[tuple[str, str], ...]
    gold: int


def read_items(path: Path, most: int | None = None) -> list[Item]:
    """The first `most` items of a JSONL file. Raises OptionError for one that is none."""
    items: list[Item] = []
    for where, found in json_lines(path):
        if most is not None and len(items) == most:
            break
        items.append(_parse(found, where))
    if not items:
        raise OptionError(f"{path}: found no items")
    return items


def _parse(found: Any, where: str) -> Item:
    fields = tuple(found) if isinstance(found, dict) else ()
    kind = next((kind for kind in KINDS if set(kind) <= set(fields)), None)
    if kind is None:
        expected = "; or ".join(", ".join(kind) for kind in KINDS)
        raise OptionError(f"{where}: found {', '.join(fields) or 'none'}, expected {expected}")

    def texts(name: str) -> list[str]:
        value = found[name]
        if not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
            raise OptionError(f"{where}: {name}: found {value!r}, expected a list of texts")
        return value

    def text(name: str) -> str:
        if not isinstance(found[name], str):
            raise OptionError(f"{where}: {name}: found {found[name]!r}, expected a text")
        return str(found[name])

    if "choices" in kind:
        query = text("query")
        candidates = [(query, choice) for choice in texts("choices")]
    elif "contexts" in kind:
        continuation = text("continuation")
        candidates = [(context, continuation) for context in texts("contexts")]
    else:
        candidates = [(text("context"), text("continuation"))]
    for context, continuation in candidates:
        if not context.strip() or not continuation.strip():
            raise OptionError(f"{where}: found an empty text, expected a context and what follows")
    gold = found["gold"] if "gold" in kind else 0
    if type(gold) is not int or not 0 <= gold < len(candidates):
        raise OptionError(f"{where}: gold: found {gold!r}, expected 0 to {len(candidates) - 1}")
    return Item(tuple(candidates), gold)


def evaluate_tasks(
    engine: Engine,
    tasks: Mapping[str, Sequence[Item]],
    settings: Mapping[str, TDA],
    *,
    others: Mapping[str, Engine] | None = None,
    output: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Lets dense, every setting and, dense, every other engine (of the same checkpoint in another
    format of weights) do all items. output: as in `evaluate`. Returns per setting and task what
    summary() says. Raises OptionError."""
    runs = runs_of(engine, settings, others or {})
    items = [(task, item) for task, some in tasks.items() for item in some]
    identities = [[task, item.candidates, item.gold] for task, item in items]
    header = {
        "tdaengine": __version__,
        "model": engine.fingerprint,
        "settings": {name: describe_run(*run) for name, run in runs.items()},
    }
    rows = [] if output is None else begin_rows(output, header, identities)
    for i in range(len(rows), len(items)):
        choices = {name: choose(*run, items[i][1]) for name, run in runs.items()}
        rows.append({"text": digest(identities[i]), **choices})
        if output is not None:
            append_row(output, rows[-1])
        if progress:
            progress(i + 1, len(items))
    results: Results = {name: {} for name in runs}
    for task in tasks:
        pairs = [(row, item) for row, (of, item) in zip(rows, items, strict=True) if of == task]
        gold = [item.gold for _, item in pairs]
        dense = [row[DENSE] for row, _ in pairs]
        for name in runs:
            results[name][task] = summary([row[name] for row, _ in pairs], dense, gold)
    return results


def choose(engine: Engine, tda: TDA | None, item: Item) -> list[int]:
    """The candidate of the largest log-probability, and that of the largest per byte. Of a single
    candidate 0 if greedy decoding gives it, else -1."""
    sums, per_byte, greedy = [], [], False
    for context, continuation in item.candidates:
        ids, prompt = encode_pair(engine, context, continuation)
        score = _native.Engine.score(engine, ids, prompt, tda)
        sums.append(float(score.log_probabilities.sum(dtype="f8")))
        per_byte.append(sums[-1] / len(continuation.encode()))
        greedy = score.top_tokens.tolist() == ids[prompt:]
    if len(sums) == 1:
        return [0 if greedy else -1] * 2
    return [sums.index(max(sums)), per_byte.index(max(per_byte))]


def encode_pair(engine: Engine, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both with a space between, and how many of them are the context's: as many as
    the context has alone, without the spaces at its end. What the two share with other items counts
    each time, as in the harness."""
    bare = context.rstrip()
    gap = context[len(bare) :] or " "
    whole = engine.tokenizer.encode(bare + gap + continuation)
    return whole, min(len(engine.tokenizer.encode(bare)), len(whole) - 1)


def summary(
    chosen: Sequence[Sequence[int]], dense: Sequence[Sequence[int]], gold: Sequence[int]
) -> dict[str, Any]:
    """One setting in one task. Errors are standard errors; those of changes are of the differences
    from dense, item by item."""

    def accuracy(which: int) -> dict[str, float]:
        hits = [choice[which] == right for choice, right in zip(chosen, gold, strict=True)]
        before = [choice[which] == right for choice, right in zip(dense, gold, strict=True)]
        changes = [hit - was for hit, was in zip(hits, before, strict=True)]
        return {
            "accuracy": statistics.mean(hits),
            "error": _error(hits),
            "change": statistics.mean(changes),
            "change_error": _error(changes),
        }

    same = [choice[0] == was[0] for choice, was in zip(chosen, dense, strict=True)]
    return {
        "items": len(gold),
        "raw": accuracy(0),
        "by_length": accuracy(1),
        "as_dense": statistics.mean(same),
    }


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def table(results: Results, metric: str = "by_length") -> str:
    """Accuracies as markdown, with the change from dense. metric: raw or by_length."""
    tasks = next(iter(results.values()))
    names = [f"{task} ({row['items']})" for task, row in tasks.items()]
    lines = [
        f"| setting | {' | '.join(names)} | chosen as dense |",
        "|---" * (len(names) + 2) + "|",
    ]
    for setting, rows in results.items():
        cells = []
        for row in rows.values():
            figures = row[metric]
            cell = f"{figures['accuracy']:.1%} ± {figures['error']:.1%}"
            if setting != DENSE:
                cell += f" ({figures['change'] * 100:+.1f} ± {figures['change_error'] * 100:.1f})"
            cells.append(cell)
        same = statistics.mean(row["as_dense"] for row in rows.values())
        lines.append(f"| {setting} | {' | '.join(cells)} | {same:.3f} |")
    return "\n".join(lines)
