"""Trains what tells from a token's x which feed-forward neurons matter to it: a predictor of single
neurons (DejaVu), or of groups of neurons, called experts (MoEfication). How the engine uses them is
said in cpp/sparsity/predictor.h. Needs PyTorch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found,unused-ignore]
from numpy.typing import NDArray
from safetensors.torch import save  # type: ignore[import-not-found,unused-ignore]

from ._native import OptionError
from .analyze import active_sets
from .engine import Engine
from .evaluate import digest
from .files import check_output, write
from .training_state import State, Tensors, named

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of neurons chosen, at which recall is told
BATCH = 512  # tokens
SAVE_SECONDS = 30.0  # between two states that a training which is stopped goes on from

Floats = NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Recipe:
    """rank: between the two matrices. experts: how many MoEfication makes of a layer's neurons,
    the same number; 0 for DejaVu.
    active: the share of neurons that counts as active, those of the largest |n[t,j]|."""

    rank: int = 128
    experts: int = 0
    active: float = 0.5
    epochs: int = 20
    max_tokens: int = 512  # of each text
    seed: int = 0


@dataclass
class Samples:
    """What the engine computed in one layer for some texts."""

    x: torch.Tensor  # [T, H] bf16
    active: NDArray[np.uint8]  # [T, F / 8] bits: the active neurons
    sizes: torch.Tensor | None  # [T, E] the experts' contributions, relative to the token's largest

    def active_of(self, tokens: Any, neurons: int) -> torch.Tensor:
        bits = np.unpackbits(self.active[tokens], axis=1, count=neurons)
        return torch.from_numpy(bits).float()


def train(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    output: Path,
    recipe: Recipe,
    *,
    save_seconds: float = SAVE_SECONDS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains on nine tenths of the texts, writes the predictor's file to `output`, and returns its
    recall and precision on the other tenth. progress(done, total) counts texts, then the layers'
    epochs.

    A training that was stopped goes on where it was, from `output` with .training behind its name,
    and gives the same file. Raises OptionError.
    """
    _check(engine, texts, recipe)
    check_output(output)
    layers, neurons = engine.config.num_layers, engine.config.intermediate_size
    header = {
        "fingerprint": engine.fingerprint,
        "weights": engine.weights,
        "texts": digest([list(text) for text in texts]),
        **asdict(recipe),
    }
    state = State.open(Path(f"{output}.training"), header, save_seconds)
    groups = [
        state.expert_of(layer) if recipe.experts else None  # so that they need no second search
        for layer in range(layers)
    ]
    for layer in range(layers) if recipe.experts else ():
        if groups[layer] is None:
            groups[layer] = balanced_clusters(engine.gate(layer), recipe.experts, recipe.seed)

    held_out = max(1, len(texts) // 10)
    total = len(texts)
    tell = progress or (lambda done, total: None)
    learnt = gather(engine, texts[held_out:], groups, recipe, lambda n: tell(n, total))
    judged = gather(
        engine, texts[:held_out], groups, recipe, lambda n: tell(len(texts) - held_out + n, total)
    )
    for layer in range(len(state.done), layers):
        start = _initial(engine, layer, groups[layer], recipe)
        tensors = _fit(learnt[layer], start, layer, neurons, recipe, state, tell, layers)
        state.finish(tensors)
    rounded = [_rounded(tensors) for tensors in state.done]
    write(output, save(named(rounded), _metadata(engine, recipe)))
    state.path.unlink(missing_ok=True)
    return _judge(judged, state.done, neurons, recipe)


def _check(engine: Engine, texts: Sequence[Sequence[int]], recipe: Recipe) -> None:
    neurons = engine.config.intermediate_size
    if not engine.device.startswith("cpu") or engine.weights in ("graded", "int4"):
        raise OptionError(
            f"training: found {engine.device} and {engine.weights} weights, expected the CPU and "
            "f32, bf16, bf16c or int8 weights"
        )
    if len(texts) < 2:
        raise OptionError(f"texts: found {len(texts)}, expected 2 or more, one to test the others")
    for name in ("rank", "epochs", "max_tokens"):
        if getattr(recipe, name) < 1:
            raise OptionError(f"{name} {getattr(recipe, name)}: expected 1 or more")
    if not 0 < round(recipe.active * neurons) < neurons:
        raise OptionError(
            f"active {recipe.active}: expected more than no and fewer than all neurons"
        )
    if recipe.experts and not 2 <= recipe.experts <= neurons:
        raise OptionError(f"experts {recipe.experts}: expected 2 to {neurons}, one for each neuron")


# ---- what the engine computes --------------------------------------------------------------------


def gather(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    groups: Sequence[NDArray[np.int32] | None],
    recipe: Recipe,
    progress: Callable[[int], None],
) -> list[Samples]:
    """Of every layer the samples of all tokens. They take 2 H + F / 8 (+ 4 E) bytes each."""
    neurons = engine.config.intermediate_size
    count = round(recipe.active * neurons)
    parts: list[list[Samples]] = [[] for _ in groups]
    for i, text in enumerate(texts):
        ids = list(text[: recipe.max_tokens])
        session = engine.session(len(ids), sample_tokens=len(ids))
        session.prefill(ids)
        for layer, expert_of in enumerate(groups):
            contributions = session.contributions(layer)
            sizes = None
            if expert_of is not None:
                members = np.eye(recipe.experts, dtype=np.float32)[expert_of]
                sums = contributions @ members
                sizes = torch.from_numpy(sums / np.maximum(sums.max(1, keepdims=True), 1e-30))
            parts[layer].append(
                Samples(
                    torch.from_numpy(session.ffn_inputs(layer)).bfloat16(),
                    np.packbits(active_sets(contributions, count), axis=1),
                    sizes,
                )
            )
        progress(i + 1)
    return [
        Samples(
            torch.cat([part.x for part in some]),
            np.concatenate([part.active for part in some]),
            torch.cat([part.sizes for part in some if part.sizes is not None])
            if groups[layer] is not None
            else None,
        )
        for layer, some in enumerate(parts)
    ]


# ---- experts -------------------------------------------------------------------------------------


def balanced_clusters(rows: Floats, count: int, seed: int, rounds: int = 20) -> NDArray[np.int32]:
    """k-means of the rows' directions, [F], with clusters whose sizes differ by at most one."""
    unit = _unit(rows)
    random = np.random.default_rng(seed)
    centres = unit[random.choice(len(unit), count, replace=False)]
    room = np.full(count, len(unit) // count)
    room[: len(unit) % count] += 1
    assigned = np.empty(0, dtype=np.int32)
    for _ in range(rounds):
        before, assigned = assigned, _assign(unit @ centres.T, room.copy())
        if np.array_equal(assigned, before):
            break
        centres = _centres(unit, assigned, count)
    return assigned


def _assign(likeness: Floats, room: NDArray[np.int64]) -> NDArray[np.int32]:
    """Each row to the most like cluster that has room; of those that want the same one, first come
    those that would lose most by their second choice."""
    assigned = np.full(len(likeness), -1, dtype=np.int32)
    left = np.arange(len(likeness))
    while len(left):
        own = likeness[left]
        best = own.argmax(axis=1)
        second, first = np.partition(own, -2, axis=1)[:, -2:].T
        order = np.argsort(second - first, kind="stable")
        for cluster in np.unique(best):
            taken = left[order[best[order] == cluster][: room[cluster]]]
            assigned[taken] = cluster
            room[cluster] -= len(taken)
            if room[cluster] == 0:
                likeness[:, cluster] = -np.inf
        left = left[assigned[left] < 0]
    return assigned


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return unit


def _centres(unit: Floats, assigned: NDArray[np.int32], count: int) -> Floats:
    members = np.eye(count, dtype=np.float32)[assigned]
    centres: Floats = (members.T @ unit) / members.sum(axis=0)[:, None]
    return centres


# ---- training ------------------------------------------------------------------------------------


def scores(tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """[T, F] of neurons, or [T, E] of experts. x: [T, H]"""
    hidden = x @ tensors["first"].T
    if "expert_of" in tensors:
        hidden = torch.tanh(hidden / x.norm(dim=1, keepdim=True).clamp_min(1e-30))
    return hidden @ tensors["second"].T


def _initial(
    engine: Engine, layer: int, expert_of: NDArray[np.int32] | None, recipe: Recipe
) -> Tensors:
    """DejaVu: random, as PyTorch's linear layers. MoEfication: the experts' mean directions."""
    if expert_of is not None:
        centres = _centres(_unit(engine.gate(layer)), expert_of, recipe.experts)
        return {
            "first": torch.from_numpy(centres),
            "second": torch.eye(recipe.experts),
            "expert_of": torch.from_numpy(expert_of),
        }
    hidden, neurons = engine.config.hidden_size, engine.config.intermediate_size
    random = np.random.default_rng([recipe.seed, layer])

    def uniform(rows: int, columns: int) -> torch.Tensor:
        most = 1 / math.sqrt(columns)
        return torch.from_numpy(random.uniform(-most, most, (rows, columns)).astype(np.float32))

    return {"first": uniform(recipe.rank, hidden), "second": uniform(neurons, recipe.rank)}


def _fit(
    samples: Samples,
    tensors: Tensors,
    layer: int,
    neurons: int,
    recipe: Recipe,
    state: State,
    progress: Progress,
    layers: int,
) -> Tensors:
    """Binary cross-entropy, AdamW or (MoEfication) Adam, as published; the rate falls to 0."""
    trained = [tensors[name].requires_grad_() for name in ("first", "second")]
    if recipe.experts:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(trained, lr=0.01)
    else:
        optimizer = torch.optim.AdamW(trained, lr=0.001, weight_decay=0.01)
    rate = optimizer.param_groups[0]["lr"]
    tokens = len(samples.x)
    steps = math.ceil(tokens / BATCH)  # of an epoch
    step = state.resume(trained, optimizer)
    for epoch in range(step // steps, recipe.epochs):
        order = np.random.default_rng([recipe.seed, layer, epoch]).permutation(tokens)
        for first in range(0, tokens, BATCH):
            chosen = order[first : first + BATCH]
            wanted = (
                samples.active_of(chosen, neurons)
                if samples.sizes is None
                else samples.sizes[chosen]
            )
            done = step / (steps * recipe.epochs)
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
            found = scores(tensors, samples.x[chosen].float())
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(found, wanted)
            loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
            optimizer.step()
            step += 1
        progress(layer * recipe.epochs + epoch + 1, layers * recipe.epochs)
        state.pause(trained, optimizer, step)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _metadata(engine: Engine, recipe: Recipe) -> dict[str, str]:
    """One key, as safetensors writes several in any order."""
    fields = {
        "version": 1,
        "model": engine.path.name,
        "fingerprint": engine.fingerprint,
        "layers": engine.config.num_layers,
        **asdict(recipe),
    }
    return {"tdaengine-predictor": json.dumps(fields)}


# ---- what it is worth ----------------------------------------------------------------------------


def _rounded(tensors: Tensors) -> Tensors:
    """As the file has them."""
    return {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _judge(
    samples: Sequence[Samples], layers: Sequence[Tensors], neurons: int, recipe: Recipe
) -> dict[str, Any]:
    """recall: of the active neurons the share that is chosen; precision: of those chosen the share
    that is active. Of each share of SHARES a list with one number per layer."""
    of = recipe.experts or neurons
    counts = [max(1, round(share * of)) for share in SHARES]
    names = ("recall", "precision", "best_recall") if recipe.experts else ("recall", "precision")
    figures: dict[str, list[list[float]]] = {name: [[] for _ in counts] for name in names}
    for own, tensors in zip(samples, layers, strict=True):
        active = own.active_of(slice(None), neurons).numpy() > 0
        rounded = {name: tensor.float() for name, tensor in _rounded(tensors).items()}
        found = scores(rounded, own.x.float()).numpy()
        groups = tensors["expert_of"].numpy() if recipe.experts else np.arange(neurons)
        for i, count in enumerate(counts):
            chosen = active_sets(found, count)[:, groups]
            both = float((chosen & active).sum())
            figures["recall"][i].append(both / float(active.sum()))
            figures["precision"][i].append(both / float(chosen.sum()))
            if own.sizes is not None:
                best = active_sets(own.sizes.numpy(), count)[:, groups]
                figures["best_recall"][i].append(float((best & active).sum() / active.sum()))
    return {
        "tokens": len(samples[0].x),
        "active": round(recipe.active * neurons) / neurons,
        "shares": [count / of for count in counts],
        **figures,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures' means over the layers, as markdown; `best` is what a router that knew all
    contributions would reach with the same experts."""
    best = figures.get("best_recall")
    lines = [
        f"{figures['tokens']} tokens of texts not trained on; active: the largest "
        f"{figures['active']:.2f} of the neurons\n",
        "| neurons chosen | recall | precision |" + (" best recall |" if best else ""),
        "|---|---|---|" + ("---|" if best else ""),
    ]
    for i, share in enumerate(figures["shares"]):
        names = ("recall", "precision", *(("best_recall",) if best else ()))
        means = (f"{np.mean(figures[name][i]):.3f}" for name in names)
        lines.append(f"| {share:.2f} | " + " | ".join(means) + " |")
    return "\n".join(lines)
