"""Hugging Face folders with a quantization_config: GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_gguf
import tiny_quantized
from gguf import GGMLQuantizationType
from reference import Reference
from safetensors.numpy import load_file, save_file
from tdaengine._native import Checkpoint
from tiny_quantized import CONFIG, KINDS, Codes

from tdaengine import CheckpointError, Engine
from tdaengine.convert import convert
from tdaengine.info import describe, info

TOKENS = tiny.tokens("llama")
KEEPS = [name for name, kind in KINDS.items() if kind.bits == 4 and kind.group % 32 == 0]


def write_plain(folder: Path, weights: dict[str, np.ndarray], config: dict = CONFIG) -> Path:
    """The checkpoint of f32 weights."""
    values = {name: array.astype(np.float32) for name, array in weights.items()}
    tiny_quantized.write_folder(folder, config, values)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_the_formula(tmp_path: Path, name: str):
    weights = tiny_quantized.write(tmp_path / name, name)
    checkpoint = Checkpoint(str(tmp_path / name))
    assert {key for key, *_ in checkpoint.tensors} == set(weights)
    for key, expected in weights.items():
        # Products of 16-bit scales and small integers are exact in f32, those of f32 ones are not.
        tolerance = 2e-7 if KINDS[name].dtype == "f4" else 0
        found = checkpoint.read(key)
        assert np.allclose(found, expected, rtol=tolerance, atol=tolerance), key


@pytest.mark.parametrize("name", KINDS)
def test_logits(tmp_path: Path, name: str):
    weights = tiny_quantized.write(tmp_path / name, name)
    plain = write_plain(tmp_path / "plain", weights)
    found = Engine(tmp_path / name, weights="f32").logits(TOKENS)
    expected = Reference(plain).forward(TOKENS)
    assert np.abs(found - expected).max() < 1e-4
    if KINDS[name].dtype == "f4":
        return  # whose products are rounded
    for each in ("f32", "bf16", "int8", "graded"):
        of_plain = Engine(plain, weights=each).logits(TOKENS)
        assert np.array_equal(Engine(tmp_path / name, weights=each).logits(TOKENS), of_plain), each


@pytest.mark.parametrize("name", KINDS)
def test_auto_keeps_four_bits(tmp_path: Path, name: str):
    """Then logits are nearer to the weights' own than in int8. Another rounding to 4 bits would
    put them 0.3 away."""
    weights = tiny_quantized.write(tmp_path / name, name)
    engine = Engine(tmp_path / name)
    assert engine.weights == ("int4" if name in KEEPS else "int8")
    expected = Reference(write_plain(tmp_path / "plain", weights)).forward(TOKENS)

    def error(engine: Engine) -> float:
        return np.linalg.norm(engine.logits(TOKENS) - expected) / np.linalg.norm(expected)

    eight = error(Engine(tmp_path / name, weights="int8"))
    assert max(error(engine), eight) < 0.05
    assert KINDS[name].apart or error(engine) <= eight
    convert(tmp_path / name, tmp_path / "packed", weights="auto")
    packed = Engine(tmp_path / "packed")
    assert packed.weights == engine.weights
    assert np.array_equal(packed.logits(TOKENS), engine.logits(TOKENS))


@pytest.mark.parametrize(
    ("method", "group", "packing"),
    [
        ("gptq", 32, tiny_quantized.gptq),
        ("gptq", 64, tiny_quantized.gptq),
        ("awq", 128, tiny_quantized.awq),
    ],
)
def test_codes_are_kept_to_the_bit(
    tmp_path: Path, method: str, group: int, packing: Callable[[Codes], dict[str, np.ndarray]]
):
    """Logits in int4 are those of the same codes, scales and minima in a GGUF file of Q4_1, whose
    16 bits hold these minima exactly."""
    weights = tiny.make_weights(CONFIG, seed=3)
    tensors: dict[str, np.ndarray] = {}
    blocks: dict[str, np.ndarray] = {}
    for key, values in weights.items():
        layer = key.removesuffix(".weight")
        if not layer.endswith("_proj"):
            tensors[key] = values
            continue
        made = tiny_quantized.quantize(values, 4, group, zeros=True)
        short = (made.scales.view("u2") & 0xFFE0).view("f2")  # 5 bits less: exact with any zero
        made = Codes(made.codes, short, made.zeros, made.group_of, 4)
        tensors |= {f"{layer}.{part}": v for part, v in packing(made).items()}
        blocks[key] = q4_1(made)
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if layer.endswith(f"{part}_proj"):
                blocks[key] = tiny_gguf.in_pairs(blocks[key], CONFIG[heads])
    settings = {"quant_method": method, "bits": 4, "group_size": group}
    folder = tmp_path / "folder"
    tiny_quantized.write_folder(folder, CONFIG | {"quantization_config": settings}, tensors)
    kinds = dict.fromkeys(blocks, GGMLQuantizationType.Q4_1)
    file = tiny_gguf.write(tmp_path / "model.gguf", CONFIG, weights, blocks=blocks, kinds=kinds)
    expected, found = Engine(file), Engine(folder)
    assert (expected.weights, found.weights) == ("int4", "int4")
    assert np.array_equal(found.logits(TOKENS), expected.logits(TOKENS))


def q4_1(layer: Codes) -> np.ndarray:
    """The rows as blocks of Q4_1."""
    rows, cols = layer.codes.shape
    codes = layer.codes.reshape(rows, cols // 32, 2, 16)
    scales = layer.scales[:, layer.group_of[::32]]
    minima = -scales * layer.zeros[:, layer.group_of[::32]]
    assert np.array_equal(minima.astype("f2"), minima)
    numbers = np.stack([scales, minima], -1).astype("<f2").view(np.uint8)
    nibbles = codes[:, :, 0] | codes[:, :, 1] << 4
    return np.concatenate([numbers, nibbles], -1).reshape(rows, -1)


@pytest.mark.parametrize("name", ["gptq_ordered", "awq_128", "bytes_rows"])
def test_convert_to_a_plain_folder(tmp_path: Path, name: str):
    weights = tiny_quantized.write(tmp_path / name, name)
    convert(tmp_path / name, tmp_path / "f32", dtype="f32")
    convert(tmp_path / name, tmp_path / "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "f32/config.json").read_text())
    made = load_file(tmp_path / "f32/model.safetensors")
    assert made.keys() == weights.keys()
    assert all(np.array_equal(made[key], values) for key, values in weights.items())
    assert Engine(tmp_path / "bf16").weights == "bf16"


@pytest.mark.parametrize("kind", ["gptq_32", "gptq_ordered", "awq_64", "bytes_rows"])
@pytest.mark.parametrize("family", ["phi3", "qwen2", "gemma3", "llama_bias"])
def test_families(tmp_path: Path, family: str, kind: str):
    """Biases stay, layers of several matrices are taken apart."""
    config = tiny.config_of(family) | {"hidden_size": 128, "intermediate_size": 192}
    weights = tiny_quantized.write(tmp_path / "folder", kind, config=config)
    plain = write_plain(tmp_path / "plain", weights, config)
    for each in ("f32", "int8", "graded"):
        expected = Engine(plain, weights=each).logits(TOKENS)
        assert np.array_equal(Engine(tmp_path / "folder", weights=each).logits(TOKENS), expected)
    expected, found = (Engine(each).logits(TOKENS) for each in (plain, tmp_path / "folder"))
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_parts_in_several_files(tmp_path: Path):
    tiny_quantized.write(tmp_path / "folder", "awq_32")
    expected = Engine(tmp_path / "folder").logits(TOKENS)
    file = tmp_path / "folder/model.safetensors"
    tensors = load_file(file)
    file.unlink()
    weight_map = {}
    for i, shard in enumerate(["one.safetensors", "two.safetensors"]):
        part = dict(list(tensors.items())[i::2])
        save_file(part, file.with_name(shard))
        weight_map |= dict.fromkeys(part, shard)
    index = file.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert np.array_equal(Engine(tmp_path / "folder").logits(TOKENS), expected)


def test_empty_biases_of_quantised_layers_count_for_nothing(tmp_path: Path):
    """Some packages give one to every layer."""
    tiny_quantized.write(tmp_path / "folder", "gptq_32")
    expected = Engine(tmp_path / "folder").logits(TOKENS)
    file = tmp_path / "folder/model.safetensors"
    tensors = load_file(file)
    layers = {key.rsplit(".", 1)[0] for key in tensors if key.endswith(".qweight")}
    biases = {f"{name}.bias": np.zeros(CONFIG["hidden_size"], "f2") for name in layers}
    save_file(tensors | biases, file)
    assert np.array_equal(Engine(tmp_path / "folder").logits(TOKENS), expected)
    biases[min(biases)][3] = 1
    save_file(tensors | biases, file)
    with pytest.raises(CheckpointError, match=r"mlp.down_proj.bias\" is none that config.json"):
        Engine(tmp_path / "folder")


def test_info_of_mixed_types(tmp_path: Path):
    """An int4 model keeps 8 bits of the matrices that its file has in more than 4."""
    weights = tiny.make_weights(CONFIG, seed=4)
    first = [key for key in weights if re.search(r"layers.0.*(up|gate)_proj", key)]
    kinds = dict.fromkeys(first, GGMLQuantizationType.Q4_1)
    file = tiny_gguf.write(
        tmp_path / "m.gguf", CONFIG, weights, quantized=GGMLQuantizationType.Q8_0, kinds=kinds
    )
    found = info(Engine(file, weights="int4"))
    formats = {each["format"]: each for each in found["matrices"] if each["matrices"] == "gate, up"}
    assert {name: each["layers"] for name, each in formats.items()} == {
        "int4, scale and minimum": 1,
        "graded": 1,
    }
    # 4 bits and two numbers of 16 for 32 inputs; f32 steps and outliers by row are more in a model
    # of 128 inputs than in others.
    assert 5 < formats["int4, scale and minimum"]["bits_per_weight"] < 5.5
    assert formats["graded"]["bits_per_weight"] > 8
    assert re.search(r"gate, up .* in 1 layers; .* in 1 layers\n", describe(found))
    assert Engine(file).weights == "int8"  # the format of most of the layers' weights


@pytest.mark.parametrize("names, weights", [("gate|up|down", "int4"), ("down|[qkv]", "int8")])
def test_auto_is_what_most_of_the_layers_weights_are(tmp_path: Path, names: str, weights: str):
    tensors = tiny.make_weights(CONFIG, seed=4)
    matrices = [key for key in tensors if re.search(r"layers.*_proj.weight", key)]
    four = [key for key in matrices if re.search(f"({names})_proj", key)]
    share = sum(tensors[key].size for key in four) / sum(tensors[key].size for key in matrices)
    assert (share >= 0.5) == (weights == "int4")
    file = tiny_gguf.write(
        tmp_path / "m.gguf",
        CONFIG,
        tensors,
        quantized=GGMLQuantizationType.Q8_0,
        kinds=dict.fromkeys(four, GGMLQuantizationType.Q4_0),
    )
    assert Engine(file).weights == weights
