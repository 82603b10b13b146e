"""convert from a folder: one folder out, complete or not at all."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import tiny
from converting import read_json, refused
from safetensors.numpy import load_file, save_file

from tdaengine import CheckpointError, Engine, OptionError
from tdaengine.convert import convert
from tdaengine.tensors import Tensor, cast


def test_folder_is_copied_as_it_is(folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json") == read_json(folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    given = load_file(folder / "model.safetensors")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert given.keys() == made.keys()
    assert all(np.array_equal(given[name], made[name]) for name in given)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_shards_are_merged(tmp_path: Path):
    source = tiny.write(tmp_path / "shards", "llama_sharded")
    steps = []
    convert(source, tmp_path / "out", progress=lambda done, total: steps.append((done, total)))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "checksums.sha256"}
    made = load_file(tmp_path / "out" / "model.safetensors")
    given = {k: v for path in source.glob("*.safetensors") for k, v in load_file(path).items()}
    assert given.keys() == made.keys()
    assert all(np.array_equal(given[name], made[name]) for name in given)
    sizes = [done for done, _ in steps]
    assert len(steps) == len(given) and sizes == sorted(sizes)
    assert steps[-1] == (sum(v.nbytes for v in given.values()),) * 2


@pytest.mark.parametrize("variant", ["llama_f16", "llama_bf16"])
def test_widening_is_exact(tmp_path: Path, variant: str):
    source = tiny.write(tmp_path / variant, variant)
    convert(source, tmp_path / "out", dtype="f32")
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "float32"
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert {values.dtype for values in made.values()} == {np.dtype(np.float32)}
    tokens = tiny.tokens(variant)
    given, converted = Engine(source, weights="f32"), Engine(tmp_path / "out")
    assert converted.weights == "f32"
    assert np.array_equal(given.logits(tokens), converted.logits(tokens))


def test_narrowing_rounds_to_nearest_even():
    bits = {
        0x3F800000: 0x3F80,
        0x3F808000: 0x3F80,  # a tie: down to even
        0x3F818000: 0x3F82,  # a tie: up to even
        0x3F808001: 0x3F81,
        0x3F807FFF: 0x3F80,
        0xBF818000: 0xBF82,
        0x80000000: 0x8000,
        0x00000001: 0x0000,
    }
    values = np.array(list(bits), np.uint32).view(np.float32)
    tensor = Tensor("x", "F32", values.shape, Path("file"), lambda: values)
    assert cast(tensor, "BF16").tolist() == list(bits.values())


def test_values_that_stop_being_finite_are_refused(folder: Path, tmp_path: Path):
    for value, dtype in ((np.nan, "auto"), (np.inf, "bf16"), (3.4e38, "bf16")):
        source = tmp_path / "source"
        source.mkdir(exist_ok=True)
        (source / "config.json").write_bytes((folder / "config.json").read_bytes())
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] = value
        save_file(weights, source / "model.safetensors")
        name = '"model.norm.weight" has 1 values that are not finite'
        refused(source, tmp_path / "parent", CheckpointError, name, dtype=dtype)


def test_rotary_buffers_are_left_out(folder: Path, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {buffer: np.ones(4, np.float32)}, source / "model.safetensors")
    convert(source, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()


def test_broken_folders_leave_nothing_behind(tmp_path: Path):
    parent = tmp_path / "parent"
    source = tiny.write(tmp_path / "source", "llama")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-1])
    refused(source, parent, CheckpointError, "model.safetensors")
    (source / "model.safetensors").write_bytes(b"{}")
    refused(source, parent, CheckpointError, "model.safetensors")
    (source / "model.safetensors").unlink()
    refused(source, parent, CheckpointError, "no weights found", "model.safetensors")
    (source / "model.safetensors").write_bytes(data)
    (source / "config.json").write_text("{")
    refused(source, parent, CheckpointError, "config.json")
    (source / "config.json").write_text("[" * 100_000)
    refused(source, parent, CheckpointError, "config.json", "levels")
    (source / "config.json").write_text("[]")
    refused(source, parent, CheckpointError, "config.json", "list")
    refused(tmp_path / "nowhere", parent, CheckpointError, "nowhere", "not found")


def test_broken_indices_leave_nothing_behind(tmp_path: Path):
    parent = tmp_path / "parent"
    source = tiny.write(tmp_path / "source", "llama_sharded")
    index = source / "model.safetensors.index.json"
    content = read_json(index)
    name, shard = next(iter(content["weight_map"].items()))
    for entries, part in (
        (content["weight_map"] | {"absent": shard}, "absent"),
        (content["weight_map"] | {name: "../" + shard}, "without folders"),
        (content["weight_map"] | {name: 3}, "3"),
        ({}, "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": entries}))
        refused(source, parent, CheckpointError, part)
    index.write_text(json.dumps(content))
    (source / shard).unlink()
    refused(source, parent, CheckpointError, shard)


def test_a_failing_write_leaves_nothing_behind(folder: Path, tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused(folder, tmp_path / "parent", CheckpointError, "out", "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    refused(folder, tmp_path / "parent", KeyboardInterrupt, progress=interrupt)


def test_destination(folder: Path, tmp_path: Path):
    refused(folder, tmp_path / "parent", OptionError, "dtype", "int3", dtype="int3")
    with pytest.raises(OptionError, match="nowhere"):
        convert(folder, tmp_path / "nowhere" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="found a file"):
        convert(folder, tmp_path / "file")
    with pytest.raises(OptionError, match="not empty"):
        convert(folder, folder)
    (tmp_path / "empty").mkdir()
    convert(folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()
