"""Options that several commands of the command line share."""

from __future__ import annotations

import argparse
from typing import Any

from ._native import TDA, GenerateOptions
from .options import parse_tda
from .prefix_cache import DEFAULT_LIMIT

SETTING = (
    "the recommended setting for the model and weights; or SETTING by hand: "
    "inputs=0.2; loss=0.02; scope=token,active=0.7; error=0.05; thresholds=FILE; "
    "predictor=FILE,active=0.5; off"
)


def option(
    group: Any, *names: str, help: str, default: Any = None, shown: str = "", **settings: Any
) -> None:
    """An option whose help tells its default: `shown`, or else the value itself."""
    text = f"{help} (default: {shown or default})"
    group.add_argument(*names, help=text, default=default, **settings)


def flag(group: Any, name: str, *, help: str, default: Any = False) -> None:
    option(group, name, help=help, default=default, shown="off", action="store_true")


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, GGUF file or hub id")
    group = parser.add_argument_group("engine")
    option(group, "--device", default="auto", help="auto, cpu or cuda")
    option(
        group,
        "--weights",
        default="auto",
        metavar="FORMAT",
        help="f32, bf16, int8, int4, bf16c (bf16 compressed without loss), graded (8 bits of which "
        "--tda reads 4 or 8), or auto: what the file has, rounded to bf16 if that is f16",
    )
    option(
        group,
        "--kv",
        default="auto",
        metavar="FORMAT",
        help="of cached keys and values: f32, bf16, int8, or auto: f32 with f32 weights, else bf16",
    )
    option(
        group, "--threads", type=int, metavar="N", help="that compute", shown="all that may be used"
    )
    option(
        group,
        "--max-context",
        type=int,
        metavar="TOKENS",
        help="of a prompt and what follows it",
        shown="the checkpoint's",
    )


def add_prefix_cache(group: Any) -> None:
    option(
        group,
        "--prefix-cache",
        dest="kept_prefixes",
        default=DEFAULT_LIMIT,
        metavar="SIZE",
        help="memory for the beginnings of prompts: of a later one that begins so only the rest is "
        "prefilled; 0: none",
    )


def add_sampling(parser: argparse.ArgumentParser, shown: dict[str, str]) -> None:
    """Options not given are left to GenerateOptions, or whatever else `shown` tells."""
    group = parser.add_argument_group("generation")
    defaults = GenerateOptions()

    def one(name: str, kind: type, help: str) -> None:
        option(
            group,
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            type=kind,
            metavar="N" if kind is int else "X",
            help=help,
            shown=shown.get(name) or str(getattr(defaults, name)),
        )

    one("max_new_tokens", int, "how many tokens to generate at most")
    one("temperature", float, "0 is greedy")
    one("top_k", int, "draw from so many likeliest tokens; 0: all")
    one("top_p", float, "draw from the fewest tokens with this probability; 1: all")
    one("min_p", float, "only from tokens this likely relative to the likeliest; 0: all")
    one("repetition_penalty", float, "on tokens that were there before; 1: none")
    one("presence_penalty", float, "taken from logits of tokens generated before; -2 to 2")
    one("frequency_penalty", float, "the same times how often they were generated")
    shown = {**shown, "seed": "a fresh one"}
    one("seed", int, "of the random numbers")
    flag(group, "--ignore-eos", help="go on after an end-of-text token", default=argparse.SUPPRESS)
    option(
        group,
        "--stop",
        action="append",
        metavar="TEXT",
        help="end before this text; repeatable",
        shown="none",
    )


def add_tda(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("threshold-based dynamic activation")
    option(
        group,
        "--tda",
        nargs="?",
        type=parse_tda,
        const=TDA(),
        metavar="SETTING",
        help=SETTING,
        shown="off",
    )
