"""`tdaengine train-predictor` and `tdaengine train-experts`: the comparators that need training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._native import OptionError
from .arguments import add_engine, option
from .commands import encoded_texts, open_engine, print_json, progress_bar
from .files import check_output, read_texts


def add_train_predictor(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "predictor.safetensors")
    option(parser, "--rank", type=int, default=128, metavar="N", help="of a layer's predictor")
    parser.set_defaults(experts=0)


def add_train_experts(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "experts.safetensors")
    option(parser, "--experts", type=int, default=32, metavar="N", help="in each layer")
    parser.set_defaults(rank=None)


def _add_common(parser: argparse.ArgumentParser, output: str) -> None:
    add_engine(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help='JSONL with a field "text"')
    option(
        parser,
        "--active",
        type=float,
        default=0.5,
        metavar="A",
        help="share of the neurons that count as active for a token, those that contribute most",
    )
    option(parser, "--epochs", type=int, default=20, metavar="N", help="how often each token comes")
    option(parser, "--max-tokens", type=int, default=512, metavar="N", help="of each text")
    option(parser, "--seed", type=int, default=0, metavar="N", help="of the random numbers")
    option(
        parser,
        "-o",
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help="for --tda predictor=FILE; FILE.training keeps what a training that was stopped has "
        "learnt, and the same command goes on there",
    )


def run_train(args: argparse.Namespace) -> None:
    try:
        import torch  # type: ignore[import-not-found,unused-ignore]

        from .predictors import Recipe, table, train
    except ImportError as error:
        raise OptionError(
            f"training needs torch, pip install 'tdaengine[train]': {error}"
        ) from error
    check_output(args.output)
    texts = read_texts(Path(args.data))
    engine = open_engine(args)
    torch.set_num_threads(engine.threads)
    ids = encoded_texts(args, engine, texts, 1)
    names = ("experts", "active", "epochs", "max_tokens", "seed")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    recipe = Recipe(rank=args.rank or args.experts, **options)
    with progress_bar(unit="step", disable=args.json) as progress:
        figures = train(engine, ids, args.output, recipe, progress=progress)
    if args.json:
        print_json(figures)
    else:
        print(f"{args.output}: {table(figures)}")
