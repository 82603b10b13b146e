"""Writes a Hugging Face folder of the same model with its channels and neurons in another order.

    python tools/permute_model.py MODEL DESTINATION [--seed 0]

The new model computes the same function. Groups of 32 neighbouring weights that were rounded to a
grid of their own once (the demo's model comes from a 4-bit file) no longer lie together, so that
weight formats meet weights as a natively trained model has them.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

TYPES = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}  # values are only moved


def permuted(name, tensor, hidden, neurons, head):
    """The tensor with residual channels, neurons and value channels in the new order."""
    if "embed_tokens" in name or "lm_head" in name:
        return tensor[:, hidden]
    if tensor.ndim == 1:
        return tensor[hidden] if len(tensor) == len(hidden) and "bias" not in name else tensor
    if "gate_proj" in name or "up_proj" in name:
        return tensor[neurons][:, hidden]
    if "down_proj" in name:
        return tensor[hidden][:, neurons]
    heads = tensor.shape[0 if "v_proj" in name else 1] // len(head)
    values = (np.arange(heads)[:, None] * len(head) + head).ravel()
    if "v_proj" in name:
        return tensor[values][:, hidden]
    if "o_proj" in name:
        return tensor[hidden][:, values]
    return tensor[:, hidden]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a Hugging Face folder of the LLaMA family")
    parser.add_argument("destination", type=Path, help="a folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the orders (default: 0)")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    if config.get("attention_bias") or config.get("model_type") != "llama":
        parser.error(f"{args.model}: expected model_type llama without biases")
    order = np.random.default_rng(args.seed)
    size = config["hidden_size"]
    hidden = order.permutation(size)
    neurons = order.permutation(config["intermediate_size"])
    head = order.permutation(config.get("head_dim") or size // config["num_attention_heads"])
    args.destination.mkdir(parents=True)
    for file in args.model.iterdir():
        if file.suffix == ".json" or file.name == "tokenizer.model":
            shutil.copy(file, args.destination)
    for file in args.model.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        for name, tensor in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            first, end = (start + offset for offset in tensor["data_offsets"])
            values = np.frombuffer(bytes(data[first:end]), TYPES[tensor["dtype"]])
            values = permuted(name, values.reshape(tensor["shape"]), hidden, neurons, head)
            data[first:end] = values.tobytes()
        (args.destination / file.name).write_bytes(data)


if __name__ == "__main__":
    main()
