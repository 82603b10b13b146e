"""Quantised folders whose groups are of inputs that are no neighbours (act-order, desc_act)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_quantized
from reference import Reference
from safetensors.numpy import load_file
from test_quantized import TOKENS, write_plain
from tiny_quantized import CONFIG, KINDS, Codes

from tdaengine import TDA, CheckpointError, Engine
from tdaengine.convert import convert
from tdaengine.info import info

ORDERED = [
    name
    for name, kind in KINDS.items()
    if kind.ordered and not kind.apart and kind.bits == 4 and kind.group % 32 == 0
]
PROMPT = 40
LARGE = CONFIG | {"hidden_size": 256}  # two groups of 128
# Two heads of two groups each, so that their inputs can mix.
WIDE = CONFIG | {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def formats(engine: Engine) -> dict[str, tuple[str, float]]:
    return {m["matrices"]: (m["format"], m["bits_per_weight"]) for m in info(engine)["matrices"]}


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Of TOKENS behind the prompt."""
    rows = logits[PROMPT - 1 : -1].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    return rows[np.arange(len(rows)), TOKENS[PROMPT:]]


def test_kinds():
    methods = {(KINDS[name].config["quant_method"], KINDS[name].group) for name in ORDERED}
    assert methods == {(m, g) for m in ("gptq", "compressed-tensors") for g in (32, 64, 128)}


@pytest.mark.parametrize("name", ORDERED)
def test_four_bits_are_kept(tmp_path: Path, name: str):
    """In a prompt and by single tokens. Another rounding to 4 bits would be 0.3 away, another order
    of inputs further."""
    weights = tiny_quantized.write(tmp_path / name, name, config=LARGE)
    engine = Engine(tmp_path / name)
    expected = Reference(write_plain(tmp_path / "plain", weights, LARGE)).forward(TOKENS)
    assert engine.weights == "int4"
    found = engine.logits(TOKENS)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    decoded = engine.score(TOKENS, PROMPT)
    assert np.abs(decoded - log_probabilities(expected)).mean() < 0.2


@pytest.mark.parametrize("name", ORDERED)
def test_bits_per_weight_are_those_of_neighbours(tmp_path: Path, name: str):
    tiny_quantized.write(tmp_path / name, name, config=LARGE)
    tiny_quantized.write(tmp_path / "neighbours", f"gptq_{KINDS[name].group}", config=LARGE)
    found, expected = (formats(Engine(tmp_path / f)) for f in (name, "neighbours"))
    assert found == expected
    layers = ("q, k, v", "attention output", "gate, up", "down")
    assert {found[each][0] for each in layers} == {"int4, scale and minimum"}


def permuted(layer: Codes, rows: np.ndarray | None, cols: np.ndarray | None) -> Codes:
    rows = np.arange(len(layer.codes)) if rows is None else rows
    cols = np.arange(layer.codes.shape[1]) if cols is None else cols
    codes = layer.codes[rows][:, cols]
    return Codes(codes, layer.scales[rows], layer.zeros[rows], layer.group_of[cols], 4)


