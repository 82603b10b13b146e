"""LLaMA and TDA once more, in NumPy and f64, written for clarity: what tests compare with.

Knows model types llama and qwen2 without RoPE scaling and sliding window, stored as f32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import erf
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: (
        x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    ),
    "relu": lambda x: np.maximum(x, 0),
}


class Reference:
    """A model. `forward` also leaves every layer's FFN activations in `h`: [L][T, F]."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.weights = {
            name.removesuffix(".weight"): values.astype(np.float64)
            for name, values in tensors.items()
        }
        self.layers = range(self.config["num_hidden_layers"])
        self.heads = self.config["num_attention_heads"]
        self.head_dim = self.config.get("head_dim", self.config["hidden_size"] // self.heads)
        self.h: list[np.ndarray] = []
        # Which neurons [T, F] a layer uses for its inputs [T, H]; after `dense_tokens` of forward.
        self.choose: Callable[[int, np.ndarray], np.ndarray] | None = None
        self.cached: Callable[[np.ndarray], np.ndarray] = lambda v: v  # keys, values [heads, T, d]

    def down(self, layer: int) -> np.ndarray:
        """[F, H]: what each neuron contributes at activation 1."""
        return self.weights[f"model.layers.{layer}.mlp.down_proj"].T

    def forward(
        self,
        tokens: list[int],
        masks: list[np.ndarray] | None = None,
        dense_tokens: int = 0,
        thresholds: list[float] | None = None,
        by_gate: bool = False,
    ) -> np.ndarray:
        """Logits [T, V]. After the first dense_tokens, layer l uses the neurons masks[l] alone, or
        those whose |h| * ||down|| (or |act(gate)|) reaches thresholds[l] for the token."""
        self.h, self.gates, self.inputs = [], [], []
        embedding = self.weights["model.embed_tokens"]
        x = embedding[tokens]
        for layer in self.layers:
            prefix = f"model.layers.{layer}"
            x = x + self._attention(self._norm(x, f"{prefix}.input_layernorm"), prefix)
            y = self._norm(x, f"{prefix}.post_attention_layernorm")
            act = ACTIVATIONS[self.config["hidden_act"]]
            gate, up = (self.weights[f"{prefix}.mlp.{part}_proj"] for part in ("gate", "up"))
            open_gates = act(y @ gate.T)
            h = open_gates * (y @ up.T)
            self.h.append(h)
            self.gates.append(open_gates)
            self.inputs.append(y)
            if masks is not None:
                kept = np.zeros(h.shape, bool)
                kept[:dense_tokens] = True
                kept[dense_tokens:, masks[layer]] = True
                h = np.where(kept, h, 0)
            if self.choose is not None:
                kept = self.choose(layer, y)
                kept[:dense_tokens] = True
                h = np.where(kept, h, 0)
            if thresholds is not None:
                sizes = np.linalg.norm(self.down(layer), axis=1)
                estimates = np.abs(open_gates) if by_gate else np.abs(h) * sizes
                estimates[:dense_tokens] = np.inf
                h = np.where(estimates >= thresholds[layer], h, 0)
            x = x + h @ self.down(layer)
        head = embedding if self.config["tie_word_embeddings"] else self.weights["lm_head"]
        return self._norm(x, "model.norm") @ head.T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[name]

    def _attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        def project(part: str, x: np.ndarray) -> np.ndarray:
            name = f"{prefix}.self_attn.{part}_proj"
            return x @ self.weights[name].T + self.weights.get(f"{name}.bias", 0)

        def split(y: np.ndarray) -> np.ndarray:  # [T, n * d] -> [heads, T, d]
            y = y.reshape(len(x), -1, self.head_dim).swapaxes(0, 1)
            return y.repeat(self.heads // len(y), axis=0)

        q, k, v = (split(project(part, x)) for part in "qkv")
        q, k, v = self._rotate(q), self.cached(self._rotate(k)), self.cached(v)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(self.head_dim)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return project("o", (shares @ v).swapaxes(0, 1).reshape(len(x), -1))

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        half = self.head_dim // 2
        frequencies = self.config["rope_theta"] ** (-np.arange(half) / half)
        angles = np.arange(x.shape[1])[:, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def statistic(h: np.ndarray, down: np.ndarray) -> np.ndarray:
    """R [F] over the tokens of h [T, F]; down [F, H]."""
    sizes = np.abs(h) * np.linalg.norm(down, axis=1)
    shares = sizes / np.linalg.norm(sizes, axis=1, keepdims=True)
    return np.sqrt((shares**2).mean(0))


def cett(h: np.ndarray, down: np.ndarray, kept: np.ndarray) -> float:
    """Mean over the tokens of ||what is dropped|| / ||FFN||, with the neurons `kept`."""
    dropped = np.delete(np.arange(len(down)), kept)
    lost = np.linalg.norm(h[:, dropped] @ down[dropped], axis=1)
    return float((lost / np.linalg.norm(h @ down, axis=1)).mean())


def strongest(scores: np.ndarray, count: int) -> np.ndarray:
    """Ascending ids of the `count` neurons with the largest scores."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def last_counts_within(
    scores: np.ndarray, h: np.ndarray, down: np.ndarray, error: float
) -> list[int]:
    """All numbers of strongest neurons whose cett is within `error` while that of one neuron less
    is not: where a threshold search may end. One, if cett grows with the threshold."""
    errors = [cett(h, down, strongest(scores, count)) for count in range(len(scores) + 1)]
    return [n for n in range(1, len(errors)) if errors[n] <= error < errors[n - 1]]
