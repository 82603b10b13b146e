"""What the sets of active neurons of a model depend on."""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._native import OptionError
from .engine import Engine
from .evaluate import encode

DEFINITIONS = """\
A token's active set in a layer holds the given share of the F neurons, those of the largest
contributions |n[t,j]| = |h[t,j]| ||W_down[:,j]||. The mask of some tokens holds as many, those of
the largest relative magnitude R (the statistic of the sequence scope). The overlap of two of these
sets is the share of one that the other has, too. Chance gives that share itself, the same set 1.

Activation uncertainty, how the set depends on the history:
  next      a token's set and the next token's
  own       the mask of the prompt tokens and the set of one of them
  prompt    the same mask and the set of a later token, by its distance
  hindsight the mask that fits a text's later tokens best and the set of one of them: the bound of
            what any mask for all of them could do
  texts     the masks of two texts' prompts
Activation inertia, what stays active whatever the text means:
  shuffled  the mask of a prompt and that of its own tokens in random order
  always    the share of all neurons that nine of ten tokens of all texts have in their sets
  never     the share that fewer than one of ten has

Perplexity of the later tokens, relative to dense: with the mask of the prompt, and with the mask of
the very tokens that are scored, which no mask made beforehand is likely to beat.
"""

PARTS = 8  # of the tokens behind the prompt
TOLERABLE = 0.02  # a rise of perplexity up to which a mask is recommended

Floats = NDArray[np.float32]
Sets = NDArray[np.bool_]


def active_sets(values: Floats, count: int) -> Sets:
    """The `count` largest along the last axis, [..., F]."""
    largest = np.argpartition(values, -count, axis=-1)[..., -count:]
    sets = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(sets, largest, True, axis=-1)
    return sets


def mask(contributions: Floats, count: int) -> Sets:
    """The mask of these tokens, [F], from [T, F]: R as in tda/sparsity.h."""
    squares = contributions.astype(np.float64) ** 2
    totals = squares.sum(axis=1, keepdims=True)
    relative = np.divide(squares, totals, out=np.zeros_like(squares), where=totals > 0)
    return active_sets(relative.mean(axis=0), count)


def overlap(a: Sets, b: Sets) -> float:
    """Mean share of sets of equal size, [..., F], that they have in common."""
    return float((a & b).sum() / np.broadcast_arrays(a, b)[0].sum())


