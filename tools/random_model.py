"""Writes a Hugging Face checkpoint of a real model's shape with random bf16 weights and no
tokenizer, to measure speed where the real model is not available.

usage: random_model.py FOLDER [--shape NAME] [--seed N]
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

STD = 0.02  # of all matrices, small enough to keep activations small; norms are 1

# hidden, FFN, layers, heads, KV heads, vocabulary, tied embeddings, context in tokens, RoPE base
SHAPES = {
    "tiny": (64, 192, 2, 4, 2, 512, True, 8192, 10000.0),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True, 8192, 100000.0),
    "smollm2-360m": (960, 2560, 32, 15, 5, 49152, True, 8192, 100000.0),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000, False, 2048, 10000.0),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152, True, 8192, 130000.0),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 128256, True, 131072, 500000.0),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256, False, 8192, 500000.0),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, False, 4096, 10000.0),
}


def make_config(shape: str) -> dict:
    hidden, neurons, layers, heads, kv_heads, vocab, tied, context, theta = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def shapes_of_tensors(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, neurons = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for part, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{prefix}.self_attn.{part}_proj.weight", (rows, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (neurons, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (neurons, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, neurons)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """bf16 bits, rounded to nearest even. values: f32, finite."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def random_values(seed: int) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    random = np.random.default_rng(seed)

    def values(_: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return to_bf16(np.ones(shape, np.float32))
        return to_bf16(random.standard_normal(shape, np.float32) * np.float32(STD))

    return values


def write_weights(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    values: Callable[[str, tuple[int, ...]], np.ndarray],
) -> int:
    """values(name, shape): bf16 bits. Holds one tensor in memory at a time. Returns the number of
    weights."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(values(name, shape))
    return end // 2


def write_model(
    folder: Path, config: dict, values: Callable[[str, tuple[int, ...]], np.ndarray]
) -> int:
    folder.mkdir(parents=True)
    count = write_weights(folder / "model.safetensors", dict(shapes_of_tensors(config)), values)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="to create")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = write_model(args.folder, make_config(args.shape), random_values(args.seed))
    print(f"{args.folder}: {args.shape}, {count:,} random weights")


if __name__ == "__main__":
    main()
