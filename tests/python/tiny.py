"""Tiny checkpoints with random weights, the same on every machine: one per thing a config can say.

Values are such that activations stay near 1 in size, logits differ well, and every tensor, norms
and biases included, has its effect on them.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Scaled RoPE starts from this context, short, so that tests get beyond it cheaply.
ORIGINAL = 32
CONTEXT = 128
LENGTH = 80  # tokens()

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
GEMMA = {
    "head_dim": 16,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,
    "sliding_window": 12,
    "tie_word_embeddings": True,
}
GEMMA2 = GEMMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "num_hidden_layers": 3,
    "attn_logit_softcapping": 2.0,  # caps that change much
    "final_logit_softcapping": 5.0,
}
GEMMA3 = GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
}
OLMO2 = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
GRANITE = {
    "architectures": ["GraniteForCausalLM"],
    "model_type": "granite",
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.6,
}
LONGROPE = {  # factors far apart, so that those of the wrong side show
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0],
    "long_factor": [1.5, 2.5, 4.0, 6.0, 8.0, 9.5],
}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0}
SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "pad_token_id": 0}


@dataclass(frozen=True)
class Variant:
    config: dict = field(default_factory=dict)  # what differs from BASE
    storage: str = "F32"
    shards: int = 1


def _scaled(rope_type: str, factor: float = 4.0, **more: object) -> Variant:
    if rope_type in ("llama3", "yarn"):
        more["original_max_position_embeddings"] = ORIGINAL
    return Variant({"rope_scaling": {"rope_type": rope_type, "factor": factor, **more}})


VARIANTS = {
    "llama": Variant(),
    "llama_tied": Variant({"tie_word_embeddings": True}),
    "llama_bias": Variant({"attention_bias": True}),
    "llama_gelu": Variant({"hidden_act": "gelu", "num_key_value_heads": 4}),
    "llama_gelu_tanh": Variant({"hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 3}),
    "llama_relu": Variant({"hidden_act": "relu", "num_key_value_heads": 1}),
    "llama_odd": Variant(
        {
            "vocab_size": 97,
            "hidden_size": 36,
            "intermediate_size": 50,
            "num_attention_heads": 6,
            "head_dim": 6,
        }
    ),
    "llama_sharded": Variant(shards=3),
    "llama_f16": Variant(storage="F16"),
    "llama_bf16": Variant(storage="BF16"),
    "linear": _scaled("linear"),
    "dynamic": Variant(
        {
            "max_position_embeddings": ORIGINAL,  # what dynamic scaling starts from
            "rope_scaling": {"type": "dynamic", "factor": 2.0},  # the old name of rope_type
        }
    ),
    "llama3": _scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": _scaled("yarn"),
    "yarn_mscale": _scaled("yarn", mscale=0.8, mscale_all_dim=0.5),
    "yarn_untruncated": _scaled("yarn", beta_fast=4.0, beta_slow=0.5, truncate=False),
    "yarn_attention_factor": Variant(
        {
            "rope_theta": None,
            "rope_parameters": {  # as transformers 5 writes it
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": ORIGINAL,
                "attention_factor": 1.3,
            },
        }
    ),
    "mistral_sliding": Variant({**MISTRAL, "sliding_window": 16}),
    "mistral_full": Variant({**MISTRAL, "sliding_window": None, "head_dim": 8}),
    "qwen2": Variant(QWEN2),
    "qwen2_sliding": Variant(
        {
            **QWEN2,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
        }
    ),
    "qwen3": Variant(QWEN3),
    "gemma2": Variant(GEMMA2),
    "gemma2_layer_types": Variant(
        {
            **GEMMA2,
            "attention_bias": True,
            "layer_types": ["full_attention", *["sliding_attention"] * 2],
            "attn_logit_softcapping": None,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
            "rope_theta": None,
        },
        storage="BF16",
    ),
    "gemma2_defaults": Variant(
        {
            **{k: v for k, v in GEMMA2.items() if not k.endswith("softcapping")},
            "query_pre_attn_scalar": 5,  # scores large enough for the default cap to matter
        }
    ),
    "gemma3": Variant(  # as transformers 4 writes it
        {
            **GEMMA3,
            "rope_theta": 50000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 3,
        }
    ),
    "gemma3_layer_types": Variant(  # as transformers 5 does
        {
            **GEMMA3,
            "rope_theta": None,
            "attention_bias": True,
            "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 20000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        }
    ),
    "gemma3_defaults": Variant({**GEMMA3, "num_hidden_layers": 7, "rope_theta": None}),
    "olmo2": Variant(OLMO2),
    "granite": Variant(GRANITE),
    "granite_tied": Variant({**GRANITE, "attention_bias": True, "tie_word_embeddings": True}),
    "phi3": Variant(PHI3),
    "phi3_sliding": Variant({**PHI3, "sliding_window": 16}, storage="BF16"),
    "phi3_longrope": Variant(
        {
            **PHI3,
            "original_max_position_embeddings": ORIGINAL,
            "rope_scaling": {"type": "longrope", **LONGROPE},
        }
    ),
    "phi3_longrope_parameters": Variant(  # as transformers 5 writes it
        {
            **PHI3,
            "original_max_position_embeddings": ORIGINAL,
            "sliding_window": 24,
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "longrope",
                **LONGROPE,
                "rope_theta": 500.0,
                "factor": 3.0,
                "attention_factor": 1.2,
                "original_max_position_embeddings": ORIGINAL,
            },
        }
    ),
    "smollm3": Variant({**SMOLLM3, "num_hidden_layers": 5, "rope_theta": None}),
    "smollm3_listed": Variant({**SMOLLM3, "no_rope_layers": [0, 1]}),
}


def config_of(name: str) -> dict:
    """config.json of a variant; its None takes a key of BASE away."""
    config = {**BASE, **VARIANTS[name].config}
    return {key: v for key, v in config.items() if v is not None or key not in BASE}


def write(folder: Path, name: str) -> Path:
    """Writes the checkpoint VARIANTS[name] to `folder`, which is made, and returns it."""
    variant = VARIANTS[name]
    folder.mkdir(parents=True)
    config = config_of(name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = make_weights(config, seed=zlib.crc32(name.encode()))
    if variant.shards == 1:
        write_safetensors(folder / "model.safetensors", weights, variant.storage)
        return folder
    weight_map = {}
    for i in range(variant.shards):
        shard = f"model-{i + 1:05}-of-{variant.shards:05}.safetensors"
        part = dict(list(weights.items())[i :: variant.shards])
        write_safetensors(folder / shard, part, variant.storage)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def longrope_switch(config: Any) -> int | None:
    """How many tokens a text has before its keys are computed anew, by transformers' config."""
    rope = config.rope_parameters or {}
    longrope = rope.get("rope_type") == "longrope"
    return rope["original_max_position_embeddings"] if longrope else None