def mixed(size: int, random: np.random.RandomState) -> np.ndarray:
    """An order in which groups mix, and in each inputs are as before."""
    groups = random.permutation(np.arange(size) // 32)
    order = np.empty(size, np.int64)
    for g in range(size // 32):
        order[groups == g] = np.arange(32 * g, 32 * g + 32)
    return order


def write_twins(
    folder: Path, packing: Callable[[Codes], tiny_quantized.Tensors], settings: dict
) -> tuple[Path, Path]:
    """Two models that differ in the order of their neurons and of the channels of values alone:
    one has groups of neighbours."""
    random = np.random.RandomState(5)
    neurons, channels = mixed(256, random), [mixed(64, random) for _ in range(2)]
    of_values = np.concatenate([64 * i + order for i, order in enumerate(channels)])
    attended = np.concatenate([64 * i + channels[i // 2] for i in range(4)])
    rows = {"gate_proj": neurons, "up_proj": neurons, "v_proj": of_values}
    cols = {"down_proj": neurons, "o_proj": attended}
    plain: tiny_quantized.Tensors = {}
    ordered: tiny_quantized.Tensors = {}
    for key, values in tiny.make_weights(WIDE, seed=7).items():
        layer = key.removesuffix(".weight")
        own = layer.rpartition(".")[2]
        if not own.endswith("_proj"):
            plain[key] = ordered[key] = values
            continue
        made = tiny_quantized.quantize(values, 4, 32, zeros=True)
        plain |= {f"{layer}.{part}": v for part, v in packing(made).items()}
        other = permuted(made, rows.get(own), cols.get(own))
        ordered |= {f"{layer}.{part}": v for part, v in packing(other).items()}
    for name, tensors in ("plain", plain), ("ordered", ordered):
        tiny_quantized.write_folder(folder / name, WIDE | settings, tensors)
    return folder / "plain", folder / "ordered"


@pytest.mark.parametrize("method", ["gptq", "packed"])
def test_the_same_bits_as_of_neighbours(tmp_path: Path, method: str):
    """With TDA, too."""
    kind = KINDS["gptq_ordered"] if method == "gptq" else KINDS["packed_ordered_64"]
    config = kind.config
    if method == "packed":
        config = tiny_quantized.scheme(4, 32, False, "pack-quantized")
    plain, ordered = write_twins(tmp_path, kind.pack, {"quantization_config": config})
    expected, found = Engine(plain), Engine(ordered)
    assert expected.weights == found.weights == "int4"
    assert np.array_equal(found.logits(TOKENS), expected.logits(TOKENS))
    for tda in None, TDA(inputs=0.3):
        scores = [engine.score(TOKENS, PROMPT, tda) for engine in (expected, found)]
        assert np.array_equal(*scores)


@pytest.mark.parametrize("name", ["gptq_ordered_64", "packed_ordered", "gptq_apart"])
def test_threads_neighbours_and_folders_change_nothing(tmp_path: Path, name: str):
    tiny_quantized.write(tmp_path / name, name)
    convert(tmp_path / name, tmp_path / "packed", weights="int4")
    one = Engine(tmp_path / name, threads=1)
    texts = [TOKENS[:30], TOKENS[20:70], TOKENS[5:9]]
    options = {"max_new_tokens": 8, "ignore_eos": True}
    expected = [one.generate(text, **options).token_ids for text in texts]
    for engine in Engine(tmp_path / name, threads=3), Engine(tmp_path / "packed", threads=2):
        assert np.array_equal(engine.logits(TOKENS), one.logits(TOKENS))
        assert np.array_equal(engine.score(TOKENS, PROMPT), one.score(TOKENS, PROMPT))
        assert [each.token_ids for each in engine.generate(texts, **options)] == expected
        assert formats(engine) == formats(one)


def test_layers_that_differ_keep_eight_bits(tmp_path: Path):
    """Where layers that share inputs have other orders, no one order serves them."""
    weights = tiny_quantized.write(tmp_path / "apart", "gptq_apart")
    engine = Engine(tmp_path / "apart")
    found = {matrices: kind for matrices, (kind, _) in formats(engine).items()}
    assert (found["q, k, v"], found["gate, up"]) == ("graded", "graded")
    assert (found["attention output"], found["down"]) == ("int4, scale and minimum",) * 2
    expected = Reference(write_plain(tmp_path / "plain", weights)).forward(TOKENS)
    assert np.linalg.norm(engine.logits(TOKENS) - expected) < 0.05 * np.linalg.norm(expected)
    for tda in None, TDA(inputs=0.5):
        decoded = engine.score(TOKENS, PROMPT, tda)
        assert np.abs(decoded - log_probabilities(expected)).mean() < 0.3


@pytest.mark.parametrize("name", ["gptq_ordered_48", "gptq_8_ordered"])
def test_other_groups_keep_eight_bits(tmp_path: Path, name: str):
    tiny_quantized.write(tmp_path / name, name)
    assert Engine(tmp_path / name).weights == "int8"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(128, "128, expected 0 to 127 once each"), (-1, "-1, expected"), (None, " twice, expected")],
)
def test_damaged_orders_are_found(tmp_path: Path, value: int | None, expected: str):
    tiny_quantized.write(tmp_path / "folder", "gptq_ordered")
    convert(tmp_path / "folder", tmp_path / "packed", weights="int4")
    tensors = load_file(tmp_path / "folder/model.safetensors")
    groups = tensors["model.layers.1.self_attn.k_proj.g_idx"]
    order = np.argsort(groups, kind="stable").astype("<i4")
    file = tmp_path / "packed/model.safetensors"
    data = file.read_bytes()
    assert data.count(order.tobytes()) == 1
    broken = order.copy()
    broken[5] = order[17] if value is None else value
    file.write_bytes(data.replace(order.tobytes(), broken.tobytes()))
    match = f"model.safetensors: layer 1, order of inputs has .*{expected}.*the file is damaged"
    with pytest.raises(CheckpointError, match=match):
        Engine(tmp_path / "packed")
