"""What TDA settings cost in tasks: choices among continuations and last words, scored by their
log-probability as the Language Model Evaluation Harness does, and answers that the model writes."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__, _native
from ._native import TDA, OptionError
from .engine import Engine
from .evaluate import DENSE, Run, append_row, begin_rows, describe_run, digest, runs_of
from .files import json_lines

KINDS = (  # what a line may hold
    ("query", "choices", "gold"),
    ("contexts", "continuation", "gold"),
    ("context", "continuation"),
    ("question", "answer"),
)
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
MOST_NEW_TOKENS = 256  # of an answer
Pair = tuple[list[int], int]  # token ids, and how many of them are the context's
Results = dict[str, dict[str, dict[str, Any]]]  # by setting, then by task


@dataclass(frozen=True)
class Item:
    """candidates: pairs of a context and what follows it, of which candidate `gold` is right. A
    single candidate is right if greedy decoding gives it, or, of an item that is `written`, a text
    whose last number is the candidate."""

    candidates: tuple[tuple[str, str], ...]
    gold: int
    written: bool = False


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
    elif "answer" in kind:
        numbers = _numbers(text("answer"))
        if not numbers:
            raise OptionError(f"{where}: answer: found {found['answer']!r}, expected a number")
        question = text("question")
        if not question.strip():
            raise OptionError(f"{where}: question: found {question!r}, expected a text")
        candidates = [(f"Question: {question}\nAnswer:", numbers[-1])]
    else:
        candidates = [(text("context"), text("continuation"))]
    for context, continuation in candidates:
        if not context.strip() or not continuation.strip():
            raise OptionError(f"{where}: found an empty text, expected a context and what follows")
    gold = found["gold"] if "gold" in kind else 0
    if type(gold) is not int or not 0 <= gold < len(candidates):
        raise OptionError(f"{where}: gold: found {gold!r}, expected 0 to {len(candidates) - 1}")
    return Item(tuple(candidates), gold, "answer" in kind)


def _numbers(text: str) -> list[str]:
    """As they are compared: without separators, and without zeros at the end of a fraction."""
    found = (match.replace(",", "") for match in NUMBER.findall(text))
    return [n.rstrip("0").rstrip(".") if "." in n else n for n in found]


def evaluate_tasks(
    engine: Engine,
    tasks: Mapping[str, Sequence[Item]],
    settings: Mapping[str, TDA],
    *,
    others: Mapping[str, Run] | None = None,
    output: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Lets dense, every setting and every other run do all items, one of each task in turn, so that
    more items of each are more rows behind the first. others, output: as in `evaluate`. Returns per
    setting and task what summary() says, and what decoding cost. Raises OptionError."""
    runs = runs_of(engine, settings, others or {})
    turns = range(max((len(some) for some in tasks.values()), default=0))
    items = [(task, some[i]) for i in turns for task, some in tasks.items() if i < len(some)]
    identities = [[task, item.candidates, item.gold, item.written] for task, item in items]
    header = {
        "tdaengine": __version__,
        "model": engine.fingerprint,
        "settings": {name: describe_run(*run) for name, run in runs.items()},
    }
    rows = [] if output is None else begin_rows(output, header, identities)
    names = list(runs)
    for i in range(len(rows), len(items)):
        turn = i % len(names)  # so that a machine that grows slower does not favour any
        done = {name: _do(*runs[name], items[i][1]) for name in names[turn:] + names[:turn]}
        rows.append({"text": digest(identities[i]), **{name: done[name] for name in names}})
        if output is not None:
            append_row(output, rows[-1])
        if progress:
            progress(i + 1, len(items))
    results: Results = {name: {} for name in runs}
    for task in tasks:
        pairs = [(row, item) for row, (of, item) in zip(rows, items, strict=True) if of == task]
        gold = [item.gold for _, item in pairs]
        dense = [row[DENSE]["chosen"] for row, _ in pairs]
        for name in runs:
            own = [row[name] for row, _ in pairs]
            results[name][task] = summary([row["chosen"] for row in own], dense, gold) | _cost(own)
    return results


def _do(engine: Engine, tda: TDA | None, item: Item) -> dict[str, Any]:
    """A row of one setting."""
    if item.written:
        chosen, stats = _answer(engine, tda, item)
    else:
        chosen, stats = choose(engine, tda, item)
    steps = [round(each.tokens_per_second * each.decode_seconds) for each in stats]
    return {
        "chosen": chosen,
        "steps": sum(steps),
        "seconds": sum(each.decode_seconds for each in stats),
        "bytes": sum(n * each.bytes_per_token for n, each in zip(steps, stats, strict=True)),
    }


