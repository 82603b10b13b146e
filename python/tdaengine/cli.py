"""The command line, `tdaengine COMMAND`: its options. What commands do is in commands.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__, terminal
from ._native import Error
from .analyze import DEFINITIONS
from .commands import (
    run_analyze,
    run_bench,
    run_calibrate,
    run_chat,
    run_convert,
    run_evaluate,
    run_generate,
    run_info,
)

# The exit codes of a shell for SIGINT (Ctrl-C) and SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error (told on stderr), 130 after Ctrl-C, 141 if nobody
    reads what is printed."""
    with terminal.standard_streams():
        try:
            try:
                args = _parser().parse_args(arguments)
                args.run(args)
            finally:  # --help, too, may be printed where nobody reads it or there is no room
                sys.stdout.flush()
        except BrokenPipeError:
            return BROKEN_PIPE
        except (Error, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdaengine", description="LLaMA inference with TDA")
    parser.color = False  # type: ignore[attr-defined]  # as since Python 3.14 it else is
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="the result as JSON on stdout")
        added.set_defaults(run=run)
        added.color = False
        return added

    generate = command("generate", run_generate, "Continue a text.")
    _add_engine(generate)
    generate.add_argument("prompt")
    _add_sampling(generate)
    _add_tda(generate)

    chat = command("chat", run_chat, "Talk to a model. /reset begins anew, /exit or Ctrl-D ends.")
    _add_engine(chat)
    chat.add_argument("--message", help="ask this alone, then end")
    chat.add_argument("--system", help="system prompt")
    _add_sampling(chat)
    _add_tda(chat)

    convert = command("convert", run_convert, "Write a checkpoint or GGUF file as a new folder.")
    convert.add_argument("source")
    convert.add_argument("destination")
    convert.add_argument("--dtype", default="auto", help="auto, f32, bf16 or int8")
    convert.add_argument(
        "--weights",
        metavar="FORMAT",
        help="an engine folder with f32, bf16, bf16c, int8 or int4 weights",
    )

    calibrate = command(
        "calibrate", run_calibrate, "Search TDA thresholds that meet an error target."
    )
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

    evaluate = command("evaluate", run_evaluate, "Quality and speed of TDA settings against dense.")
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

    analyze = command("analyze", run_analyze, "What the sets of active neurons depend on.")
    analyze.formatter_class = argparse.RawDescriptionHelpFormatter
    analyze.epilog = DEFINITIONS
    _add_engine(analyze)
    _add_texts(analyze)
    analyze.add_argument("--active", type=float, default=0.5, help="share of neurons in a set")

    bench = command("bench", run_bench, "Speed and memory, beside the speed of reading memory.")
    _add_engine(bench)
    _add_settings(bench)
    bench.add_argument("--prefill", default="128,512", metavar="TOKENS", help="lengths of prompts")
    bench.add_argument(
        "--context", default="128,1024", metavar="TOKENS", help="lengths of prompts to decode after"
    )
    bench.add_argument("--new-tokens", type=int, default=64)
    bench.add_argument("--rounds", type=int, default=5)

    _add_engine(command("info", run_info, "Show what a checkpoint holds."))
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder or hub id")
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--weights", default="auto", help="auto, f32, bf16, int8, int4 or bf16c")
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
