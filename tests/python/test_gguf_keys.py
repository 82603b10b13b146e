"""convert from GGUF: keys that change results mean what they mean to llama.cpp, or are refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_gguf
from converting import read_json, refused
from reference import Reference
from tiny_gguf import divisors

from tdaengine import CheckpointError, Engine
from tdaengine.convert import convert

CONFIG = tiny.BASE
HEAD_DIM = 12
ROPE = "llama.rope."
SCALING = "llama.rope.scaling."


def write(folder: Path, metadata: dict | None = None, config: dict = CONFIG, **more) -> Path:
    weights = tiny.make_weights(config, seed=1)
    return tiny_gguf.write(folder / "model.gguf", config, weights, metadata, **more)


class GgmlReference(Reference):
    """The model with RoPE as ggml computes it, pair by pair."""

    base, scale, yarn, attention, context = 10000.0, 1.0, False, 1.0, tiny.CONTEXT
    beta_fast, beta_slow = 32.0, 1.0
    divisors = np.ones(HEAD_DIM // 2)

    def corner(self, turns: float) -> float:
        """The pair that turns so often within the original context."""
        return HEAD_DIM * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(self.base))

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        half = HEAD_DIM // 2
        low = max(0, math.floor(self.corner(self.beta_fast)))
        high = min(HEAD_DIM - 1, math.ceil(self.corner(self.beta_slow)))
        size = self.attention * (1 + 0.1 * math.log(1 / self.scale) if self.yarn else 1)
        out = np.empty_like(x)
        for position in range(x.shape[1]):
            for i in range(half):
                angle = position * self.base ** (-2 * i / HEAD_DIM) / self.divisors[i]
                ramp = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
                share = ramp if self.yarn else 0.0
                angle = self.scale * angle * (1 - share) + angle * share
                cos, sin = size * math.cos(angle), size * math.sin(angle)
                a, b = x[:, position, i], x[:, position, i + half]
                out[:, position, i] = a * cos - b * sin
                out[:, position, i + half] = b * cos + a * sin
        return out


YARN = {f"{SCALING}type": "yarn", f"{SCALING}factor": 4.0}
YARN_32 = YARN | {f"{SCALING}original_context_length": 32}
AS_YARN_32 = {"yarn": True, "scale": 0.25, "context": 32}


@pytest.mark.parametrize(
    ("metadata", "meaning"),
    [
        ({}, {}),
        ({f"{ROPE}freq_base": 500.0}, {"base": 500.0}),
        ({f"{SCALING}factor": 4.0}, {"scale": 0.25}),  # without a type: linear
        ({f"{SCALING}type": "linear", f"{SCALING}factor": 4.0}, {"scale": 0.25}),
        ({f"{ROPE}scale_linear": 4.0}, {"scale": 0.25}),  # its name in older files
        ({f"{ROPE}scale_linear": 4.0, f"{SCALING}factor": 2.0}, {"scale": 0.5}),
        ({f"{SCALING}type": "none", f"{SCALING}factor": 4.0}, {}),
        ({f"{SCALING}type": "linear", f"{SCALING}factor": 0.0}, {}),
        ({f"{SCALING}type": "linear"}, {}),
        ({f"{SCALING}type": "yarn"}, {}),
        ({f"{SCALING}attn_factor": 1.0, f"{SCALING}yarn_beta_fast": 8.0}, {}),
        (YARN_32, AS_YARN_32),
        (YARN, {"yarn": True, "scale": 0.25}),  # from the context that the file states
        (
            YARN_32 | {f"{SCALING}attn_factor": 0.75, f"{SCALING}yarn_ext_factor": 1.0},
            AS_YARN_32 | {"attention": 0.75},
        ),
        (
            YARN_32 | {f"{SCALING}yarn_beta_fast": 4.0, f"{SCALING}yarn_beta_slow": 0.5},
            AS_YARN_32 | {"beta_fast": 4.0, "beta_slow": 0.5},
        ),
        (YARN_32 | {f"{ROPE}scale_linear": 4.0, f"{SCALING}factor": None}, AS_YARN_32),
    ],
)
def test_rope(tmp_path: Path, metadata: dict, meaning: dict):
    convert(write(tmp_path, metadata), tmp_path / "out")
    check_logits(tmp_path / "out", **meaning)


def test_rope_divisors(tmp_path: Path):
    source = write(tmp_path, tensors={"rope_freqs.weight": divisors(8)})
    convert(source, tmp_path / "out")
    check_logits(tmp_path / "out", divisors=divisors(8).astype(float))


def check_logits(folder: Path, **meaning: object) -> None:
    reference = GgmlReference(folder)
    for name, value in meaning.items():
        setattr(reference, name, value)
    tokens = tiny.tokens("llama")
    expected, found = reference.forward(tokens), Engine(folder).logits(tokens)
    assert np.abs(found - expected).max() <= 1e-4


OFF = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "use_parallel_residual": False,
    "tensor_data_layout": "Meta AI original pth",
    "vocab_size": 96,
    "embedding_length_out": 48,
    "attention.key_length": 12,
    "attention.value_length": 12,
    "rope.dimension_count": 12,
    "rope.freq_base_swa": 10000.0,
    "rope.scaling.alpha": 0.0,
    "rope.scaling.finetuned": True,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_ext_factor": -1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "attention.layer_norm_epsilon": 1e-3,
    "pooling_type": 3,
}


def test_values_that_change_nothing(tmp_path: Path):
    metadata = {f"llama.{key}": value for key, value in OFF.items()}
    metadata |= {
        "general.type": "model",
        "general.quantization_version": 2,
        "general.file_type": 0,
        "llama.attention.head_count": [4, 4],
        "llama.attention.head_count_kv": [2, 2],
        "llama.feed_forward_length": [80, 80],
        "gemma.attention.causal": False,
    }
    convert(write(tmp_path, metadata), tmp_path / "out")
    check_logits(tmp_path / "out")
    (tmp_path / "scaled").mkdir()
    metadata = {"llama.attention.scale": 1 / math.sqrt(HEAD_DIM)}
    convert(write(tmp_path / "scaled", metadata), tmp_path / "scaled" / "out")
    check_logits(tmp_path / "scaled" / "out")


FACTORS = {"tensors": {"rope_freqs.weight": divisors(8)}}


@pytest.mark.parametrize(
    ("metadata", "more"),
    [
        ({"llama.attention.causal": False}, {}),
        ({"llama.attention.clamp_kqv": 8.0}, {}),
        ({"llama.attention.max_alibi_bias": 8.0}, {}),
        ({"llama.attention.scale": 0.5}, {}),
        ({"llama.attention.temperature_scale": 0.1}, {}),
        ({"llama.attention.sliding_window_pattern": 6}, {}),
        ({"llama.attention.sliding_window_pattern": [True, False]}, {}),
        ({"llama.attention.key_length_mla": 12}, {}),
        ({"llama.attention.value_length": 16}, {}),
        ({"llama.attention.q_lora_rank": 8}, {}),
        ({"llama.attention.head_count": [4, 2]}, {}),
        ({"llama.attn_logit_softcapping": 50.0}, {}),
        ({"llama.final_logit_softcapping": 30.0}, {}),
        ({"llama.logit_scale": 0.5}, {}),
        ({"llama.residual_scale": 0.5}, {}),
        ({"llama.embedding_scale": 12.0}, {}),
        ({"llama.expert_count": 8}, {}),
        ({"llama.nextn_predict_layers": 1}, {}),
        ({"llama.use_parallel_residual": True}, {}),
        ({"llama.tensor_data_layout": "another"}, {}),
        ({"llama.vocab_size": 95}, {}),
        ({"llama.rope.dimension_count": 6}, {}),
        ({"llama.rope.dimension_sections": [4, 4, 4, 0]}, {}),
        ({"llama.rope.freq_base_swa": 500.0}, {}),
        ({"llama.rope.freq_base": math.nan}, {}),
        ({f"{SCALING}factor": -4.0}, {}),
        ({f"{SCALING}factor": np.float64(1e300)}, {}),
        ({f"{SCALING}factor": math.inf}, {}),
        ({f"{SCALING}type": "longrope"}, {}),
        ({f"{SCALING}alpha": 1000.0}, {}),
        ({f"{SCALING}attn_factor": 0.75}, {}),
        ({f"{SCALING}attn_factor": 0.75, f"{SCALING}factor": 4.0}, {}),
        ({f"{SCALING}attn_factor": 0.75}, FACTORS),
        ({f"{SCALING}factor": 4.0}, FACTORS),
        (dict(reversed(YARN.items())), FACTORS),
        ({f"{SCALING}yarn_ext_factor": 0.5}, {}),
        ({f"{SCALING}yarn_ext_factor": 0.0, **YARN}, {}),
        ({f"{SCALING}yarn_log_multiplier": 0.1}, {}),
        ({f"{SCALING}yarn_attn_factor": 2.0}, {}),
        ({"llama.of_the_future": 1}, {}),
        ({"general.type": "adapter"}, {}),
        ({"general.quantization_version": 1}, {}),
    ],
)
def test_values_that_change_results_are_refused(tmp_path: Path, metadata: dict, more: dict):
    source = write(tmp_path, metadata, **more)
    refused(source, tmp_path / "parent", CheckpointError, str(source), next(iter(metadata)))


def test_rope_divisors_of_other_architectures_are_refused(tmp_path: Path):
    config = CONFIG | tiny.VARIANTS["qwen3"].config
    source = write(tmp_path, config=config, **FACTORS)
    refused(source, tmp_path / "parent", CheckpointError, "rope_freqs.weight", "unknown")


@pytest.mark.parametrize("tied", [False, True])
def test_a_stored_head_is_used(tmp_path: Path, tied: bool):
    """Whether the model once was tied: what counts is the tensor."""
    config = CONFIG | {"tie_word_embeddings": tied}
    head = np.random.default_rng(5).normal(size=(96, 48)).astype(np.float32)
    weights = tiny.make_weights(config, seed=1)
    weights.pop("lm_head.weight", None)
    more = {"output.weight": head}
    source = tiny_gguf.write(tmp_path / "model.gguf", config, weights, tensors=more)
    convert(source, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    check_logits(tmp_path / "out")
    assert np.array_equal(Reference(tmp_path / "out").weights["lm_head"], head)
