"""The command line: tdaengine generate | chat | convert | calibrate | evaluate | info."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import __version__
from ._native import (
    TDA,
    Error,
    GenerateOptions,
    GenerationStats,
    OptionError,
    RopeConfig,
    Thresholds,
)
from .engine import Engine, Output, Stream
from .evaluate import evaluate
from .tensors import read_safetensors

# The exit codes of a shell for SIGINT (Ctrl-C) and SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141


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
    convert.add_argument("--dtype", default="auto", help="auto, f32 or bf16")

    calibrate = command("calibrate", _calibrate, "Search TDA thresholds that meet an error target.")
    _add_engine(calibrate)
    calibrate.add_argument(
        "--data",
        metavar="FILE",
        help='JSONL with a field "text"; without it the model writes its own texts',
    )
    calibrate.add_argument("--error", type=float, default=0.1, help="target, default %(default)s")
    calibrate.add_argument("-o", "--output", required=True, metavar="FILE")

    evaluate = command("evaluate", _evaluate, "Quality and speed of TDA settings against dense.")
    _add_engine(evaluate)
    evaluate.add_argument("--data", required=True, metavar="FILE", help='JSONL with a field "text"')
    evaluate.add_argument(
        "--tda",
        action="append",
        default=[],
        metavar="SETTING",
        help="as error=0.1 or active=0.5,refresh=32 or thresholds=FILE; may be given repeatedly",
    )
    evaluate.add_argument("--prompt-tokens", type=int, default=256)
    evaluate.add_argument("--score-tokens", type=int, default=256)
    evaluate.add_argument("--texts", type=int, metavar="N", help="only the first N texts")

    _add_engine(command("info", _info, "Show what a checkpoint holds."))
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder or hub id")
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="auto", help="auto or cpu")
    group.add_argument("--weights", default="auto", help="auto, f32 or bf16")
    group.add_argument("--kv", default="auto", help="auto, f32 or bf16")
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
    group.add_argument("--refresh", type=int, metavar="N", help="renew the mask every N tokens")


def _engine(args: argparse.Namespace) -> Engine:
    names = ("device", "weights", "kv", "threads", "max_context")
    return Engine(args.model, tda=_tda(args), **{name: getattr(args, name) for name in names})


def _tda(args: argparse.Namespace) -> TDA | None:
    given = {name: getattr(args, f"tda_{name}", None) for name in ("error", "active", "thresholds")}
    given = {name: value for name, value in given.items() if value is not None}
    refresh = getattr(args, "refresh", None)
    if refresh is not None and not given:
        raise OptionError("--refresh: needs --tda-error, --tda-active or --tda-thresholds")
    if not given:
        return None
    if "thresholds" in given:
        given["thresholds"] = Thresholds.load(given["thresholds"])
    return TDA(refresh=refresh or 0, **given)


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
        convert(args.source, args.destination, dtype=args.dtype, progress=progress)
    files = _files(Path(args.destination))
    if args.json:
        _print_json({"path": args.destination, "files": files})
    else:
        print(f"{args.destination}: {sum(files.values()):,} bytes in {len(files)} files")


def _calibrate(args: argparse.Namespace) -> None:
    texts = None if args.data is None else _read_texts(Path(args.data))
    engine = _engine(args)
    with _progress_bar(unit="text", disable=args.json) as progress:
        thresholds = engine.calibrate(texts, error=args.error, progress=progress)
    thresholds.save(args.output)
    if args.json:
        _print_json(_fields(thresholds))
    else:
        reached = sum(thresholds.reached) / len(thresholds.reached)
        print(
            f"{args.output}: {len(thresholds.values)} thresholds, error {reached:.3f} reached "
            f"(target {thresholds.error}) on {thresholds.tokens} tokens of "
            f"{thresholds.texts} {thresholds.source} texts"
        )


def _evaluate(args: argparse.Namespace) -> None:
    texts = _read_texts(Path(args.data))[: args.texts]
    settings = {setting: _setting(setting) for setting in args.tda}
    with _progress_bar(unit="text", disable=args.json) as progress:
        results = evaluate(
            _engine(args),
            texts,
            settings,
            prompt_tokens=args.prompt_tokens,
            score_tokens=args.score_tokens,
            progress=progress,
        )
    if args.json:
        _print_json(results)
        return
    print("| setting | active | FFN bytes | perplexity | top-1 | tokens/s | speed-up |")
    print("|---|---|---|---|---|---|---|")
    for name, row in results.items():
        print(
            f"| {name} | {row['active']:.2f} | {row['ffn_bytes']:.2f} | {row['perplexity']:.2f} "
            f"| {row['top1_agreement']:.2f} | {row['tokens_per_second']:.1f} "
            f"| {row['speedup']:.2f} |"
        )


def _setting(text: str) -> TDA:
    """TDA from "name=value,name=value"."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator:
            raise OptionError(f"--tda {text}: found {part!r}, expected NAME=VALUE")
        if name == "thresholds":
            values[name] = Thresholds.load(value)
            continue
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return TDA(**values)


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
    weights = [engine.path / name for name in files if name.endswith(".safetensors")]
    tensors = (tensor for path in weights for tensor in read_safetensors(path))
    info = {
        "path": str(engine.path),
        "fingerprint": engine.fingerprint,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
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
            bar.update(done - bar.n)

        yield progress