def _cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of decoding; nothing of items whose choices are all one token long."""
    steps, seconds, read = (
        sum(row[name] for row in rows) for name in ("steps", "seconds", "bytes")
    )
    return {
        "bytes_per_token": read / steps if steps else None,
        "tokens_per_second": steps / seconds if seconds else None,
    }


def choose(
    engine: Engine, tda: TDA | None, item: Item
) -> tuple[list[int], list[_native.GenerationStats]]:
    """The candidate of the largest log-probability, and that of the largest per byte. Of a single
    candidate 0 if greedy decoding gives it, else -1."""
    pairs = [encode_pair(engine, *candidate) for candidate in item.candidates]
    scores = score_pairs(engine, pairs, tda)
    stats = [score.stats for score in scores]
    if len(scores) == 1:
        (ids, prompt), (score,) = pairs[0], scores
        return [0 if score.top_tokens.tolist() == ids[prompt:] else -1] * 2, stats
    sums = [float(score.log_probabilities.sum(dtype="f8")) for score in scores]
    lengths = [len(continuation.encode()) for _, continuation in item.candidates]
    per_byte = [total / length for total, length in zip(sums, lengths, strict=True)]
    return [sums.index(max(sums)), per_byte.index(max(per_byte))], stats


def score_pairs(
    engine: Engine, pairs: Sequence[Pair], tda: TDA | None
) -> list[_native.ScoreResult]:
    """Scores what follows each context. Pairs of the same context share its prefill, and so the
    masks that are made from it."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, prompt) in enumerate(pairs):
        by_context.setdefault(tuple(ids[:prompt]), []).append(i)
    scores: dict[int, _native.ScoreResult] = {}
    for context, which in by_context.items():
        behind = [pairs[i][0][len(context) :] for i in which]
        found = _native.Engine.score_each(engine, list(context), behind, tda)
        scores |= zip(which, found, strict=True)
    return [scores[i] for i in range(len(pairs))]


def _answer(
    engine: Engine, tda: TDA | None, item: Item
) -> tuple[list[int], list[_native.GenerationStats]]:
    """0 if the last number of what the model writes is the right one, else -1."""
    ((prompt, number),) = item.candidates
    ids = engine.tokenizer.encode(prompt)
    out = engine.generate(
        ids,
        max_new_tokens=max(1, min(MOST_NEW_TOKENS, engine.max_context - len(ids))),
        stop="\nQuestion:",
        tda=tda or False,
    )
    return [0 if _numbers(out.text or "")[-1:] == [number] else -1] * 2, [out.stats]


def encode_pair(engine: Engine, context: str, continuation: str) -> Pair:
    """Both with a space between. Of the ids as many are the context's as it has alone, without the
    spaces at its end, as in the harness."""
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


def mean_of_tasks(tasks: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, float]:
    """One setting over all tasks, each counting the same. Tasks are independent of each other, so
    the squares of their errors add up."""
    rows = [row[metric] for row in tasks.values()]
    return {name: statistics.mean(row[name] for row in rows) for name in ("accuracy", "change")} | {
        name: math.hypot(*(row[name] for row in rows)) / len(rows)
        for name in ("error", "change_error")
    }


def mean_cost(tasks: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """bytes_per_token or tokens_per_second, the mean over the tasks that have it."""
    values = [row[name] for row in tasks.values() if row[name] is not None]
    return statistics.mean(values) if values else None


def table(results: Results, metric: str = "by_length") -> str:
    """Accuracies as markdown, with the change from dense. metric: raw or by_length."""
    tasks = next(iter(results.values()))
    names = [f"{task} ({row['items']})" for task, row in tasks.items()]
    lines = [
        f"| setting | {' | '.join(names)} | mean | chosen as dense | MB per token |",
        "|---" * (len(names) + 4) + "|",
    ]
    for setting, rows in results.items():
        cells = []
        for figures in (*(row[metric] for row in rows.values()), mean_of_tasks(rows, metric)):
            cell = f"{figures['accuracy']:.1%} ± {figures['error']:.1%}"
            if setting != DENSE:
                cell += f" ({figures['change'] * 100:+.1f} ± {figures['change_error'] * 100:.1f})"
            cells.append(cell)
        same = statistics.mean(row["as_dense"] for row in rows.values())
        read = mean_cost(rows, "bytes_per_token")
        megabytes = "" if read is None else f"{read / 1e6:.1f}"
        lines.append(f"| {setting} | {' | '.join(cells)} | {same:.3f} | {megabytes} |")
    return "\n".join(lines)
