"""Which file has the last word: ends of texts, a head of its own, tensors that nobody asks for.

Right is what transformers 5.24 does; tests/live/test_live_files.py runs it on the same folders.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from tdaengine import CheckpointError, Engine
from tdaengine.convert import convert

# config.json, generation_config.json or None, and the ids that end a text.
ENDS = [
    ({"eos_token_id": 5}, None, [5]),
    ({"eos_token_id": [5, 6]}, None, [5, 6]),
    ({"eos_token_id": 5}, {"eos_token_id": 7}, [7]),
    ({"eos_token_id": [5, 6]}, {"eos_token_id": [7]}, [7]),
    ({"eos_token_id": None}, {"eos_token_id": [7, 8]}, [7, 8]),
    ({"eos_token_id": 5}, {"bos_token_id": 1}, []),
    ({"eos_token_id": 5}, {"eos_token_id": None}, []),
    ({"eos_token_id": 5}, {}, []),
]


def write(folder: Path, config: dict, generation: dict | None = None) -> Path:
    tiny.write(folder, "llama")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def change_weights(folder: Path, **changes: np.ndarray) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changes, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("config", "generation", "expected"), ENDS)
def test_ends_of_texts(tmp_path: Path, config: dict, generation: dict | None, expected: list[int]):
    engine = Engine(write(tmp_path / "model", config, generation), threads=1)
    assert engine.config.eos_tokens == expected


def test_a_head_of_its_own_counts_more_than_tied_embeddings(tmp_path: Path):
    """As does an engine folder made of it."""
    own = write(tmp_path / "own", {"tie_word_embeddings": False})
    said_tied = shutil.copytree(own, tmp_path / "tied")
    config = json.loads((own / "config.json").read_text()) | {"tie_word_embeddings": True}
    (said_tied / "config.json").write_text(json.dumps(config))
    convert(said_tied, tmp_path / "packed", weights="f32")
    tokens = tiny.tokens("llama")
    expected = Engine(own, weights="f32", threads=1).logits(tokens)
    for folder in (said_tied, tmp_path / "packed"):
        assert np.array_equal(Engine(folder, threads=1).logits(tokens), expected)
    embedding = load_file(own / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(said_tied, **{"lm_head.weight": embedding})
    assert Engine(said_tied, threads=1).config.tied_embeddings


@pytest.mark.parametrize("variant", ["llama", "mistral_sliding", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "name",
    ["self_attn.o_proj.bias", "mlp.gate_proj.bias", "input_layernorm.bias", "mlp.lora_A.weight"],
)
def test_tensors_that_would_be_left_out(tmp_path: Path, variant: str, name: str):
    folder = tiny.write(tmp_path / "model", variant)
    change_weights(folder, **{f"model.layers.1.{name}": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.{name}\" is none that config"):
        Engine(folder, threads=1)


def test_frequencies_of_rope_are_known(tmp_path: Path):
    folder = tiny.write(tmp_path / "model", "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, **{name: np.ones(6, np.float32)})
    Engine(folder, threads=1)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_config_with_numbers_that_are_not_finite(tmp_path: Path, number: float):
    """Python writes and reads them, so such files exist."""
    folder = write(tmp_path / "model", {"initializer_range": number}, {"length_penalty": number})
    Engine(folder, threads=1)
    convert(folder, tmp_path / "packed", weights="f32")
    Engine(tmp_path / "packed", threads=1)
    other = write(tmp_path / "other", {"rms_norm_eps": number})
    text = json.dumps(number)
    with pytest.raises(CheckpointError, match=f'rms_norm_eps is "{text}", expected a number'):
        Engine(other, threads=1)
