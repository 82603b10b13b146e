"""Writes the seeds of the fuzz targets: tiny valid files, and variants that reach other code.

`tests/fuzz/run.sh merge` adds what fuzzing finds, in files named by hashes. Run this script again,
with the package installed, when the layout of engine folders changes.
"""

import io
import json
import struct
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from tdaengine import _native

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import tiny_quantized

CORPUS = Path(__file__).parent / "corpus"

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4,
    "hidden_size": 4,
    "intermediate_size": 3,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
CONFIGS = {
    "llama": LLAMA,
    "defaults": {"model_type": "qwen3"},
    "llama3": LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "eos_token_id": [1, 2]},
    "yarn": LLAMA | {"rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 1}},
    "linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 4},
    "mistral": LLAMA | {"model_type": "mistral", "architectures": None, "sliding_window": 3},
    "qwen2": LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]} | WINDOWS,
    "qwen3": LLAMA
    | {"model_type": "qwen3", "architectures": None, "layer_types": ["full_attention"]},
    "gemma3": LLAMA
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 4,
        "query_pre_attn_scalar": 3,
        "sliding_window": 2,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 99.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_ropes": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "olmo2": LLAMA | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]},
    "granite": LLAMA
    | {
        "model_type": "granite",
        "architectures": None,
        "embedding_multiplier": 12,
        "residual_multiplier": 0.2,
        "attention_multiplier": 0.5,
        "logits_scaling": 8,
    },
    "smollm3": LLAMA | {"model_type": "smollm3", "architectures": None, "no_rope_layers": [0, 1]},
    "biased": LLAMA | {"attention_bias": True, "bos_token_id": 1, "hidden_act": "gelu_new"},
}
THRESHOLDS = {
    "format": "tdaengine-thresholds",
    "version": 3,
    "model": "tiny",
    "fingerprint": "0123456789abcdef",
    "weights": "int8",
    "scope": "token",
    "error": 0.1,
    "bytes": 0.6,
    "values": [0.5, 0.25],
    "reached": [0.09, 0.1],
    "source": "texts",
    "texts": 2,
    "tokens": 64,
}


def write(target: str, name: str, content: bytes) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def weights(config: dict, dtype: str) -> bytes:
    """Every tensor that the config requires; the values repeat 0.5, -1, 2."""
    number = {"F32": "<f", "F16": "<e", "BF16": None}[dtype]
    heads, kv, hidden = (
        config[k] for k in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    neurons, vocab = config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim", 128 if config["model_type"] == "qwen3" else hidden // heads)
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [vocab, hidden]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        family = config["model_type"]
        norms = ["input"] * (family != "olmo2") + ["post_attention"]
        norms += ["pre_feedforward"] * (family == "gemma3_text")
        norms += ["post_feedforward"] * (family in ("gemma3_text", "olmo2"))
        for norm in norms:
            shapes[f"{p}{norm}_layernorm.weight"] = [hidden]
        for name, rows in ("q", heads * size), ("k", kv * size), ("v", kv * size):
            shapes[f"{p}self_attn.{name}_proj.weight"] = [rows, hidden]
            if config.get("attention_bias") or config["model_type"] == "qwen2":
                shapes[f"{p}self_attn.{name}_proj.bias"] = [rows]
        shapes[p + "self_attn.o_proj.weight"] = [hidden, heads * size]
        if config.get("attention_bias"):
            shapes[p + "self_attn.o_proj.bias"] = [hidden]
        if family in ("qwen3", "gemma3_text", "olmo2"):
            for name, count in ("q_norm", heads), ("k_norm", kv):
                shapes[f"{p}self_attn.{name}.weight"] = [size * (count if family == "olmo2" else 1)]
        for name, shape in (
            ("gate", [neurons, hidden]),
            ("up", [neurons, hidden]),
            ("down", [hidden, neurons]),
        ):
            shapes[f"{p}mlp.{name}_proj.weight"] = shape
    tensors = {}
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = ((0.5, -1.0, 2.0)[i % 3] for i in range(count))
        if number:
            content = b"".join(struct.pack(number, value) for value in values)
        else:
            content = b"".join(struct.pack("<f", value)[2:] for value in values)
        tensors[name] = dtype, shape, content
    return safetensors(tensors)


def byte_level() -> bytes:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    vocab = {token: i for i, token in enumerate([*alphabet, "th", "the", "\u0120c"])}
    merges = [("t", "h"), ("th", "e"), ("\u0120", "c")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab | {"\u0120": 93}, merges=merges))
    digits, to_bytes = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<s>", AddedToken("[X]", lstrip=True, single_word=True)])
    return tokenizer.to_str().encode()


