"""Reads a GGUF file: metadata -> config.json, quantised tensors -> f32, vocabulary -> tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ._native import CheckpointError
from .gguf_tokenizer import tokenizer_files
from .source import Source, json_bytes
from .tensors import Tensor

try:
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize
except ImportError as error:
    raise CheckpointError(
        "reading GGUF files needs the package gguf: pip install 'tdaengine[convert]'"
    ) from error

ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# The parts of "blk.<layer>.<part>.<weight or bias>".
BLOCK_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's frequency divisors; they go to config.json

# What Llama 3.1 and later state in config.json and GGUF doesn't keep.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, file: Path, reader: GGUFReader):
        self.file = file
        self._fields = reader.fields
        self.architecture = ""
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            raise self.error("general.architecture", self.architecture, ", ".join(ARCHITECTURES))

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of `key`; "@" stands for the architecture. Raises CheckpointError if it is
        missing without a default, or of another type."""
        value = self._contents(key)
        if value is None:
            if default is ...:
                raise self.error(key, "nothing", kind.__name__)
            return default
        if kind is float and isinstance(value, float):
            return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, repr(value)[:80], kind.__name__)
        return value

    def get_list(self, key: str, kind: type) -> list[Any]:
        """The list under `key`, all of whose items are of the kind. Raises CheckpointError."""
        values: list[Any] = self.get(key, list)
        for i, value in enumerate(values):
            if not isinstance(value, kind):
                raise self.error(f"{key}[{i}]", repr(value), kind.__name__)
        return values

    def _contents(self, key: str) -> Any:
        field = self._fields.get(self._full(key))
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise self.error(key, repr(error.object), "UTF-8") from error

    def error(self, key: str, found: object, expected: str) -> CheckpointError:
        key = self._full(key)
        return CheckpointError(f"{self.file}: {key} is {found}, expected {expected}")

    def _full(self, key: str) -> str:
        return key.replace("@", self.architecture)


def read_gguf(path: Path) -> Source:
    """The checkpoint in a GGUF file. Raises CheckpointError."""
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the package raises whatever damaged bytes lead to
        raise CheckpointError(f"{path}: {error}, expected a GGUF file") from error
    metadata = Metadata(path, reader)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = _names(metadata, stored)
    config = _config(metadata, stored)
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    full = any(
        t.tensor_type == GGMLQuantizationType.F32 and len(t.shape) == 2 for t in reader.tensors
    )
    files, generation = tokenizer_files(metadata)
    for key in ("bos_token_id", "eos_token_id"):
        if key in generation:
            config[key] = generation[key]
    files["generation_config.json"] = json_bytes(generation)
    tensors = [_tensor(metadata, target, stored[name], heads) for name, target in names.items()]
    return Source(config, tensors, {**files}, "F32" if full else "BF16")


def _tensor(metadata: Metadata, name: str, stored: Any, heads: tuple[int, int]) -> Tensor:
    # GGUF states the fastest dimension first.
    shape = tuple(int(size) for size in reversed(stored.shape))
    rotated = re.search(r"\.attn_([qk])\.", stored.name)

    def read() -> np.ndarray:
        try:
            values = dequantize(stored.data, stored.tensor_type).astype(np.float32).reshape(shape)
            if rotated and metadata.architecture == "llama":
                return _rows_in_halves(values, heads[rotated[1] == "k"])
            return values
        except (ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f'{metadata.file}: tensor "{stored.name}" of type {stored.tensor_type.name} and '
                f"shape {list(shape)}: {error}"
            ) from error

    return Tensor(name, "F32", shape, metadata.file, read)


def _rows_in_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs of a head from rows (2i, 2i + 1), as GGUF has them for llama, to rows
    (i, i + head_dim / 2)."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _names(metadata: Metadata, stored: dict[str, Any]) -> dict[str, str]:
    """GGUF name -> Hugging Face name of the model's tensors. Raises CheckpointError if one is
    missing, as in one of several split files, or if there are others."""
    names = {}
    for name, target in _expected_names(metadata, stored):
        if name not in stored:
            raise CheckpointError(
                f'{metadata.file}: tensor "{name}" is missing, expected all of a model in one file'
            )
        names[name] = target
    for name in stored:
        if name not in names and name != ROPE_FACTORS:
            raise CheckpointError(
                f'{metadata.file}: tensor "{name}" is unknown, expected those of a dense '
                f"{metadata.architecture} model"
            )
    return names


def _expected_names(metadata: Metadata, stored: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, target in OUTER_NAMES.items():
        if name != "output.weight" or name in stored:  # else the embedding is the head
            yield name, target
    biased: tuple[str, ...] = ()
    if metadata.architecture == "qwen2":
        biased = ("attn_q", "attn_k", "attn_v")
    elif "blk.0.attn_q.bias" in stored:
        biased = ("attn_q", "attn_k", "attn_v", "attn_output")
    for layer in range(metadata.get("@.block_count", int)):
        for part, target in BLOCK_PARTS.items():
            if part not in HEAD_NORMS or metadata.architecture == "qwen3":
                yield f"blk.{layer}.{part}.weight", f"model.layers.{layer}.{target}.weight"
            if part in biased:
                yield f"blk.{layer}.{part}.bias", f"model.layers.{layer}.{target}.bias"


def _config(metadata: Metadata, stored: dict[str, Any]) -> dict[str, Any]:
    get = metadata.get
    hidden, heads = get("@.embedding_length", int), get("@.attention.head_count", int)
    if hidden < 1 or heads < 1:
        raise metadata.error("embedding_length, head_count", (hidden, heads), "both > 0")
    head_dim = get("@.attention.key_length", int, hidden // heads)
    for key in ("@.attention.value_length", "@.rope.dimension_count"):
        if get(key, int, head_dim) != head_dim:
            raise metadata.error(key, get(key, int), f"the size of a head, {head_dim}")
    config = {
        "hidden_size": hidden,
        "intermediate_size": get("@.feed_forward_length", int),
        "num_hidden_layers": get("@.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("@.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "vocab_size": int(stored["token_embd.weight"].shape[-1]),
        "max_position_embeddings": get("@.context_length", int),
        "rms_norm_eps": get("@.attention.layer_norm_rms_epsilon", float),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in stored,
        "rope_theta": get("@.rope.freq_base", float, 10000.0),
    }
    scaling = dict(_rope_scaling(metadata, stored, config))
    if scaling:
        config["rope_scaling"] = scaling

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


def _rope_scaling(
    metadata: Metadata, stored: dict[str, Any], config: dict[str, Any]
) -> Iterator[tuple[str, object]]:
    get = metadata.get
    kind = get("@.rope.scaling.type", str, "none")
    if ROPE_FACTORS in stored:
        yield from _llama3_scaling(metadata, stored[ROPE_FACTORS].data, config).items()
    elif kind in ("linear", "yarn"):
        for key in ("yarn_log_multiplier", "yarn_ext_factor", "attn_factor", "yarn_attn_factor"):
            if (value := get(f"@.rope.scaling.{key}", float, None)) is not None:
                raise metadata.error(f"@.rope.scaling.{key}", value, "nothing")
        yield "rope_type", kind
        yield "factor", get("@.rope.scaling.factor", float)
        if kind == "yarn":
            yield (
                "original_max_position_embeddings",
                get("@.rope.scaling.original_context_length", int),
            )
            yield "beta_fast", get("@.rope.scaling.yarn_beta_fast", float, 32.0)
            yield "beta_slow", get("@.rope.scaling.yarn_beta_slow", float, 1.0)
    elif kind != "none":
        raise metadata.error("@.rope.scaling.type", kind, "none, linear or yarn")


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
