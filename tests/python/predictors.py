"""Files of predictors, and in NumPy what a predictor chooses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdaengine import Engine

Layers = Sequence[dict[str, np.ndarray]]  # first, second and, with experts, expert_of


def make_layers(engine: Engine, rank: int, experts: int = 0, seed: int = 0) -> Layers:
    """Random ones; f32 numbers that bf16 holds exactly."""
    random = np.random.RandomState(seed)
    hidden, neurons = engine.config.hidden_size, engine.config.intermediate_size
    layers = []
    for _ in range(engine.config.num_layers):
        layer = {
            "first": cut(random.standard_normal((rank, hidden))),
            "second": cut(random.standard_normal((experts or neurons, rank))),
        }
        if experts:
            expert_of = np.arange(neurons, dtype=np.int32) % experts
            layer["expert_of"] = random.permutation(expert_of)
        layers.append(layer)
    return layers


def cut(values: np.ndarray) -> np.ndarray:
    """To what bf16 has room for."""
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def write(path: Path, engine: Engine, layers: Layers, /, **changed: Any) -> Path:
    """changed: metadata that says something else than what is true."""
    first = layers[0]
    fields = {
        "version": 1,
        "model": engine.path.name,
        "fingerprint": engine.fingerprint,
        "rank": first["first"].shape[0],
        "layers": len(layers),
        "experts": first["second"].shape[0] if "expert_of" in first else 0,
    }
    metadata = {"tdaengine-predictor": json.dumps(fields | changed)}
    header: dict[str, object] = {"__metadata__": metadata}
    data = b""
    for i, layer in enumerate(layers):
        for name, values in layer.items():
            bf16 = values.dtype == np.float32
            stored = (values.view(np.uint32) >> 16).astype("<u2") if bf16 else values.astype("<i4")
            header[f"layers.{i}.{name}"] = {
                "dtype": "BF16" if bf16 else "I32",
                "shape": values.shape,
                "data_offsets": [len(data), len(data) + stored.nbytes],
            }
            data += stored.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def chosen(layer: dict[str, np.ndarray], x: np.ndarray, count: int) -> np.ndarray:
    """[T, F] Which neurons are computed for the tokens x [T, H], in f64."""
    hidden = x @ layer["first"].T.astype(np.float64)
    if "expert_of" in layer:
        hidden = np.tanh(hidden / np.linalg.norm(x, axis=1, keepdims=True))
    scores = hidden @ layer["second"].T.astype(np.float64)
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-scores, axis=1)[:, :count], True, axis=1)
    return kept[:, layer["expert_of"]] if "expert_of" in layer else kept
