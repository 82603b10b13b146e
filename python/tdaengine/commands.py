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
from ._native import (
    TDA,
    Error,
    GenerateOptions,
    GenerationStats,
    OptionError,
    RopeConfig,
    Thresholds,
)
from .analyze import analyze
from .analyze import table as overlaps
from .bench import bench
from .engine import Engine, Output, Stream
from .evaluate import evaluate, frontier, parse_setting, table
from .files import MAX_DATA, MAX_LINE, check_output, open_regular, parse_json
from .terminal import for_bars

# Of TDA, as --tda-...; refresh is --refresh.
TDA_OPTIONS = ("error", "active", "thresholds", "scope", "coarse", "compact", "head")

OVERLAP_TEXTS = 8  # of those evaluated, for the picture of overlaps


def _engine(args: argparse.Namespace, **changed: Any) -> Engine:
    names = ("device", "weights", "kv", "threads", "max_context")
    options = {name: getattr(args, name) for name in names} | changed
    bar = {"desc": "packing", "unit": "B", "unit_scale": True, "leave": False}
    with _progress_bar(**bar, disable=True if args.json else None) as progress:
        return Engine(args.model, tda=_tda(args), progress=progress, **options)


def _tda(args: argparse.Namespace) -> TDA | None:
    names = {name: f"tda_{name}" for name in TDA_OPTIONS}
    names["refresh"] = "refresh"
    values = {name: getattr(args, option, None) for name, option in names.items()}
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return None
    if given.keys().isdisjoint(("error", "active", "thresholds")):
        option = names[next(iter(given))].replace("_", "-")
        raise OptionError(f"--{option}: needs --tda-error, --tda-active or --tda-thresholds")
    if "thresholds" in given:
        given["thresholds"] = Thresholds.load(given["thresholds"])
        given.setdefault("scope", given["thresholds"].scope)
    return TDA(**given)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: value for name, value in vars(args).items() if name in GenerateOptions.fields}
    return given | {"stop": args.stop}


def run_generate(args: argparse.Namespace) -> None:
    _answer(_engine(args).stream(args.prompt, **_sampling(args)), args.json)


def run_chat(args: argparse.Namespace) -> None:
    if args.json and args.message is None:
        raise OptionError("--json: needs --message")
    engine = _engine(args)
    options = _sampling(args)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.message is not None:
        messages = [*system, {"role": "user", "content": args.message}]
        _answer(engine.stream(engine.chat_prompt(messages), **options), args.json)
        return
    messages = list(system)
    for line in _lines():
        if line == "/reset":
            messages = list(system)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            stream = engine.stream(engine.chat_prompt(asked), **options)
            with contextlib.suppress(KeyboardInterrupt):  # stops the answer, not the chat
                _answer(stream)
        except Error as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": stream.output.text}]


