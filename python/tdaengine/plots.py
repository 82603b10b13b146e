"""Pictures of what evaluate and analyze find. They need matplotlib."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._native import OptionError
from .evaluate import DENSE
from .files import check_output

WORST = 1.6  # perplexity relative to dense up to which the frontier is shown


def check(path: Path) -> None:
    """To be called before hours of work. Raises OptionError if no picture can be made there."""
    if path.suffix not in (".png", ".svg"):
        raise OptionError(f"--plot {path}: expected a name that ends in .png or .svg")
    check_output(path)
    _figure((1, 1))


def evaluation(
    results: Mapping[str, Mapping[str, Any]],
    families: Mapping[str, Collection[str]],
    figures: Mapping[str, Any],
    score_tokens: int,
    path: Path,
) -> None:
    """families: names of settings that make up a line. figures: of analyze()."""
    picture = _figure((11, 8))
    (bytes_axes, speed_axes), (layer_axes, time_axes) = picture.subplots(2, 2)
    dense = results[DENSE]["perplexity"]
    for axes, name, label in (
        (bytes_axes, "bytes_per_token", "bytes read per token, relative to dense"),
        (speed_axes, "speedup", "decoding speed relative to dense"),
    ):
        unit = results[DENSE][name]
        for family, names in families.items():
            points = sorted((results[n][name] / unit, results[n]["perplexity"]) for n in names)
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=family)
        axes.axhline(dense, color="grey", lw=0.8)
        axes.plot(1, dense, "k*", label=DENSE)
        axes.set(xlabel=label, ylabel="perplexity")
        if max(row["perplexity"] for row in results.values()) > dense * WORST:
            axes.set_ylim(dense * 0.98, dense * WORST)
        axes.legend(fontsize=8)
    for i, names in enumerate(families.values()):
        middle = list(names)[len(names) // 2]
        layer_axes.plot(results[middle]["active_by_layer"], color=f"C{i}", label=middle)
    layer_axes.set(xlabel="layer", ylabel="active share of neurons", ylim=(0, 1.03))
    layer_axes.legend(fontsize=8)
    _overlap_over_time(time_axes, figures, score_tokens)
    picture.savefig(path, dpi=100)


def analysis(figures: Mapping[str, Any], score_tokens: int, path: Path) -> None:
    """figures: of analyze()."""
    picture = _figure((11, 4))
    time, depth = picture.subplots(1, 2)
    _overlap_over_time(time, figures, score_tokens)
    for name, label in (
        ("shuffled", "own tokens shuffled"),
        ("texts", "another text"),
        ("next", "neighbouring tokens"),
        ("always", "active in 9 of 10 tokens (share of all)"),
    ):
        depth.plot(figures[name], label=label)
    depth.axhline(figures["active"], ls=":", color="grey", label="chance of an overlap")
    depth.set(xlabel="layer", ylabel="overlap, share", ylim=(0, 1))
    depth.legend(fontsize=8)
    picture.savefig(path, dpi=100)


def _overlap_over_time(axes: Any, figures: Mapping[str, Any], score_tokens: int) -> None:
    parts = figures["prompt"]
    middles = [(part + 0.5) * score_tokens / len(parts) for part in range(len(parts))]
    axes.plot(middles, [np.mean(part) for part in parts], marker="o", label="the prompt's mask")
    lines = (("own", "the same within the prompt", "C1"), ("next", "the next token's set", "C2"))
    for name, label, color in lines:
        axes.axhline(np.mean(figures[name]), ls="--", color=color, label=label)
    axes.axhline(figures["active"], ls=":", color="grey", label="chance")
    axes.set(xlabel="tokens behind the prompt", ylabel="overlap with a token's active set")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("--plot: needs matplotlib, pip install 'tdaengine[plot]'") from error
    return Figure(figsize=size, layout="constrained")