def byte_fallback() -> bytes:
    learned = ["<unk>", "<s>", "\u2581", "t", "h", "e", "th", "the", "\u2581the"]
    vocab = learned + [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocab)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence(list(spaces))
    back = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    return tokenizer.to_str().encode()


def sentence_pieces(kind: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat's 12 hats", "a hat, a cat"] * 8),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


GGUF_SIZES = {
    "context_length": 16,
    "embedding_length": 8,
    "feed_forward_length": 4,
    "block_count": 1,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
GGUF_VOCABULARY = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<|im_end|>"],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.eos_token_ids": [2, 3],
}
GGUF_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


def gguf_shapes(architecture: str, biased: bool = False) -> dict[str, list[int]]:
    shapes = {"token_embd.weight": [4, 8], "output_norm.weight": [8]}
    parts = {"attn_norm": [8], "ffn_norm": [8], "ffn_gate": [4, 8], "ffn_up": [4, 8]}
    parts |= {"ffn_down": [8, 4], "attn_q": [8, 8], "attn_output": [8, 8]}
    parts |= {"attn_k": [4, 8], "attn_v": [4, 8]}
    if architecture in ("qwen3", "gemma3"):
        parts |= {"attn_q_norm": [4], "attn_k_norm": [4]}
    if architecture == "gemma3":
        parts |= {"post_attention_norm": [8], "post_ffw_norm": [8]}
    for part, shape in parts.items():
        shapes[f"blk.0.{part}.weight"] = shape
        with_bias = part in ("attn_q", "attn_k", "attn_v", "attn_output"[: 11 * biased])
        if with_bias and (biased or architecture == "qwen2"):
            shapes[f"blk.0.{part}.bias"] = shape[:1]
    return shapes


def gguf_file(
    architecture: str, metadata: dict, tensors: dict[str, tuple[np.ndarray, int | None]]
) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "made.gguf")
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
            add.get(type(value), writer.add_array)(key, value)
        for name, (values, kind) in tensors.items():
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def gguf_model(architecture: str, more: dict, biased: bool = False, factors: bool = False) -> bytes:
    sizes = {f"{architecture}.{key}": value for key, value in GGUF_SIZES.items()}
    tensors = {
        name: (np.resize(np.float32([0.5, -1, 2]), shape), None)
        for name, shape in gguf_shapes(architecture, biased).items()
    }
    if factors:
        tensors["rope_freqs.weight"] = (np.ones(2, np.float32), None)
    return gguf_file(architecture, sizes | more, tensors)


