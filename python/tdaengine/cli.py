"""The command line, `tdaengine COMMAND`: its options. What commands do is in commands.py."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__, terminal
from ._native import Error, OptionError
from .analyze import DEFINITIONS
from .arguments import SETTING, add_engine, add_prefix_cache, add_sampling, add_tda, flag, option
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
from .options import RECOMMENDED
from .serve import run_serve
from .train import add_train_experts, add_train_predictor, run_train

# The exit codes of a shell for SIGINT (Ctrl-C) and SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141


DATA = 'JSONL with a field "text"'


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
        flag(added, "--json", help="print the result as JSON on stdout")
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
    add_train_predictor(
        command("train-predictor", run_train, "Train what predicts active neurons, as in DejaVu.")
    )
    add_train_experts(
        command("train-experts", run_train, "Group neurons to experts, as in MoEfication.")
    )
    _add_bench(command("bench", run_bench, "Speed and memory, beside the speed of reading memory."))
    _add_serve(command("serve", run_serve, "Answer over HTTP, by the OpenAI API and a page."))
    info = command("info", run_info, "Show what a checkpoint holds.")
    add_engine(info)
    flag(info, "--verify", help="compare the files that convert wrote to their checksums")
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    parser.add_argument(
        "prompt", nargs="?", help="the text to continue; - takes it from standard input"
    )
    option(parser, "--file", metavar="FILE", help="take the prompt from a file", shown="none")
    option(
        parser,
        "--logprobs",
        default=argparse.SUPPRESS,
        type=int,
        metavar="K",
        help="with --json: log-probabilities of each token and of the K likeliest ones",
        shown="none",
    )
    option(
        parser,
        "--json-schema",
        metavar="FILE",
        help="generate JSON that this JSON schema accepts; needs the extra [grammar]",
        shown="none",
    )
    add_sampling(parser, {})
    add_tda(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    option(
        parser,
        "--message",
        metavar="TEXT",
        help="ask this alone, then end; - takes it from standard input",
        shown="a conversation",
    )
    option(parser, "--file", metavar="FILE", help="take the message from a file", shown="none")
    option(parser, "--system", metavar="TEXT", help="system prompt", shown="the template's own")
    add_prefix_cache(parser)
    add_sampling(
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
    add_tda(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint folder or GGUF file")
    parser.add_argument("destination", help="the new folder")
    option(
        parser,
        "--dtype",
        default="auto",
        help="of a Hugging Face folder's tensors: f32, bf16, or auto, which keeps them (of a GGUF "
        "file: bf16, or f32 where it holds f32 matrices)",
    )
    option(
        parser,
        "--weights",
        metavar="FORMAT",
        help="write an engine folder with weights as f32, bf16, bf16c, int8, int4 or graded, which "
        "loads in milliseconds",
        shown="a Hugging Face folder",
    )
    option(
        parser,
        "--data",
        metavar="FILE",
        help=f"{DATA}, for int4: rounds weights of 16 bits so that what the model computes from "
        "these texts changes least, which takes minutes",
        shown="each weight to the nearest",
    )


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    option(
        parser,
        "--data",
        metavar="FILE",
        help=DATA,
        shown="the model writes its own texts",
    )
    option(parser, "--scope", default="sequence", help="sequence or token")
    target = parser.add_mutually_exclusive_group()
    option(target, "--error", type=float, help="target for the error of each layer", shown="0.1")
    option(
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
        "tda.json in the model's folder, NAME.tda.json beside NAME.gguf; --tda loss=0.02 finds it",
    )


def _add_output(parser: argparse.ArgumentParser, help: str, shown: str) -> None:
    option(parser, "-o", "--output", type=Path, metavar="FILE", help=help, shown=shown)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    option(source, "--data", metavar="FILE", help=DATA, shown="none")
    option(
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
    flag(
        parser,
        "--frontier",
        help="settings of each kind of TDA that the weights allow, of GRIFFIN and of CATS, masks "
        "compact on the CPU",
    )
    option(
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
    add_engine(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help=DATA)
    _add_texts(parser)
    option(parser, "--active", type=float, default=0.5, help="share of neurons in a set")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    _add_settings(parser)
    option(parser, "--prefill", default="128,512", metavar="TOKENS", help="lengths of prompts")
    option(
        parser,
        "--context",
        default="128,1024",
        metavar="TOKENS",
        help="lengths of prompts to decode after",
    )
    option(parser, "--new-tokens", type=int, default=64, help="how many tokens to decode")
    option(parser, "--rounds", type=int, default=5, help="how often each is measured")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    add_tda(parser)
    group = parser.add_argument_group("server")
    option(group, "--host", default="127.0.0.1", metavar="ADDRESS", help="that it listens on")
    option(group, "--port", type=int, default=8000, metavar="N", help="0 takes a free one")
    option(group, "--name", help="of the model in requests", shown="the folder's or hub id's")
    option(
        group,
        "--api-key",
        metavar="KEY",
        help="that requests must show; better in the environment as TDAENGINE_API_KEY, where other "
        "users of the machine do not see it",
        shown="none",
    )
    option(
        group,
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of https://example.com ask, too; repeatable",
        shown="none",
    )

    def limit(name: str, default: int, help: str) -> None:
        option(group, name, type=int, default=default, metavar="N", help=help)

    limit("--parallel", 8, "answers computed together, each with a KV cache of its own")
    option(
        group,
        "--cache-memory",
        metavar="SIZE",
        help="the most memory of these caches together, as '2 GiB': an answer for which there is "
        "none left waits",
        shown="no limit",
    )
    add_prefix_cache(group)
    limit("--queue", 64, "requests that may wait; further ones are told to come back")
    limit("--max-body", 4 << 20, "bytes of a request")
    limit("--drain", 30, "seconds that answers under way have after SIGTERM")


def _add_texts(parser: argparse.ArgumentParser) -> None:
    option(
        parser,
        "--texts",
        type=int,
        metavar="N",
        help="only the first N texts that are long enough, or the first N items of each task",
        shown="all of them",
    )
    option(parser, "--prompt-tokens", type=int, default=256, metavar="N", help="of each text")
    option(
        parser,
        "--score-tokens",
        type=int,
        default=256,
        metavar="N",
        help="of each text behind the prompt",
    )
    option(
        parser, "--plot", type=Path, metavar="FILE", help="a picture, .png or .svg", shown="none"
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    option(
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