def analyze(
    engine: Engine,
    texts: Sequence[str | Sequence[int]],
    *,
    active: float = 0.5,
    prompt_tokens: int = 256,
    score_tokens: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The figures of DEFINITIONS, each as a list with one number per layer; `prompt` as a list of
    PARTS such lists, for equal parts of the score_tokens behind the prompt. `perplexity` has that
    of dense, and by how much the masks raise it, with the standard errors of that over the texts;
    None with graded and int4 weights, which take no masks.

    seed: of the shuffling. Raises OptionError for fewer than two texts, a text that is too short, a
    share of no neurons or of all.
    """
    layers, neurons = engine.config.num_layers, engine.config.intermediate_size
    count = round(active * neurons)
    if not 0 < count < neurons:
        raise OptionError(f"active {active}: expected more than no and fewer than all neurons")
    if prompt_tokens < 2 or score_tokens < PARTS:
        raise OptionError(
            f"prompt_tokens {prompt_tokens}, score_tokens {score_tokens}: expected at least 2 "
            f"and {PARTS}"
        )
    if len(texts) < 2:
        raise OptionError(f"texts: found {len(texts)}, expected at least 2 to compare")
    length = prompt_tokens + score_tokens
    encoded = encode(engine, texts, length)

    masks = np.zeros((len(texts), layers, neurons), dtype=bool)
    used = np.zeros((layers, neurons))  # how many tokens' sets a neuron is in
    scores = np.zeros((3, len(texts)))  # mean log-probabilities: dense, prompt, hindsight
    takes_masks = engine.weights not in ("graded", "int4")
    following, own, hindsight, shuffled = np.zeros((4, layers, len(texts)))
    prompt = np.zeros((PARTS, layers, len(texts)))
    for i, ids in enumerate(encoded):
        session = engine.session(length, sample_tokens=length)
        session.prefill(ids)
        mixed = engine.session(prompt_tokens, sample_tokens=prompt_tokens)
        mixed.prefill(random.Random(seed + i).sample(ids[:prompt_tokens], prompt_tokens))
        best = np.zeros((layers, neurons), dtype=bool)
        for layer in range(layers):
            contributions = session.contributions(layer)
            sets = active_sets(contributions, count)
            masks[i, layer] = mask(contributions[:prompt_tokens], count)
            used[layer] += sets.sum(axis=0)
            following[layer, i] = overlap(sets[:-1], sets[1:])
            own[layer, i] = overlap(masks[i, layer], sets[:prompt_tokens])
            later = sets[prompt_tokens:]
            best[layer] = mask(contributions[prompt_tokens:], count)
            fitting = active_sets(later.sum(axis=0), count)
            hindsight[layer, i] = overlap(fitting, later)
            for part, some in enumerate(np.array_split(later, PARTS)):
                prompt[part, layer, i] = overlap(masks[i, layer], some)
            shuffled[layer, i] = overlap(masks[i, layer], mask(mixed.contributions(layer), count))
        for kind, chosen in enumerate((None, masks[i], best) if takes_masks else ()):
            scores[kind, i] = _score(engine, ids, prompt_tokens, chosen)
        if progress:
            progress(i + 1, len(encoded))
    pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
    share = used / (length * len(texts))
    return {
        "compared": len(texts),
        "active": count / neurons,
        "next": following.mean(axis=1).tolist(),
        "own": own.mean(axis=1).tolist(),
        "prompt": prompt.mean(axis=2).tolist(),
        "hindsight": hindsight.mean(axis=1).tolist(),
        "texts": [
            float(np.mean([overlap(masks[i, layer], masks[j, layer]) for i, j in pairs]))
            for layer in range(layers)
        ],
        "shuffled": shuffled.mean(axis=1).tolist(),
        "always": (share >= 0.9).mean(axis=1).tolist(),
        "never": (share < 0.1).mean(axis=1).tolist(),
        "perplexity": _perplexity(scores) if takes_masks else None,
    }


def _score(engine: Engine, ids: Sequence[int], prompt_tokens: int, masks: Sets | None) -> float:
    """Mean log-probability of the tokens behind the prompt. masks: [L, F] or None"""
    session = engine.session(len(ids))
    logits = session.prefill(ids[:prompt_tokens])
    for layer, neurons in enumerate(() if masks is None else masks):
        session.set_mask(layer, np.flatnonzero(neurons))
    found = []
    for i, token in enumerate(ids[prompt_tokens:]):
        row = (session.decode(ids[prompt_tokens + i - 1]) if i else logits).astype(np.float64)
        row -= row.max()
        found.append(row[token] - np.log(np.exp(row).sum()))
    return float(np.mean(found))


def _perplexity(scores: NDArray[np.float64]) -> dict[str, Any]:
    """scores: [3, texts] mean log-probabilities of dense and two masks"""
    losses = scores[0] - scores[1:]
    errors = losses.std(axis=1, ddof=1) / np.sqrt(losses.shape[1])
    changes = np.expm1(losses.mean(axis=1))
    named = zip(("prompt", "hindsight"), changes.tolist(), errors.tolist(), strict=True)
    return {"dense": float(np.exp(-scores[0].mean()))} | {
        name: {"change": change, "error": error} for name, change, error in named
    }


def recommendation(figures: dict[str, Any], model: str, weights: str, cpu: bool) -> str:
    """What to try on this model, in a sentence with a command. weights, cpu: what was analyzed"""
    model = shlex.quote(model)
    same = f"{model} --weights {weights}"
    share, cost = f"{figures['active']:.2g}", figures["perplexity"]
    if cost is None:
        return (
            "What masks cost is told with weights that take them: "
            f"tdaengine analyze {model} --data TEXTS --weights int8"
        )
    prompt, hindsight = cost["prompt"]["change"], cost["hindsight"]["change"]
    if prompt <= TOLERABLE:
        return (
            f"Masks from the prompt hold here ({prompt:+.1%}): "
            f"tdaengine generate {model} PROMPT --weights {weights} --tda active={share}"
            + (",compact=true" if cpu else "")
        )
    if hindsight <= TOLERABLE:
        return (
            f"Masks could hold here ({hindsight:+.1%} in hindsight), those from the prompt do not "
            f"({prompt:+.1%}), so join them with a prior: tdaengine calibrate {same} --data "
            f"TEXTS -o FILE, then tdaengine evaluate {same} --data OTHERS "
            f"--tda active={share},thresholds=FILE"
        )
    return (
        f"No mask of {share} of the neurons is likely to hold here, as even that chosen in "
        f"hindsight costs {hindsight:+.1%}, so "
        + ("let every token choose" if cpu else "stay dense, or let every token choose on the CPU")
        + f": tdaengine generate {model} PROMPT --device cpu --weights graded --tda recommended"
    )


def table(figures: dict[str, Any]) -> str:
    """The figures as markdown."""
    rows = {
        "next": figures["next"],
        "own": figures["own"],
        "prompt, first part": figures["prompt"][0],
        "last part": figures["prompt"][-1],
        **{name: figures[name] for name in ("hindsight", "texts", "shuffled", "always", "never")},
    }
    lines = [
        f"{figures['compared']} texts, sets of {figures['active']:.2f} of the neurons (chance)\n",
        "| layer | " + " | ".join(rows) + " |",
        "|---" * (1 + len(rows)) + "|",
    ]
    layers = [*zip(*rows.values(), strict=True), [np.mean(row) for row in rows.values()]]
    for name, numbers in zip([*range(len(layers) - 1), "mean"], layers, strict=True):
        lines.append(f"| {name} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    cost = figures["perplexity"]
    if cost is None:
        return "\n".join(lines)
    lines += ["", "| mask of | perplexity |", "|---|---|", f"| dense | {cost['dense']:.2f} |"]
    for name in ("prompt", "hindsight"):
        change, error = cost[name]["change"], cost[name]["error"]
        lines.append(
            f"| {name} | {cost['dense'] * (1 + change):.2f} ({change:+.1%} ± {error:.1%}) |"
        )
    return "\n".join(lines)