def write_ggufs() -> None:
    write("gguf", "llama", gguf_model("llama", GGUF_VOCABULARY))
    yarn = {f"llama.{key}": value for key, value in GGUF_YARN.items()}
    write("gguf", "biased", gguf_model("llama", yarn, biased=True))
    write("gguf", "factors", gguf_model("llama", {"llama.attention.head_count": [2]}, factors=True))
    for name in "qwen2", "qwen3":
        write("gguf", name, gguf_model(name, {}))
    write("gguf", "gemma3", gguf_model("gemma3", {"gemma3.attention.sliding_window": 3}))
    kinds = [
        kind for kind in gguf.GGMLQuantizationType if kind.value < 15 or kind.value in (20, 23, 30)
    ]
    tensors = {}
    for kind in kinds:
        values, size = gguf.GGML_QUANT_SIZES[kind]
        if kind.name != "Q8_1":
            data = np.arange(256 // values * size, dtype=np.uint8)
            tensors[kind.name] = (data.reshape(1, -1), kind)
    write("gguf", "types", gguf_file("llama", {}, tensors))


def prefixes(prompts: list[tuple[int, str, int]]) -> bytes:
    """A prefix cache's file; a prompt is its tokens, estimate and statistics."""
    row, neurons = 4, 2
    data = b"".join(
        bytes(range(count * (4 + row))) + bytes(kept * 8 * (1 + neurons))
        for count, _, kept in prompts
    )
    checksum = 0xCBF29CE484222325  # FNV-1a
    for byte in data:
        checksum = (checksum ^ byte) * 0x100000001B3 % 2**64
    header = {
        "format": "tdaengine-prefix-cache",
        "version": 1,
        "fingerprint": "0" * 16,
        "weights": "int8",
        "kv": "bf16",
        "device": "cpu (avx2)",
        "token_bytes": row,
        "statistic_size": neurons,
        "prompts": [{"tokens": t, "estimate": e, "statistics": k} for t, e, k in prompts],
        "checksum": f"{checksum:016x}",
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_packed(name: str, source: str, packed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _native.pack_checkpoint(source, folder, packed, None)
        config, arena = (Path(folder, name) for name in ("config.json", "model.safetensors"))
        content = json.dumps(json.loads(config.read_text())).encode()
        write("folder", "packed_" + name, content + b"\0" + arena.read_bytes())


def main() -> None:
    write_ggufs()
    write("tokenizer", "byte_level", byte_level())
    write("tokenizer", "byte_fallback", byte_fallback())
    for kind in "bpe", "unigram":
        write("tokenizer", kind, sentence_pieces(kind))

    for name, config in CONFIGS.items():
        write("config", name, json.dumps(config).encode())
    generation = b'{"eos_token_id": [1, 3], "temperature": 0.6}'
    write("config", "generation", json.dumps(LLAMA).encode() + b"\0" + generation)

    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two"}}
    write("index", "two", json.dumps(index).encode())
    write("index", "outside", b'{"weight_map": {"a": "../one.safetensors"}}')

    write("thresholds", "token", json.dumps(THRESHOLDS).encode())
    sequence = THRESHOLDS | {"scope": "sequence", "source": "self-generated"}
    write("thresholds", "sequence", json.dumps(sequence).encode())
    shares = {"inputs": [0.5, 0.1], "losses": [-0.001, 0.02], "loss_errors": [0.001, 0.002]}
    graded = THRESHOLDS | {"weights": "graded", "values": [], "reached": []} | shares
    write("thresholds", "graded", json.dumps(graded).encode())

    write("prefixes", "one", prefixes([(3, "contribution", 1)]))
    write("prefixes", "two", prefixes([(1, "hidden", 0), (2, "gate", 2)]))

    tensors = {"a": ("BF16", [1, 2], b"abcd"), "b": ("F4", [2], b"e"), "c": ("F32", [0, 5], b"")}
    write("safetensors", "three", safetensors(tensors))
    overlap = safetensors({"a": ("U8", [2], b"ab"), "b": ("U8", [2], b"cd")})
    write("safetensors", "overlap", overlap.replace(b"[2, 4]", b"[1, 3]"))
    write("safetensors", "metadata", b"\x1f" + bytes(7) + b'{"__metadata__": {"key": "v"}} ')
    write("safetensors", "length", b"\xff" * 8 + b"{}")

    dtypes = {"llama": "F32", "mistral": "F16", "qwen2": "BF16", "biased": "F32"}
    for name, dtype in (dtypes | {"gemma3": "BF16", "olmo2": "F32"}).items():
        config = CONFIGS[name]
        write("folder", name, json.dumps(config).encode() + b"\0" + weights(config, dtype))
    qwen3 = CONFIGS["qwen3"] | {"head_dim": 4}
    write("folder", "qwen3", json.dumps(qwen3).encode() + b"\0" + weights(qwen3, "F16"))
    small = tiny_quantized.CONFIG | LLAMA
    small |= {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2}
    for name in "gptq_32", "gptq_ordered", "awq_32", "packed_zeros", "bytes_zeros":
        with tempfile.TemporaryDirectory() as folder:
            tiny_quantized.write(Path(folder, name), name, config=small)
            config, data = (Path(folder, name, f) for f in ("config.json", "model.safetensors"))
            write("folder", "quantized_" + name, config.read_bytes() + b"\0" + data.read_bytes())
    with tempfile.TemporaryDirectory() as source:
        Path(source, "config.json").write_text(json.dumps(LLAMA))
        Path(source, "model.safetensors").write_bytes(weights(LLAMA, "F32"))
        for packed in "f32", "bf16", "int8", "int4", "bf16c", "graded":
            write_packed(packed, source, packed)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        tiny_quantized.write(source, "gptq_ordered", config=small | {"hidden_size": 64})
        write_packed("ordered", str(source), "int4")


if __name__ == "__main__":
    main()
