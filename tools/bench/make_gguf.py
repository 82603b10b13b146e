"""Converts a bf16 Hugging Face checkpoint of plain llama architecture to GGUF files for llama.cpp,
without a tokenizer: enough to measure speed with the same weights.

usage: make_gguf.py MODEL_FOLDER FOLDER [--format BF16 --format Q8_0 --format Q4_0]

Needs `pip install gguf`, and llama-cpp-python for any format but BF16.
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

FORMATS = ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K_M")
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and bits of all tensors, mapped from the files."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                sys.exit(f"{path}: {name} is {entry['dtype']}: use tdaengine convert --dtype bf16")
            offset = 8 + size + entry["data_offsets"][0]
            yield name, np.memmap(path, "<u2", "r", offset, tuple(entry["shape"]))


def gguf_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{BLOCK_PARTS[part]}.weight"


def rows_in_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates a head's rows (2i, 2i + 1) together, Hugging Face (i, i + head_dim / 2)."""
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def write_bf16(folder: Path, path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama" or config.get("rope_scaling"):
        sys.exit(f"{folder}: expected model_type llama without rope_scaling")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, values in read_tensors(folder):
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), (values.astype("<u4") << 16).view("<f4"))
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = rows_in_pairs(values, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(gguf_name(name), values, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, path: Path, quantization: str) -> None:
    """The same as llama-quantize by default."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def silent(*_: object) -> None: ...

    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}")
    names = (str(file).encode() for file in (source, path))
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)) != 0:
        sys.exit(f"{path}: llama_model_quantize failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, help="for the files, <model>.<format>.gguf")
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: first three")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    made = {name: args.folder / f"{args.model.resolve().name}.{name}.gguf" for name in FORMATS}
    wanted = args.format or FORMATS[:3]
    keep_bf16 = "BF16" in wanted or made["BF16"].exists()
    write_bf16(args.model, made["BF16"])  # the others are converted from this one
    for name in wanted:
        if name != "BF16":
            quantize(made["BF16"], made[name], name)
    if not keep_bf16:
        made["BF16"].unlink()
    for name in wanted:
        print(f"{made[name]}: {made[name].stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
