"""Compares quantised folders with transformers and with the package compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_quantized
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from tdaengine._native import Checkpoint
from tiny_quantized import CONFIG, KINDS
from transformers import AutoModelForCausalLM

from tdaengine import Engine

TOKENS = tiny.tokens("llama")
# Of f32 scales, whose products with zero points are rounded: weights here are below 1.
TOLERANCE = 1e-7
# The package has given up weight_g_idx, which files of its earlier versions have.
COMPRESSED = [
    name
    for name, kind in KINDS.items()
    if kind.config["quant_method"] == "compressed-tensors" and not kind.ordered
]


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_logits(tmp_path: Path, name: str):
    """transformers runs the dequantised weights."""
    weights = tiny_quantized.write(tmp_path / name, name)
    plain = {key: values.astype(np.float32) for key, values in weights.items()}
    tiny_quantized.write_folder(tmp_path / "plain", CONFIG, plain)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = Engine(tmp_path / name, weights="f32").logits(TOKENS)
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_reads_the_same(tmp_path: Path, name: str):
    """From files that this repository's tests packed."""
    tiny_quantized.write(tmp_path / name, name, dtype="f4")
    tensors = load_file(tmp_path / name / "model.safetensors")
    checkpoint = Checkpoint(str(tmp_path / name))
    config = KINDS[name].config
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    layers = {key.rsplit(".", 1)[0] for key in tensors if key.endswith("_scale")}
    assert len(layers) == 7 * CONFIG["num_hidden_layers"]
    for layer in layers:
        parts = {
            key.removeprefix(f"{layer}."): values
            for key, values in tensors.items()
            if key.startswith(f"{layer}.")
        }
        expected = compressor.decompress(parts, scheme)["weight"].numpy()
        assert np.allclose(checkpoint.read(f"{layer}.weight"), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_compressed_tensors_writes(tmp_path: Path, name: str):
    """Packed by the package instead."""
    weights = tiny_quantized.write(tmp_path / "ours", name, dtype="f4")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    config = KINDS[name].config
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    written: dict[str, np.ndarray] = {}
    for key, values in tensors.items():
        layer, part = key.rsplit(".", 1)
        if f"{layer}.weight_scale" not in tensors:
            written[key] = values.numpy()
            continue
        if part != "weight_scale":
            continue
        parts = {k.rsplit(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{layer}.")}
        state = compressor.decompress(parts, scheme)
        state["weight"] = torch.tensor(weights[f"{layer}.weight"], dtype=torch.float32)
        state.pop("weight_shape", None)
        made = compressor.compress(state, scheme)
        written |= {f"{layer}.{k}": v.numpy() for k, v in made.items()}
    settings = json.loads((tmp_path / "ours/config.json").read_text())
    tiny_quantized.write_folder(tmp_path / "theirs", settings, written)
    checkpoint = Checkpoint(str(tmp_path / "theirs"))
    for key, expected in weights.items():
        assert np.allclose(checkpoint.read(key), expected, rtol=0, atol=TOLERANCE), key
