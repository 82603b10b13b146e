"""The commands of `tdaengine`: run_COMMAND does what cli.py has understood."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import plots
from ._native import TDA, GenerateOptions, OptionError
from .analyze import analyze, recommendation
from .analyze import table as overlaps
from .bench import bench
from .bench import table as speeds
from .contents import thresholds_file
from .engine import Engine
from .evaluate import DENSE, Run, evaluate, frontier, lines_of, table
from .files import MAX_DATA, check_output, read, read_json_object, read_texts
from .grammar import Grammar
from .hub import find
from .info import describe, fields_of, file_sizes, info
from .new_folder import verify
from .options import parse_tda
from .prefix_cache import size
from .stream import Output, Stream
from .tasks import evaluate_tasks, read_items
from .tasks import table as accuracies
from .terminal import for_bars


def open_engine(args: argparse.Namespace, **changed: Any) -> Engine:
    """With the setting of --tda where the command has a single one."""
    names = ("device", "weights", "kv", "threads", "max_context")
    options = {name: getattr(args, name) for name in names}
    if "kept_prefixes" in args:
        options["prefix_cache"] = size(args.kept_prefixes, "--prefix-cache", least=0)
    options |= changed
    given = getattr(args, "tda", None)
    tda = given if isinstance(given, TDA) else None  # evaluate and bench have a list
    bar = {"desc": "packing", "unit": "B", "unit_scale": True, "leave": False}
    with progress_bar(**bar, disable=True if args.json else None) as progress:
        return Engine(args.model, tda=tda, progress=progress, **options)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Only what was given."""
    given = {name: value for name, value in vars(args).items() if name in GenerateOptions.fields}
    return given | {"stop": args.stop}


def read_prompt(text: str | None, file: str | None, name: str) -> str:
    """`text`, or if it is "-" what standard input holds, or what `file` holds; of a file's text
    without its last newline."""
    if (text is None) == (file is None):
        found = "none" if text is None else f"{text!r} and --file"
        raise OptionError(f"{name}: found {found}, expected a text, - or --file FILE")
    if text is not None and text != "-":
        return text
    if file is None:
        content = sys.stdin.buffer.read()
    else:
        content = read(Path(file), "a text", MAX_DATA, OptionError)
    try:
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise OptionError(f"{file or 'standard input'}: {error}") from error


def run_generate(args: argparse.Namespace) -> None:
    prompt = read_prompt(args.prompt, args.file, "prompt")
    if "logprobs" in args and not args.json:
        raise OptionError("--logprobs: needs --json")
    schema = None if args.json_schema is None else read_json_object(Path(args.json_schema))
    grammar = None if schema is None else Grammar.json_schema(schema)
    stream = open_engine(args).stream(prompt, grammar=grammar, **sampling(args))
    answer(stream, args.json)


def answer(stream: Stream, as_json: bool = False) -> None:
    """The text as it comes, then a line of figures on stderr."""
    if as_json:
        for _ in stream:
            pass
        print_json(_output_fields(stream.output))
        return
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    print(_figures(stream.output), file=sys.stderr)


def _figures(output: Output) -> str:
    stats = output.stats
    text = (
        f"{stats.prompt_tokens} prompt tokens, {stats.new_tokens} new, "
        f"{stats.tokens_per_second:.1f} tokens/s, {stats.bytes_per_token / 1e6:.1f} MB per token"
    )
    if stats.tda != "dense":
        text += f"\nTDA: {stats.tda}"
    if stats.ffn_bytes_fraction != 1:
        text += (
            f"; used {stats.ffn_active:.0%} of FFN neurons, read {stats.ffn_bytes_fraction:.0%} "
            "of FFN bytes"
        )
    if output.finish_reason == "length":
        text += (
            f"\ncut at {stats.new_tokens} tokens; --max-new-tokens and --max-context set how many"
        )
    return text


def run_convert(args: argparse.Namespace) -> None:
    from .convert import convert

    texts = None if args.data is None else read_texts(Path(args.data))
    with progress_bar(unit="B", unit_scale=True, disable=args.json) as progress:
        convert(
            args.source,
            args.destination,
            dtype=args.dtype,
            weights=args.weights,
            progress=progress,
            texts=texts,
        )
    files = file_sizes(Path(args.destination))
    if args.json:
        print_json({"path": args.destination, "files": files})
    else:
        print(f"{args.destination}: {sum(files.values()):,} bytes in {len(files)} files")


