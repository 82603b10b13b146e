"""The command line, `tdaengine COMMAND`: its options. What commands do is in commands.py."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__, terminal
from ._native import TDA, Error, GenerateOptions, OptionError
from .analyze import DEFINITIONS
from .commands import (
    run_analyze,
    run_bench,
    run_calibrate,
    run_convert,
    run_evaluate,
    run_generate,
    run_info,
)
from .conversation import TEMPERATURE, TOP_P, run_chat
from .engine import TdaWarning
from .options import RECOMMENDED, parse_tda

# The exit codes of a shell for SIGINT (Ctrl-C) and SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141


DATA = 'JSONL with a field "text"'
SETTING = (
    "the recommended setting for the model and weights; or SETTING by hand: "
    "inputs=0.2; loss=0.02; scope=token,active=0.3,coarse=0.5; error=0.05; thresholds=FILE; off"
)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error (told on stderr), 130 after Ctrl-C, 141 if nobody
    reads what is printed."""
    with terminal.standard_streams(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("default", TdaWarning)
        try:
            try:
                _refuse_old_options(sys.argv[1:] if arguments is None else arguments)
                args = make_parser().parse_args(arguments)
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


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _refuse_old_options(arguments: list[str]) -> None:
    """The options that --tda SETTING took the place of."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--":
            return
        if name == "--refresh" or name.startswith("--tda-"):
            field = name.removeprefix("--").removeprefix("tda-")
            raise OptionError(f"{name}: expected --tda {field}={value or '...'}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tdaengine",
        description="LLaMA-family inference with threshold-based dynamic activation (TDA)",
        allow_abbrev=False,
    )
    parser.color = False  # type: ignore[attr-defined]  # as since Python 3.14 it else is
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        _flag(added, "--json", help="print the result as JSON on stdout")
        added.set_defaults(run=run)
        added.color = False  # type: ignore[attr-defined]
        return added

    _add_generate(command("generate", run_generate, "Continue a text."))
    _add_chat(command("chat", run_chat, "Talk to a model; /help lists what can be typed."))
    _add_convert(
        command("convert", run_convert, "Write a checkpoint or GGUF file as a new folder.")
    )
    _add_calibrate(
        command(
            "calibrate",
            run_calibrate,
            "Search TDA thresholds; with graded weights, measure what fewer inputs cost.",
        )
    )
    _add_evaluate(
        command("evaluate", run_evaluate, "Quality and speed of TDA settings against dense.")
    )
    _add_analyze(command("analyze", run_analyze, "What the sets of active neurons depend on."))
    _add_bench(command("bench", run_bench, "Speed and memory, beside the speed of reading memory."))
    info = command("info", run_info, "Show what a checkpoint holds.")
    _add_engine(info)
    _flag(info, "--verify", help="compare the files that convert wrote to their checksums")
    return parser


def _option(
    group: Any, *names: str, help: str, default: Any = None, shown: str = "", **settings: Any
) -> None:
    """An option whose help tells its default: `shown`, or else the value itself."""
    text = f"{help} (default: {shown or default})"
    group.add_argument(*names, help=text, default=default, **settings)


def _flag(group: Any, name: str, *, help: str, default: Any = False) -> None:
    _option(group, name, help=help, default=default, shown="off", action="store_true")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    parser.add_argument(
        "prompt", nargs="?", help="the text to continue; - takes it from standard input"
    )
    _option(parser, "--file", metavar="FILE", help="take the prompt from a file", shown="none")
    _add_sampling(parser, {})
    _add_tda(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    _option(
        parser,
        "--message",
        metavar="TEXT",
        help="ask this alone, then end; - takes it from standard input",
        shown="a conversation",
    )
    _option(parser, "--file", metavar="FILE", help="take the message from a file", shown="none")
    _option(parser, "--system", metavar="TEXT", help="system prompt", shown="the template's own")
    _add_sampling(
        parser,
        {
            "max_new_tokens": "until the context is full",
            "temperature": f"the checkpoint's, or {TEMPERATURE}",
            "top_k": "the checkpoint's, or 0",
            "top_p": f"the checkpoint's, or {TOP_P}",
            "min_p": "the checkpoint's, or 0.0",
            "repetition_penalty": "the checkpoint's, or 1.0",
        },
    )
    _add_tda(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint folder or GGUF file")
    parser.add_argument("destination", help="the new folder")
    _option(
        parser,
        "--dtype",
        default="auto",
        help="of a Hugging Face folder's tensors: f32, bf16, or auto, which keeps them (of a GGUF "
        "file: bf16, or f32 where it holds f32 matrices)",
    )
    _option(
        parser,
        "--weights",
        metavar="FORMAT",
        help="write an engine folder with weights as f32, bf16, bf16c, int8, int4 or graded, which "
        "loads in milliseconds",
        shown="a Hugging Face folder",
    )


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    _option(
        parser,
        "--data",
        metavar="FILE",
        help=DATA,
        shown="the model writes its own texts",
    )
    _option(parser, "--scope", default="sequence", help="sequence or token")
    target = parser.add_mutually_exclusive_group()
    _option(target, "--error", type=float, help="target for the error of each layer", shown="0.1")
    _option(
        target,
        "--bytes",
        type=float,
        metavar="B",
        help="instead, with scope token: share of FFN bytes to read, as 0.6",
        shown="none",
    )
    _add_output(
        parser,
        "where the thresholds go, as JSON",
        "tda.json in the model's folder, where --tda loss=0.02 finds it",
    )


def _add_output(parser: argparse.ArgumentParser, help: str, shown: str) -> None:
    _option(parser, "-o", "--output", type=Path, metavar="FILE", help=help, shown=shown)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    _option(source, "--data", metavar="FILE", help=DATA, shown="none")
    _option(
        source,
        "--tasks",
        nargs="+",
        metavar="FILE",
        help="instead, JSONL with query, choices and gold, or contexts, continuation and gold, or "
        "context and continuation, or question and answer: accuracies",
        shown="none",
    )
    _add_texts(parser)
    _add_settings(parser)
    _flag(
        parser,
        "--frontier",
        help="settings of each kind of TDA that the weights allow, of GRIFFIN and of CATS, masks "
        "compact on the CPU",
    )
    _option(
        parser,
        "--also",
        action="append",
        default=[],
        metavar="FORMAT,SETTING",
        help="other weights, too, as int4 (dense) or graded,inputs=0.2; repeatable",
        shown="none",
    )
    _add_output(
        parser,
        "takes each text's or item's figures as they come; if it exists, goes on behind them",
        "none",
    )


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = DEFINITIONS
    _add_engine(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help=DATA)
    _add_texts(parser)
    _option(parser, "--active", type=float, default=0.5, help="share of neurons in a set")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    _add_settings(parser)
    _option(parser, "--prefill", default="128,512", metavar="TOKENS", help="lengths of prompts")
    _option(
        parser,
        "--context",
        default="128,1024",
        metavar="TOKENS",
        help="lengths of prompts to decode after",
    )
    _option(parser, "--new-tokens", type=int, default=64, help="how many tokens to decode")
    _option(parser, "--rounds", type=int, default=5, help="how often each is measured")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder or hub id")
    group = parser.add_argument_group("engine")
    _option(group, "--device", default="auto", help="auto, cpu or cuda")
    _option(
        group,
        "--weights",
        default="auto",
        metavar="FORMAT",
        help="f32, bf16, int8, int4, bf16c (bf16 compressed without loss), graded (8 bits of which "
        "--tda reads 4 or 8), or auto: f32 for an f32 checkpoint, the format of an engine folder, "
        "else bf16",
    )
    _option(
        group,
        "--kv",
        default="auto",
        metavar="FORMAT",
        help="of cached keys and values: f32, bf16, int8, or auto: f32 with f32 weights, else bf16",
    )
    _option(
        group, "--threads", type=int, metavar="N", help="that compute", shown="all that may be used"
    )
    _option(
        group,
        "--max-context",
        type=int,
        metavar="TOKENS",
        help="of a prompt and what follows it",
        shown="the checkpoint's",
    )


def _add_sampling(parser: argparse.ArgumentParser, shown: dict[str, str]) -> None:
    """Options not given are left to GenerateOptions, or whatever else `shown` tells."""
    group = parser.add_argument_group("generation")
    defaults = GenerateOptions()

    def option(name: str, kind: type, help: str) -> None:
        _option(
            group,
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            type=kind,
            metavar="N" if kind is int else "X",
            help=help,
            shown=shown.get(name) or str(getattr(defaults, name)),
        )

    option("max_new_tokens", int, "how many tokens to generate at most")
    option("temperature", float, "0 is greedy")
    option("top_k", int, "draw from so many likeliest tokens; 0: all")
    option("top_p", float, "draw from the fewest tokens with this probability; 1: all")
    option("min_p", float, "only from tokens this likely relative to the likeliest; 0: all")
    option("repetition_penalty", float, "on tokens that were there before; 1: none")
    shown = {**shown, "seed": "a fresh one"}
    option("seed", int, "of the random numbers")
    _flag(group, "--ignore-eos", help="go on after an end-of-text token", default=argparse.SUPPRESS)
    _option(
        group,
        "--stop",
        action="append",
        metavar="TEXT",
        help="end before this text; repeatable",
        shown="none",
    )


def _add_tda(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("threshold-based dynamic activation")
    _option(
        group,
        "--tda",
        nargs="?",
        type=parse_tda,
        const=TDA(),
        metavar="SETTING",
        help=SETTING,
        shown="off",
    )


def _add_texts(parser: argparse.ArgumentParser) -> None:
    _option(
        parser,
        "--texts",
        type=int,
        metavar="N",
        help="only the first N texts that are long enough, or the first N items of each task",
        shown="all of them",
    )
    _option(parser, "--prompt-tokens", type=int, default=256, metavar="N", help="of each text")
    _option(
        parser,
        "--score-tokens",
        type=int,
        default=256,
        metavar="N",
        help="of each text behind the prompt",
    )
    _option(
        parser, "--plot", type=Path, metavar="FILE", help="a picture, .png or .svg", shown="none"
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    _option(
        parser,
        "--tda",
        nargs="?",
        const=RECOMMENDED,
        action="append",
        default=[],
        metavar="SETTING",
        help=SETTING.replace("; off", "") + "; repeatable",
        shown="dense alone",
    )
