"""Reads a GGUF model: keys -> config.json, quantised tensors -> f32, vocabulary -> tokenizer.

What a key means, and what holds where it is absent, is as in llama.cpp. Every key of the model's
architecture is honoured, or has no effect on results, or is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ._native import CheckpointError
from .gguf_file import StoredTensor
from .gguf_metadata import Metadata, read_gguf_parts
from .gguf_tokenizer import tokenizer_files
from .source import Source, json_bytes
from .tensors import Tensor

ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}

# The parts of "blk.<layer>.<part>.<weight or bias>": their names, and the shape of the weight.
BLOCK_PARTS = {
    "attn_norm": ("input_layernorm", ("hidden",)),
    "attn_q": ("self_attn.q_proj", ("q", "hidden")),
    "attn_k": ("self_attn.k_proj", ("kv", "hidden")),
    "attn_v": ("self_attn.v_proj", ("kv", "hidden")),
    "attn_output": ("self_attn.o_proj", ("hidden", "q")),
    "attn_q_norm": ("self_attn.q_norm", ("head",)),
    "attn_k_norm": ("self_attn.k_norm", ("head",)),
    "ffn_norm": ("post_attention_layernorm", ("hidden",)),
    "ffn_gate": ("mlp.gate_proj", ("ffn", "hidden")),
    "ffn_up": ("mlp.up_proj", ("ffn", "hidden")),
    "ffn_down": ("mlp.down_proj", ("hidden", "ffn")),
}
HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
# Gemma has norms behind attention and feed-forward, too. GGUF adds 1 to the weights of all norms.
GEMMA_PARTS = {
    "post_attention_norm": ("post_attention_layernorm", ("hidden",)),
    "ffn_norm": ("pre_feedforward_layernorm", ("hidden",)),
    "post_ffw_norm": ("post_feedforward_layernorm", ("hidden",)),
}
GEMMA_PERIOD = 6  # of layers, the last of which has no sliding window
GEMMA_27B_LAYERS = 62  # whose attention scale is that of hidden / heads instead of the head's size
OUTER_PARTS = {
    "token_embd.weight": ("model.embed_tokens.weight", ("vocab", "hidden")),
    "output_norm.weight": ("model.norm.weight", ("hidden",)),
    "output.weight": ("lm_head.weight", ("vocab", "hidden")),
}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's frequency divisors; they go to config.json

# What Llama 3.1 and later state in config.json and GGUF doesn't keep.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Keys of features that the engine doesn't have, with the values that leave the feature off.
OFF = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (False,),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.yarn_attn_factor": (1,),
    "tensor_data_layout": ("Meta AI original pth",),  # neighbouring rows rotate together
}

# Keys without an effect on the logits of these architectures.
WITHOUT_EFFECT = (
    "attention.layer_norm_epsilon",  # of norms with a mean
    "pooling_type",  # of embeddings of whole texts
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",  # as the next two honoured with YaRN
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)


def read_gguf(path: Path) -> Source:
    """The checkpoint in a GGUF file, or in several that it is the first of. Raises
    CheckpointError."""
    file = read_gguf_parts(path)
    metadata = Metadata(file, tuple(ARCHITECTURES))
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f'{path}: tensor "token_embd.weight" is missing')
    config = _config(metadata, file.tensors)
    names = _names(metadata, file.tensors, config)
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    full = any(t.type.name == "F32" and len(t.shape) == 2 for t in file.tensors.values())
    files, generation = tokenizer_files(metadata)
    # A config.json without these would mean the defaults of its family.
    for key in ("bos_token_id", "eos_token_id"):
        config[key] = generation.get(key)
    files["generation_config.json"] = json_bytes(generation)
    metadata.refuse_unread(WITHOUT_EFFECT)
    tensors = [
        _tensor(metadata, target, file.tensors[name], heads) for name, target in names.items()
    ]
    return Source(config, tensors, {**files}, "F32" if full else "BF16")


def _tensor(metadata: Metadata, name: str, stored: StoredTensor, heads: tuple[int, int]) -> Tensor:
    rotated = re.search(r"\.attn_([qk])\.", stored.name)

    def read() -> np.ndarray:
        values = stored.read()
        if rotated and metadata.architecture == "llama":
            return _rows_in_halves(values, heads[rotated[1] == "k"])
        if metadata.architecture == "gemma3" and stored.name.endswith("norm.weight"):
            return values - np.float32(1)
        return values

    return Tensor(name, "F32", stored.shape, stored.file, read)


def _rows_in_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs of a head from rows (2i, 2i + 1), as GGUF has them for llama, to rows
    (i, i + head_dim / 2)."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _names(
    metadata: Metadata, stored: dict[str, StoredTensor], config: dict[str, Any]
) -> dict[str, str]:
    """GGUF name -> Hugging Face name of the model's tensors. Raises CheckpointError if one is
    missing or of another shape, or if there are others."""
    head = config["head_dim"]
    sizes = {
        "hidden": config["hidden_size"],
        "vocab": config["vocab_size"],
        "ffn": config["intermediate_size"],
        "head": head,
        "q": head * config["num_attention_heads"],
        "kv": head * config["num_key_value_heads"],
    }
    names = {}
    for name, target, symbols in _expected_tensors(metadata, stored):
        if name not in stored:
            raise CheckpointError(
                f'{metadata.file}: tensor "{name}" is missing, expected all of a model'
            )
        shape = tuple(sizes[symbol] for symbol in symbols)
        if stored[name].shape != shape:
            raise CheckpointError(
                f'{metadata.file}: tensor "{name}" has shape {list(stored[name].shape)}, expected '
                f"{list(shape)}"
            )
        names[name] = target
    for name in stored:
        if name not in names and (name != ROPE_FACTORS or metadata.architecture != "llama"):
            raise CheckpointError(
                f'{metadata.file}: tensor "{name}" is unknown, expected those of a dense '
                f"{metadata.architecture} model"
            )
    return names


def _expected_tensors(
    metadata: Metadata, stored: dict[str, StoredTensor]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for name, (target, shape) in OUTER_PARTS.items():
        if name != "output.weight" or name in stored:  # else the embedding is the head
            yield name, target, shape
    biased: tuple[str, ...] = ()
    if metadata.architecture == "qwen2":
        biased = ("attn_q", "attn_k", "attn_v")
    elif "blk.0.attn_q.bias" in stored:
        biased = ("attn_q", "attn_k", "attn_v", "attn_output")
    gemma = metadata.architecture == "gemma3"
    parts = {**BLOCK_PARTS, **(GEMMA_PARTS if gemma else {})}
    for layer in range(metadata.get("@.block_count", int)):
        for part, (target, shape) in parts.items():
            if part not in HEAD_NORMS or gemma or metadata.architecture == "qwen3":
                yield f"blk.{layer}.{part}.weight", f"model.layers.{layer}.{target}.weight", shape
            if part in biased:
                yield f"blk.{layer}.{part}.bias", f"model.layers.{layer}.{target}.bias", shape[:1]


def _config(metadata: Metadata, stored: dict[str, StoredTensor]) -> dict[str, Any]:
    get = metadata.get
    for key, values in OFF.items():
        metadata.expect(f"@.{key}", values)
    layers, hidden = get("@.block_count", int), get("@.embedding_length", int)
    heads = metadata.get_of_layers("@.attention.head_count", layers)
    if hidden < 1 or heads < 1:
        raise metadata.error("embedding_length, head_count", (hidden, heads), "both > 0")
    head_dim = get("@.attention.key_length", int, hidden // heads)
    vocab = stored["token_embd.weight"].shape[0]
    for key, value in {
        "attention.value_length": head_dim,
        "attention.key_length_swa": head_dim,
        "attention.value_length_swa": head_dim,
        "rope.dimension_count": head_dim,
        "rope.dimension_count_swa": head_dim,
        "embedding_length_out": hidden,
        "vocab_size": vocab,
    }.items():
        metadata.expect(f"@.{key}", (value,))
    _check_attention_scale(metadata, head_dim)
    base = get("@.rope.freq_base", float, 10000.0)
    config = {
        "hidden_size": hidden,
        "intermediate_size": metadata.get_of_layers("@.feed_forward_length", layers),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get_of_layers("@.attention.head_count_kv", layers, heads),
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": get("@.context_length", int),
        "rms_norm_eps": get("@.attention.layer_norm_rms_epsilon", float),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in stored,
        "rope_theta": base,
    }
    scaling = _rope_scaling(metadata, stored, config)
    if scaling:
        config["rope_scaling"] = scaling

    if metadata.architecture == "gemma3":
        return _gemma(metadata, config)
    metadata.expect("@.rope.freq_base_swa", (base,))
    metadata.expect("@.attention.sliding_window_pattern", (0, 1))
    family = ARCHITECTURES[metadata.architecture]
    window = get("@.attention.sliding_window", int, 0)
    if window:
        if family != "Llama":
            raise metadata.error("@.attention.sliding_window", window, "none for this architecture")
        if "blk.0.attn_q.bias" in stored:
            raise metadata.error("@.attention.sliding_window", window, "none with biases")
        family = "Mistral"
        config["sliding_window"] = window
    elif family != "Qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in stored
    return {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), **config}


def _gemma(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window = metadata.get("@.attention.sliding_window", int, 0)
    period = metadata.get("@.attention.sliding_window_pattern", int, GEMMA_PERIOD)
    if window < 0 or period < 0:
        raise metadata.error("attention.sliding_window, its pattern", (window, period), "both >= 0")
    slides = [window > 0 and (period == 0 or i % period != 0) for i in range(1, layers + 1)]
    scalar = config["head_dim"]
    if layers == GEMMA_27B_LAYERS:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    del config["hidden_act"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **config,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": metadata.get("@.rope.freq_base_swa", float, 10000.0),
        "sliding_window": window or None,
        "layer_types": [f"{'sliding' if each else 'full'}_attention" for each in slides],
    }


def _check_attention_scale(metadata: Metadata, head_dim: int) -> None:
    """Of scores before softmax; 0 stands for the usual one."""
    scale = metadata.get("@.attention.scale", float, 0.0)
    usual = 1 / math.sqrt(head_dim) if head_dim > 0 else 0.0
    if scale != 0 and not math.isclose(scale, usual, rel_tol=1e-6):
        raise metadata.error("@.attention.scale", scale, f"1 / sqrt({head_dim}) = {usual:.6g}")


def _rope_scaling(
    metadata: Metadata, stored: dict[str, StoredTensor], config: dict[str, Any]
) -> dict[str, Any]:
    """config.json's rope_scaling, {} for none."""
    get = metadata.get
    kind = get("@.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise metadata.error("@.rope.scaling.type", kind, "none, linear or yarn")
    older = get("@.rope.scale_linear", float, 0.0)
    factor = get("@.rope.scaling.factor", float, older)
    if factor < 0:
        raise metadata.error("@.rope.scaling.factor", factor, "a number above 0")
    if kind == "none" or factor == 0:  # 0, too, means none
        factor = 1.0
    used = "yarn" if kind == "yarn" else "without yarn"
    metadata.expect("@.rope.scaling.yarn_ext_factor", (-1, 1) if kind == "yarn" else (-1, 0), used)
    attention = get("@.rope.scaling.attn_factor", float, 1.0)
    if kind != "yarn" or factor == 1:
        metadata.expect("@.rope.scaling.attn_factor", (1,), used)
    if ROPE_FACTORS in stored and metadata.architecture == "llama":
        if factor != 1:
            raise metadata.error("@.rope.scaling.factor", factor, f"none beside {ROPE_FACTORS}")
        return _llama3_scaling(metadata, stored[ROPE_FACTORS].read(), config)
    if factor == 1:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": get(
            "@.rope.scaling.original_context_length", int, config["max_position_embeddings"]
        ),
        "beta_fast": get("@.rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": get("@.rope.scaling.yarn_beta_slow", float, 1.0),
    }
    if attention != 1:  # on top of what YaRN itself multiplies cos and sin by
        rope["attention_factor"] = attention * (1 + 0.1 * math.log(max(factor, 1.0)))
    return rope


def _llama3_scaling(
    metadata: Metadata, divisors: np.ndarray, config: dict[str, Any]
) -> dict[str, Any]:
    """The parameters that give these divisors of the rotary frequencies, [head_dim / 2]."""
    rope: dict[str, Any] = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3_ROPE}
    half = config["head_dim"] // 2
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / rope["factor"] + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise CheckpointError(
            f'{metadata.file}: tensor "{ROPE_FACTORS}" holds {divisors}, expected the divisors of '
            f"Llama 3, {expected}"
        )
    return rope
