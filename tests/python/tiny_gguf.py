"""Writes GGUF files the way llama.cpp's converter does, from tensors with Hugging Face names."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMAS = ("gemma2", "gemma3")
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

# A byte-level vocabulary in miniature.
MERGES = ["1 2", "12 3", "123 4", "a b"]
BYTES = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
BPE_TOKENS = ["<|end|>", "<tool>", *BYTES, *(m.replace(" ", "") for m in MERGES)]
BPE_TYPES = [3, 4] + [1] * (len(BPE_TOKENS) - 2)


def write(
    path: Path,
    config: dict,
    weights: dict[str, np.ndarray],
    metadata: dict | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    quantized: GGMLQuantizationType = GGMLQuantizationType.F32,
    tensors_per_file: int = 0,
    blocks: dict[str, np.ndarray] | None = None,
    kinds: dict[str, GGMLQuantizationType] | None = None,
) -> Path:
    """metadata: further keys, or None for one to leave out. tensors: further ones by GGUF name.
    quantized: how matrices are stored; kinds: some of them; blocks: some as they are.
    tensors_per_file: 0 for one file, else the first of several is returned."""
    arch = config["model_type"].replace("mistral", "llama").removesuffix("_text")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_per_file)
    values = {
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": BPE_TOKENS,
        "tokenizer.ggml.token_type": BPE_TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 0,
    }
    if "head_dim" in config:
        values[f"{arch}.attention.key_length"] = config["head_dim"]
        values[f"{arch}.attention.value_length"] = config["head_dim"]
    for key, value in {**values, **(metadata or {})}.items():
        _add(writer, key, value)
    for name, array in weights.items():
        if arch == "llama" and (match := re.search(r"self_attn\.([qk])_proj", name)):
            which = "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
            array = in_pairs(array, config[which])
        if arch in GEMMAS and array.ndim == 1:
            array = array + np.float32(1)
        kind = quantized if array.ndim == 2 else GGMLQuantizationType.F32
        kind = (kinds or {}).get(name, kind)
        given = (blocks or {}).get(name)
        data = gguf.quants.quantize(array, kind) if given is None else given
        writer.add_tensor(gguf_name(name, arch), data, raw_dtype=kind)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def gguf_name(name: str, arch: str = "llama") -> str:
    stem, kind = name.rsplit(".", 1)
    names = NAMES | (GEMMA_NAMES if arch in GEMMAS else {})
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem)
    return f"blk.{match[1]}.{names[match[2]]}.{kind}" if match else f"{names[stem]}.{kind}"


def divisors(factor: float, original: float = 8192, head_dim: int = 12) -> np.ndarray:
    """Llama 3's, by the formula of its paper: 1 for short waves, `factor` for long ones."""
    result = []
    for i in range(head_dim // 2):
        wave = 2 * np.pi * 10000.0 ** (2 * i / head_dim)
        smooth = min(max((original / wave - 1) / (4 - 1), 0), 1)
        result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + head_dim / 2 of each head, which RoPE rotates together, become neighbours."""
    size = len(rows) // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if key == "general.alignment":
        writer.add_custom_alignment(value)
    elif isinstance(value, tuple):  # type and value
        getattr(writer, f"add_{value[0]}")(key, value[1])
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, np.float64):
        writer.add_float64(key, float(value))
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
