"""Pictures of what evaluate and analyze find. They need matplotlib."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._native import OptionError
from .engine import Engine
from .evaluate import DENSE
from .files import check_output
from .tasks import Results, mean_cost, mean_of_tasks

WORST = 1.6  # perplexity relative to dense up to which the frontier is shown
FLAT = 0.02  # a line that rises and falls by less is told as a number instead

Lines = Mapping[str, Sequence[float]]


def check(path: Path) -> None:
    """To be called before hours of work. Raises OptionError if no picture can be made there."""
    if path.suffix not in (".png", ".svg"):
        raise OptionError(f"--plot {path}: expected a name that ends in .png or .svg")
    check_output(path)
    _figure((1, 1))


def evaluation(
    results: Mapping[str, Mapping[str, Any]],
    families: Mapping[str, Collection[str]],
    engine: Engine,
    path: Path,
) -> Lines:
    """Perplexity over bytes and over speed. families: names of settings that make up a line.
    Returns the active share per layer of each family's middle setting as far as it is the same in
    all layers; the others are drawn."""
    middles = {family: list(names)[len(names) // 2] for family, names in families.items()}
    by_layer = {
        name: results[name]["active_by_layer"]
        for name in middles.values()
        if results[name]["active_by_layer"]
    }
    flat, varied = split_flat(by_layer)
    picture = _figure((15 if varied else 11, 5))
    axes = picture.subplots(1, 3 if varied else 2)
    dense = results[DENSE]["perplexity"]
    for plot, name, label, better in (
        (axes[0], "bytes_per_token", "bytes read per token, relative to dense", "left"),
        (axes[1], "speedup", "decoding speed relative to dense", "right"),
    ):
        unit = results[DENSE][name]
        for i, (family, names) in enumerate(families.items()):
            rows = sorted((results[each] for each in names), key=lambda row: row[name])
            errors = [(row["perplexity_error"] or 0) * row["perplexity"] for row in rows]
            plot.errorbar(
                [row[name] / unit for row in rows],
                [row["perplexity"] for row in rows],
                yerr=errors,
                **style(i),
                ms=4,
                capsize=2,
                label=family,
            )
        plot.plot(1, dense, "k*", ms=10, label=DENSE)
        plot.set(xlabel=label, ylabel="perplexity, ± standard error of its change")
        if max(row["perplexity"] for row in results.values()) > dense * WORST:
            plot.set_ylim(dense * 0.98, dense * WORST)
        _mark_better(plot, better)
    for name, shares in varied.items():
        color = f"C{list(middles.values()).index(name)}"
        axes[2].plot(shares, color=color)
        axes[2].annotate(name, (len(shares) - 1, shares[-1]), color=color, fontsize=7, ha="right")
        axes[2].set(xlabel="layer", ylabel="active share of neurons", ylim=(0, 1.03))
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    picture.suptitle(_title("Quality against bytes and speed", engine, results[DENSE]["texts"]))
    picture.savefig(path, dpi=100)
    return flat


def tasks(
    results: Results, families: Mapping[str, Collection[str]], engine: Engine, path: Path
) -> None:
    """Mean accuracy (by length) over bytes and over speed. families: as in evaluation()."""
    picture = _figure((11, 5))
    axes = picture.subplots(1, 2)
    means = {name: mean_of_tasks(rows, "by_length") for name, rows in results.items()}
    for plot, cost, label, better in (
        (axes[0], "bytes_per_token", "bytes read per token, relative to dense", "up left"),
        (axes[1], "tokens_per_second", "decoding speed relative to dense", "up right"),
    ):
        costs = {name: mean_cost(rows, cost) for name, rows in results.items()}
        unit = costs[DENSE]
        if not unit:
            raise OptionError("--plot: found no choice of two tokens or more, expected some")
        for i, (family, names) in enumerate(families.items()):
            points = sorted((costs[name] or 0, name) for name in names)
            plot.errorbar(
                [spent / unit for spent, _ in points],
                [means[name]["accuracy"] for _, name in points],
                yerr=[means[name]["change_error"] for _, name in points],
                **style(i),
                ms=4,
                capsize=2,
                label=family,
            )
        dense = means[DENSE]["accuracy"]
        plot.plot(1, dense, "k*", ms=10, label=DENSE)
        plot.axhline(dense, ls=":", color="grey")
        plot.set(xlabel=label, ylabel="mean accuracy, ± standard error of its change")
        _mark_better(plot, better)
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    items = sum(row["items"] for row in results[DENSE].values())
    picture.suptitle(_title(f"{len(results[DENSE])} tasks", engine, items, "items"))
    picture.savefig(path, dpi=100)


def analysis(figures: Mapping[str, Any], engine: Engine, score_tokens: int, path: Path) -> Lines:
    """figures: of analyze(). Returns the lines that are flat and so not drawn."""
    parts = figures["prompt"]
    middles = [(part + 0.5) * score_tokens / len(parts) for part in range(len(parts))]
    over_time = {"the prompt's mask, over distance": [float(np.mean(part)) for part in parts]}
    over_depth = {
        "the prompt's mask": [float(np.mean(layer)) for layer in zip(*parts, strict=True)],
        "own tokens shuffled": figures["shuffled"],
        "another text": figures["texts"],
        "neighbouring tokens": figures["next"],
        "active in 9 of 10 tokens (share of all)": figures["always"],
    }
    flat_time, time = split_flat(over_time)
    flat_depth, depth = split_flat(over_depth)
    picture = _figure((11 if time else 7, 4.5))
    axes = np.atleast_1d(picture.subplots(1, 2 if time else 1))
    for i, (name, values) in enumerate(depth.items()):
        axes[0].plot(values, color=f"C{i}", label=name)
    axes[0].set(xlabel="layer", ylabel="overlap of active sets", ylim=(0, 1))
    for name, values in time.items():
        axes[1].plot(middles, values, color="C7", marker="o", label=name)
        axes[1].set(xlabel="tokens behind the prompt", ylim=(0, 1))
    chance = f"chance {figures['active']:.2f}"
    for plot in axes:
        plot.axhline(figures["active"], ls=":", color="grey", label=chance)
    _mark_better(axes[0], "up", "more alike")
    labelled = {
        label: handle
        for plot in axes
        for handle, label in zip(*plot.get_legend_handles_labels(), strict=True)
    }
    picture.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, fontsize=8
    )
    picture.suptitle(_title("What active sets have in common", engine, figures["compared"]))
    picture.savefig(path, dpi=100)
    return {**flat_depth, **flat_time}


def style(i: int) -> dict[str, str]:
    """Of the i-th line: matplotlib has ten colours, so the next ten lines have another marker."""
    return {"color": f"C{i % 10}", "marker": "osD^v<>"[i // 10 % 7]}


def split_flat(lines: Lines) -> tuple[dict[str, Sequence[float]], dict[str, Sequence[float]]]:
    """Lines that are flat, and the others."""
    flat = {name: values for name, values in lines.items() if max(values) - min(values) < FLAT}
    return flat, {name: values for name, values in lines.items() if name not in flat}


def table(flat: Lines) -> str:
    """Flat lines as markdown: what the picture does not show."""
    rows = [f"| {name} | {float(np.mean(values)):.2f} |" for name, values in flat.items()]
    return "\n".join(["| the same in all layers or at all distances | mean |", "|---|---|", *rows])


def machine() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _title(what: str, engine: Engine, count: int, kind: str = "texts") -> str:
    return (
        f"{what}: {engine.path.resolve().name}, {engine.weights}, {count} {kind}\n"
        f"{machine()}, {engine.device}, {engine.threads} threads"
    )


def _mark_better(axes: Any, where: str, word: str = "better") -> None:
    """An arrow in a corner of the axes. where: left and right mean downwards, too."""
    ends = {"left": (0.04, 0.06), "right": (0.96, 0.06), "up": (0.5, 0.97)}
    ends |= {"up left": (0.04, 0.94), "up right": (0.96, 0.94)}
    starts = {"left": (0.18, 0.2), "right": (0.82, 0.2), "up": (0.5, 0.82)}
    starts |= {"up left": (0.18, 0.8), "up right": (0.82, 0.8)}
    axes.annotate(
        word,
        ends[where],
        starts[where],
        xycoords="axes fraction",
        arrowprops={"arrowstyle": "->", "color": "green"},
        color="green",
        ha="center",
    )


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("--plot: needs matplotlib, pip install 'tdaengine[plot]'") from error
    return Figure(figsize=size, layout="constrained")