def tokens(name: str, length: int = LENGTH) -> list[int]:
    """A random text for the variant."""
    vocab = {**BASE, **VARIANTS[name].config}["vocab_size"]
    return np.random.RandomState(1).randint(0, vocab, length).tolist()


def make_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """All tensors by their Hugging Face names, f32."""
    random = np.random.RandomState(seed)  # whose stream NumPy keeps as it is for good
    hidden, neurons = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    family = config["model_type"]
    qkv_bias = family == "qwen2" or config.get("attention_bias", False)
    gemma = family in ("gemma2", "gemma3_text")
    pre_norms, post_norms = family != "olmo2", gemma or family == "olmo2"
    offset = 0 if gemma else 1  # Gemma stores weights of norms less 1
    result = {}

    def matrix(name: str, rows: int, cols: int, gain: float) -> None:
        values = random.standard_normal((rows, cols)) * gain / np.sqrt(cols)
        result[f"{name}.weight"] = values.astype(np.float32)

    def norm(name: str, size: int) -> None:
        result[f"{name}.weight"] = (offset + 0.3 * random.standard_normal(size)).astype(np.float32)

    def bias(name: str, size: int) -> None:
        result[f"{name}.bias"] = (0.3 * random.standard_normal(size)).astype(np.float32)

    matrix("model.embed_tokens", config["vocab_size"], hidden, gain=2.5)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        if pre_norms:
            norm(f"{prefix}.input_layernorm", hidden)
        projections = {"q": heads, "k": kv_heads, "v": kv_heads}
        if family == "phi3":
            projections = {"qkv": heads + 2 * kv_heads}
        for part, rows in projections.items():
            matrix(f"{prefix}.self_attn.{part}_proj", rows * head_dim, hidden, gain=1.5)
            if qkv_bias:
                bias(f"{prefix}.self_attn.{part}_proj", rows * head_dim)
        matrix(f"{prefix}.self_attn.o_proj", hidden, heads * head_dim, gain=1.0)
        if family != "qwen2" and qkv_bias:
            bias(f"{prefix}.self_attn.o_proj", hidden)
        if family in ("qwen3", "gemma3_text", "olmo2"):
            norm(f"{prefix}.self_attn.q_norm", head_dim * (heads if family == "olmo2" else 1))
            norm(f"{prefix}.self_attn.k_norm", head_dim * (kv_heads if family == "olmo2" else 1))
        norm(f"{prefix}.post_attention_layernorm", hidden)
        if post_norms:
            if pre_norms:
                norm(f"{prefix}.pre_feedforward_layernorm", hidden)
            norm(f"{prefix}.post_feedforward_layernorm", hidden)
        if family == "phi3":
            matrix(f"{prefix}.mlp.gate_up_proj", 2 * neurons, hidden, gain=1.5)
        else:
            matrix(f"{prefix}.mlp.gate_proj", neurons, hidden, gain=1.5)
            matrix(f"{prefix}.mlp.up_proj", neurons, hidden, gain=1.5)
        matrix(f"{prefix}.mlp.down_proj", hidden, neurons, gain=1.0)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], hidden, gain=2.5)
    return result


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], storage: str) -> None:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tensors.items():
        begin = len(data)
        if storage == "BF16":  # cut off, not rounded: the stored value is the value
            data += (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            data += values.astype({"F32": "<f4", "F16": "<f2"}[storage]).tobytes()
        header[name] = {
            "dtype": storage,
            "shape": values.shape,
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