def _lines() -> Iterator[str]:
    """What the user types, until /exit or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() editing and history
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _answer(stream: Stream, as_json: bool = False) -> None:
    """The text as it comes, then a line of figures on stderr."""
    if as_json:
        for _ in stream:
            pass
        _print_json(_output_fields(stream.output))
        return
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    print(_figures(stream.output.stats), file=sys.stderr)


def _figures(stats: GenerationStats) -> str:
    return (
        f"{stats.prompt_tokens} prompt tokens, {stats.new_tokens} new, "
        f"{stats.tokens_per_second:.1f} tokens/s, {stats.ffn_active:.0%} of FFN neurons, "
        f"{stats.ffn_bytes_fraction:.0%} of FFN bytes"
    )


def run_convert(args: argparse.Namespace) -> None:
    from .convert import convert

    with _progress_bar(unit="B", unit_scale=True, disable=args.json) as progress:
        convert(
            args.source,
            args.destination,
            dtype=args.dtype,
            weights=args.weights,
            progress=progress,
        )
    files = _files(Path(args.destination))
    if args.json:
        _print_json({"path": args.destination, "files": files})
    else:
        print(f"{args.destination}: {sum(files.values()):,} bytes in {len(files)} files")


def run_calibrate(args: argparse.Namespace) -> None:
    check_output(args.output)
    texts = None if args.data is None else _read_texts(Path(args.data))
    engine = _engine(args)
    with _progress_bar(unit="step", disable=args.json) as progress:
        thresholds = engine.calibrate(
            texts, error=args.error, scope=args.scope, bytes=args.bytes, progress=progress
        )
    thresholds.save(args.output)
    if args.json:
        _print_json(_fields(thresholds))
    else:
        reached = sum(thresholds.reached) / len(thresholds.reached)
        what = "bytes" if thresholds.bytes else "error"
        own = "own " if thresholds.source == "self-generated" else ""
        print(
            f"{args.output}: thresholds of {len(thresholds.values)} layers, {what} {reached:.3f} "
            f"reached (target {getattr(thresholds, what)}) on {thresholds.tokens} tokens of "
            f"{thresholds.texts} {own}texts"
        )


def run_evaluate(args: argparse.Namespace) -> None:
    texts = _texts(args)
    families = {name: {name: tda} for name, tda in _settings(args).items()}
    _check_unique("--also", args.also)
    engine = _engine(args)
    others = {f"{also} dense": _engine(args, weights=also) for also in args.also}
    if args.frontier:
        families |= frontier(engine)
    lengths = {name: getattr(args, name) for name in ("prompt_tokens", "score_tokens")}
    with _progress_bar(unit="text", disable=args.json) as progress:
        results = evaluate(
            engine,
            texts,
            {name: tda for family in families.values() for name, tda in family.items()},
            others=others,
            output=args.output,
            progress=progress,
            **lengths,
        )
    if args.plot:
        points = {name: list(family) for name, family in families.items()}
        points |= {name: [name] for name in others}
        figures = analyze(engine, texts[:OVERLAP_TEXTS], **lengths)
        plots.evaluation(results, points, figures, args.score_tokens, args.plot)
    if args.json:
        _print_json(results)
    else:
        print(table(results))


def run_analyze(args: argparse.Namespace) -> None:
    texts = _texts(args)
    names = ("active", "prompt_tokens", "score_tokens")
    with _progress_bar(unit="text", disable=args.json) as progress:
        figures = analyze(
            _engine(args), texts, progress=progress, **{name: getattr(args, name) for name in names}
        )
    if args.plot:
        plots.analysis(figures, args.score_tokens, args.plot)
    if args.json:
        _print_json(figures)
    else:
        print(overlaps(figures))


def _settings(args: argparse.Namespace) -> dict[str, TDA]:
    _check_unique("--tda", args.tda)
    return {setting: parse_setting(setting) for setting in args.tda}


def _check_unique(option: str, given: list[str]) -> None:
    for value in given:
        if given.count(value) > 1:
            raise OptionError(f"{option}: found {value!r} twice")


def _texts(args: argparse.Namespace) -> list[str]:
    """Of --data, the first --texts."""
    if args.texts is not None and args.texts < 1:
        raise OptionError(f"--texts {args.texts}: expected 1 or more")
    if args.plot:
        plots.check(args.plot)
    return _read_texts(Path(args.data), args.texts)


def run_bench(args: argparse.Namespace) -> None:
    lengths = {name: _lengths(args, name) for name in ("prefill", "context")}
    settings = _settings(args)
    start = time.perf_counter()
    engine = _engine(args)
    load_seconds = time.perf_counter() - start
    with _progress_bar(unit="run", disable=args.json) as progress:
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
        _print_json(result)
    else:
        _print_bench(result)


def _print_bench(result: dict[str, Any]) -> None:
    def spread(summary: dict[str, float], form: str, unit: float = 1) -> str:
        low, middle, high = (format(summary[n] / unit, form) for n in ("min", "median", "max"))
        return f"{middle} ({low}..{high})"

    weights, peak = result["weight_bytes"] / 1e6, result["peak_rss_bytes"] / 1e6
    print(
        f"{result['path']}: weights {result['weights']}, kv {result['kv']}, {result['device']}, "
        f"{result['threads']} threads\n"
        f"loaded in {result['load_seconds']:.2f} s; weights {weights:.0f} MB, "
        f"peak of the process {peak:.0f} MB\n"
        f"read roof {spread(result['read_roof'], '.1f', 1e9)} GB/s; "
        f"median (min..max) of {result['rounds']} rounds\n"
    )
    print("| prefill of | tokens/s |")
    print("|---|---|")
    for row in result["prefill"]:
        print(f"| {row['tokens']} | {spread(row['tokens_per_second'], '.1f')} |")
    print(
        f"\n| decode {result['new_tokens']} after | setting | tokens/s | MB per token | GB/s ",
        end="",
    )
    print("| share of the roof |")
    print("|---|---|---|---|---|---|")
    for row in result["decode"]:
        print(
            f"| {row['context']} | {row['setting']} | {spread(row['tokens_per_second'], '.1f')} "
            f"| {row['bytes_per_token'] / 1e6:.1f} "
            f"| {spread(row['bytes_per_second'], '.1f', 1e9)} "
            f"| {spread(row['roof_share'], '.0%')} |"
        )


def _lengths(args: argparse.Namespace, name: str) -> list[int]:
    """The numbers in "128,512"."""
    text = getattr(args, name)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(
            f"--{name}: found {text!r}, expected numbers of tokens, as 128,512"
        ) from None


def _read_texts(path: Path, most: int | None = None) -> list[str]:
    """The field "text" of every line, `most` of them; blank lines count for nothing."""
    texts: list[str] = []
    for number, line in enumerate(_lines_of(path), 1):
        if len(texts) == most:
            break
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise OptionError(f"{path}, line {number}: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise OptionError(f'{path}, line {number}: expected {{"text": "..."}}')
        texts.append(entry["text"])
    if not texts:
        raise OptionError(f"{path}: found no texts")
    return texts


def _lines_of(path: Path) -> Iterator[bytes]:
    with open_regular(path, "a JSONL file", OptionError) as file:
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise OptionError(f"{path}: found a line of more than {MAX_LINE} bytes")
            if file.tell() > MAX_DATA:
                raise OptionError(f"{path}: found more than {MAX_DATA} bytes of texts")
            yield line


def run_info(args: argparse.Namespace) -> None:
    engine = _engine(args)
    files = _files(engine.path)
    info = {
        "path": str(engine.path),
        "fingerprint": engine.fingerprint,
        "parameters": engine.parameters,
        "weights": engine.weights,
        "weight_bytes": engine.weight_bytes,
        "kv": engine.kv,
        "max_context": engine.max_context,
        "device": engine.device,
        "threads": engine.threads,
        "config": _fields(engine.config),
        "files": files,
    }
    if args.json:
        _print_json(info)
    else:
        _print_indented(info)


def _files(folder: Path) -> dict[str, int]:
    """Name -> bytes."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: path.stat().st_size for path in paths}


def _fields(value: Any) -> dict[str, Any]:
    """The properties of an object of the native module, and of those inside it."""
    names = [name for name, kind in vars(type(value)).items() if isinstance(kind, property)]
    fields = {name: getattr(value, name) for name in names}
    return {name: _fields(v) if isinstance(v, RopeConfig) else v for name, v in fields.items()}


def _output_fields(output: Output) -> dict[str, Any]:
    return {**vars(output), "stats": _fields(output.stats)}


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))  # ASCII alone, which no encoding or terminal changes


def _print_indented(values: dict[str, Any], indent: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print_indented(value, indent + "  ")
        else:
            shown = f"{value:,}" if type(value) is int else value
            print(f"{indent}{name:24} {shown}")


@contextlib.contextmanager
def _progress_bar(**settings: Any) -> Iterator[Callable[[int, int], None]]:
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
