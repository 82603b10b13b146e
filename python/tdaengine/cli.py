"""The command line, `tdaengine COMMAND`: every function _command runs one of them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import __version__, plots
from ._native import (
    TDA,
    Error,
    GenerateOptions,
    GenerationStats,
    OptionError,
    RopeConfig,
    Thresholds,
)
from .analyze import DEFINITIONS, analyze
from .analyze import table as overlaps
from .bench import bench
from .engine import Engine, Output, Stream
from .evaluate import evaluate, frontier, parse_setting, table

# The exit codes of a shell for SIGINT (Ctrl-C) and SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141

# Of TDA, as --tda-...; refresh is --refresh.
TDA_OPTIONS = ("error", "active", "thresholds", "scope", "coarse", "compact", "head")

OVERLAP_TEXTS = 8  # of those evaluated, for the picture of overlaps


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error (told on stderr), 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # as `tdaengine ... | head` ends: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdaengine", description="LLaMA inference with TDA")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="the result as JSON on stdout")
        added.set_defaults(run=run)
        return added

    generate = command("generate", _generate, "Continue a text.")
    _add_engine(generate)
    generate.add_argument("prompt")
    _add_sampling(generate)
    _add_tda(generate)

    chat = command("chat", _chat, "Talk to a model. /reset begins anew, /exit or Ctrl-D ends.")
    _add_engine(chat)
    chat.add_argument("--message", help="ask this alone, then end")
    chat.add_argument("--system", help="system prompt")
    _add_sampling(chat)
    _add_tda(chat)

    convert = command("convert", _convert, "Write a checkpoint or GGUF file as a new folder.")
    convert.add_argument("source")
    convert.add_argument("destination")
    convert.add_argument("--dtype", default="auto", help="auto, f32, bf16 or int8")
    convert.add_argument(
        "--weights", metavar="FORMAT", help="an engine folder with f32, bf16, int8 or int4 weights"
    )

    calibrate = command("calibrate", _calibrate, "Search TDA thresholds that meet an error target.")
    _add_engine(calibrate)
    calibrate.add_argument(
        "--data",
        metavar="FILE",
        help='JSONL with a field "text"; without it the model writes its own texts',
    )
    calibrate.add_argument("--scope", default="sequence", help="sequence (default) or token")
    target = calibrate.add_mutually_exclusive_group()
    target.add_argument("--error", type=float, help="target, default 0.1")
    target.add_argument(
        "--bytes", type=float, metavar="B", help="scope token: share of FFN bytes to read, e.g. 0.6"
    )
    calibrate.add_argument("-o", "--output", required=True, metavar="FILE")

    evaluate = command("evaluate", _evaluate, "Quality and speed of TDA settings against dense.")
    _add_engine(evaluate)
    _add_texts(evaluate)
    _add_settings(evaluate)
    evaluate.add_argument(
        "--frontier",
        action="store_true",
        help="six settings of each kind of TDA, of GRIFFIN and of CATS, masks compact on the CPU",
    )
    evaluate.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="FORMAT",
        help="dense with other weights, too, e.g. int4; repeatable",
    )
    evaluate.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="takes each text's figures as they come; if it exists, goes on behind them",
    )

    analyze = command("analyze", _analyze, "What the sets of active neurons depend on.")
    analyze.formatter_class = argparse.RawDescriptionHelpFormatter
    analyze.epilog = DEFINITIONS
    _add_engine(analyze)
    _add_texts(analyze)
    analyze.add_argument("--active", type=float, default=0.5, help="share of neurons in a set")

    bench = command("bench", _bench, "Speed and memory, beside the speed of reading memory.")
    _add_engine(bench)
    _add_settings(bench)
    bench.add_argument("--prefill", default="128,512", metavar="TOKENS", help="lengths of prompts")
    bench.add_argument(
        "--context", default="128,1024", metavar="TOKENS", help="lengths of prompts to decode after"
    )
    bench.add_argument("--new-tokens", type=int, default=64)
    bench.add_argument("--rounds", type=int, default=5)

    _add_engine(command("info", _info, "Show what a checkpoint holds."))
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder or hub id")
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--weights", default="auto", help="auto, f32, bf16, int8 or int4")
    group.add_argument("--kv", default="auto", help="auto, f32, bf16 or int8")
    group.add_argument("--threads", type=int)
    group.add_argument("--max-context", type=int, metavar="TOKENS")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options not given are left to GenerateOptions."""
    group = parser.add_argument_group("generation")

    def option(name: str, **settings: Any) -> None:
        group.add_argument(name, default=argparse.SUPPRESS, **settings)

    option("--max-new-tokens", type=int)
    option("--temperature", type=float, help="0: greedy (default)")
    option("--top-k", type=int)
    option("--top-p", type=float)
    option("--min-p", type=float)
    option("--repetition-penalty", type=float)
    option("--seed", type=int)
    option("--ignore-eos", action="store_true")
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be given repeatedly")


def _add_tda(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("threshold-based dynamic activation")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--tda-error", type=float, metavar="E", help="target error, e.g. 0.1")
    kind.add_argument("--tda-active", type=float, metavar="A", help="share of neurons, e.g. 0.5")
    kind.add_argument("--tda-thresholds", metavar="FILE", help="made by calibrate")
    group.add_argument("--tda-scope", metavar="SCOPE", help="sequence (default) or token")
    group.add_argument("--tda-coarse", type=float, metavar="C", help="share at 4 bits, scope token")
    group.add_argument(
        "--tda-compact",
        action="store_const",
        const=True,
        help="copy the mask's rows to one place, scope sequence",
    )
    group.add_argument(
        "--tda-head",
        type=float,
        metavar="P",
        help="output head at 4 bits but for tokens P times as likely as the likeliest, e.g. 0.001",
    )
    group.add_argument("--refresh", type=int, metavar="N", help="renew the mask every N tokens")


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="FILE", help='JSONL with a field "text"')
    parser.add_argument("--texts", type=int, metavar="N", help="only the first N texts")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--score-tokens", type=int, default=256)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, .png or .svg")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tda",
        action="append",
        default=[],
        metavar="SETTING",
        help="error=0.1 or scope=token,active=0.3,coarse=0.5 or thresholds=FILE; repeatable",
    )


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


def _generate(args: argparse.Namespace) -> None:
    _answer(_engine(args).stream(args.prompt, **_sampling(args)), args.json)


def _chat(args: argparse.Namespace) -> None:
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


def _convert(args: argparse.Namespace) -> None:
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


def _calibrate(args: argparse.Namespace) -> None:
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


def _evaluate(args: argparse.Namespace) -> None:
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


def _analyze(args: argparse.Namespace) -> None:
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
    return _read_texts(Path(args.data))[: args.texts]


def _bench(args: argparse.Namespace) -> None:
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


def _read_texts(path: Path) -> list[str]:
    """The field "text" of every line; blank lines count for nothing."""
    texts = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise OptionError(f"{path}, line {number}: {error}") from error
            if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
                raise OptionError(f'{path}, line {number}: expected {{"text": "..."}}')
            texts.append(entry["text"])
    if not texts:
        raise OptionError(f"{path}: found no texts")
    return texts


def _info(args: argparse.Namespace) -> None:
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
    print(json.dumps(value, ensure_ascii=False))


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
                bar = stack.enter_context(tqdm(total=total, **settings))
            elif bar.total != total:  # the next part of the work
                bar.reset(total)
            bar.update(done - bar.n)

        yield progress