def run_calibrate(args: argparse.Namespace) -> None:
    if args.output is not None:
        check_output(args.output)
    texts = None if args.data is None else read_texts(Path(args.data))
    engine = open_engine(args)
    output = args.output or thresholds_file(engine.path)
    check_output(output)
    ids = None if texts is None else encoded_texts(args, engine, texts, 1)
    with progress_bar(unit="step", disable=args.json) as progress:
        thresholds = engine.calibrate(
            ids, error=args.error, scope=args.scope, bytes=args.bytes, progress=progress
        )
    thresholds.save(output)
    if args.json:
        fields = fields_of(thresholds)
        del fields["prior"]  # a number for every neuron, which the file has
        print_json(fields)
        return
    own = "own " if thresholds.source == "self-generated" else ""
    on = f"on {thresholds.tokens} tokens of {thresholds.texts} {own}texts"
    if thresholds.inputs:
        print(f"{output}: perplexity {on}, relative to dense")
        columns = (thresholds.inputs, thresholds.losses, thresholds.loss_errors)
        for share, loss, error in zip(*columns, strict=True):
            print(f"  inputs {share:<4g}  {loss:+7.1%} ± {error:.1%}")
    else:
        reached = sum(thresholds.reached) / len(thresholds.reached)
        what = "bytes" if thresholds.bytes else "error"
        print(
            f"{output}: thresholds of {len(thresholds.values)} layers, {what} {reached:.3f} "
            f"reached (target {getattr(thresholds, what)}) {on}"
        )


def run_evaluate(args: argparse.Namespace) -> None:
    if args.tasks:
        run_tasks(args)
        return
    texts = _texts(args)
    engine, points, settings, others = _open_runs(args)
    ids = encoded_texts(args, engine, texts, args.prompt_tokens + args.score_tokens)
    lengths = {name: getattr(args, name) for name in ("prompt_tokens", "score_tokens")}
    with progress_bar(unit="text", disable=args.json) as progress:
        results = evaluate(
            engine,
            ids,
            settings,
            others=others,
            output=args.output,
            progress=progress,
            **lengths,
        )
    if args.plot:
        _tell_flat(plots.evaluation(results, points, engine, args.plot))
    if args.json:
        print_json(results)
    else:
        print(table(results))


def run_tasks(args: argparse.Namespace) -> None:
    """evaluate --tasks"""
    if args.plot:
        plots.check(args.plot)
    if (args.prompt_tokens, args.score_tokens) != (256, 256):
        raise OptionError("--prompt-tokens, --score-tokens: expected with --data only")
    _check_count(args)
    names = [Path(path).stem for path in args.tasks]
    _check_unique("--tasks", names)
    tasks = {Path(path).stem: read_items(Path(path), args.texts) for path in args.tasks}
    engine, points, settings, others = _open_runs(args)
    with progress_bar(unit="item", disable=args.json) as progress:
        results = evaluate_tasks(
            engine, tasks, settings, others=others, output=args.output, progress=progress
        )
    if args.plot:
        plots.tasks(results, points, engine, args.plot)
    if args.json:
        print_json(results)
    else:
        print(accuracies(results))


def _open_runs(
    args: argparse.Namespace,
) -> tuple[Engine, dict[str, list[str]], dict[str, TDA], dict[str, Run]]:
    """What evaluate compares: names by family, settings, runs of engines with other weights."""
    families = lines_of(_settings(args))
    _check_unique("--also", args.also)
    engine = open_engine(args)
    engines, others = {}, {}
    for also in args.also:
        weights, comma, setting = also.partition(",")
        tda = parse_tda(setting, f"--also {also}") if comma else None
        if weights not in engines:
            engines[weights] = open_engine(args, weights=weights)
        others[f"{weights} {setting or DENSE}"] = engines[weights], tda
    if args.frontier:
        families |= frontier(engine)
    settings = {name: tda for family in families.values() for name, tda in family.items()}
    points = {name: list(family) for name, family in families.items()}
    return engine, points | {name: [name] for name in others}, settings, others


def run_analyze(args: argparse.Namespace) -> None:
    texts = _texts(args)
    engine = open_engine(args)
    ids = encoded_texts(args, engine, texts, args.prompt_tokens + args.score_tokens)
    names = ("active", "prompt_tokens", "score_tokens")
    with progress_bar(unit="text", disable=args.json) as progress:
        figures = analyze(
            engine, ids, progress=progress, **{name: getattr(args, name) for name in names}
        )
    figures["recommendation"] = recommendation(
        figures, args.model, engine.weights, engine.device.startswith("cpu")
    )
    if args.plot:
        _tell_flat(plots.analysis(figures, engine, args.score_tokens, args.plot))
    if args.json:
        print_json(figures)
    else:
        print(f"{overlaps(figures)}\n\n{figures['recommendation']}")


def _tell_flat(flat: plots.Lines) -> None:
    if flat:
        print(plots.table(flat), file=sys.stderr)


def _settings(args: argparse.Namespace) -> dict[str, TDA]:
    _check_unique("--tda", args.tda)
    settings = {}
    for text in args.tda:
        tda = parse_tda(text)
        if tda is None:
            raise OptionError("--tda off: expected a setting, dense is always measured")
        settings[text] = tda
    return settings


def _check_unique(option: str, given: list[str]) -> None:
    for value in given:
        if given.count(value) > 1:
            raise OptionError(f"{option}: found {value!r} twice")


def _check_count(args: argparse.Namespace) -> None:
    if args.texts is not None and args.texts < 1:
        raise OptionError(f"--texts {args.texts}: expected 1 or more")


def _texts(args: argparse.Namespace) -> list[str]:
    """Of --data."""
    _check_count(args)
    if args.plot:
        plots.check(args.plot)
    return read_texts(Path(args.data))


def encoded_texts(
    args: argparse.Namespace, engine: Engine, texts: list[str], length: int
) -> list[list[int]]:
    """Token ids of the first --texts texts that have `length` tokens or more."""
    encoded = [engine.tokenizer.encode(text) for text in texts]
    long = [ids for ids in encoded if len(ids) >= length]
    if not long:
        raise OptionError(
            f"{args.data}: found none of {len(encoded)} texts with {length} tokens or more"
        )
    if skipped := len(encoded) - len(long):
        print(
            f"{args.data}: {skipped} of {len(encoded)} texts skipped, "
            f"they have fewer than {length} tokens",
            file=sys.stderr,
        )
    return long[: getattr(args, "texts", None)]


def run_bench(args: argparse.Namespace) -> None:
    lengths = {name: _lengths(args, name) for name in ("prefill", "context")}
    settings = _settings(args)
    start = time.perf_counter()
    engine = open_engine(args)
    load_seconds = time.perf_counter() - start
    with progress_bar(unit="run", disable=args.json) as progress:
        measured = bench(
            engine,
            settings,
            **lengths,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            progress=progress,
        )
    names = ("device", "threads", "weights", "kv", "weight_bytes")
    result = {name: getattr(engine, name) for name in names}
    result |= {"path": str(engine.path), "load_seconds": load_seconds, **measured}
    if args.json:
        print_json(result)
    else:
        print(speeds(result))


def _lengths(args: argparse.Namespace, name: str) -> list[int]:
    """The numbers in "128,512"."""
    text = getattr(args, name)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(
            f"--{name}: found {text!r}, expected numbers of tokens, as 128,512"
        ) from None


def run_info(args: argparse.Namespace) -> None:
    if args.verify:
        count = verify(find(args.model))
    values = info(open_engine(args))
    if args.verify:
        values["verified_files"] = count
    if args.json:
        print_json(values)
    else:
        print(describe(values))
        if args.verify:
            print(f"\n{count} files are as checksums.sha256 says")


def _output_fields(output: Output) -> dict[str, Any]:
    fields = {**vars(output), "stats": fields_of(output.stats)}
    logprobs = fields.pop("logprobs")
    return fields if logprobs is None else {**fields, "logprobs": [e._asdict() for e in logprobs]}


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))  # ASCII alone, which no encoding or terminal changes


@contextlib.contextmanager
def progress_bar(**settings: Any) -> Iterator[Callable[[int, int], None]]:
    """A function progress(done, total), whose first call makes the bar."""
    with contextlib.ExitStack() as stack:
        bar = None

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(tqdm(total=total, file=for_bars(), **settings))
            elif bar.total != total:  # the next part of the work
                bar.reset(total)
            bar.update(done - bar.n)

        yield progress
