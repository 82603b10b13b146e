"""convert --weights: engine folders, packed once, then mapped and used in place."""

from __future__ import annotations

import json
import os
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_gguf
from conftest import PROMPT
from converting import read_json, refused

from tdaengine import TDA, CheckpointError, Engine, OptionError, cli
from tdaengine.convert import convert

TOKENS = tiny.tokens("llama")
SHORT = ["--max-new-tokens", "8", "--ignore-eos"]


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("packed") / "int8"
    convert(folder, destination, weights="int8")
    return destination


@pytest.fixture
def run(capsys):
    """main() of some arguments -> the JSON on stdout."""

    def call(*arguments: object) -> dict:
        assert cli.main([str(argument) for argument in (*arguments, "--json")]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4", "bf16c", "graded"])
@pytest.mark.parametrize(
    "variant",
    ["llama_tied", "llama_bias", "llama_odd", "qwen3", "gemma2", "gemma3", "granite", "phi3"],
)
def test_the_same_bits(tmp_path: Path, variant: str, weights: str):
    source = tiny.write(tmp_path / "source", variant)
    convert(source, tmp_path / "packed", weights=weights)
    expected, found = Engine(source, weights=weights), Engine(tmp_path / "packed")
    assert (found.weights, found.kv) == (weights, expected.kv)
    tokens = tiny.tokens(variant)
    assert np.array_equal(found.logits(tokens), expected.logits(tokens))


def test_command_line(run, folder: Path, tmp_path: Path):
    made = run("convert", folder, tmp_path / "out", "--weights", "int8")
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(made["files"]) == names | {"checksums.sha256"}
    expected = run("generate", folder, PROMPT, *SHORT, "--weights", "int8")
    found = run("generate", tmp_path / "out", PROMPT, *SHORT)
    assert found["text"] == expected["text"]
    assert found["token_ids"] == expected["token_ids"]
    info = run("info", tmp_path / "out")
    plain = run("info", folder, "--weights", "int8")
    for key in ("fingerprint", "parameters", "weights", "weight_bytes", "kv", "config"):
        assert info[key] == plain[key], key


def test_shards_are_packed(run, tmp_path: Path):
    source = tiny.write(tmp_path / "shards", "llama_sharded")
    made = run("convert", source, tmp_path / "out", "--weights", "auto")
    assert set(made["files"]) == {"config.json", "model.safetensors", "checksums.sha256"}
    assert Engine(tmp_path / "out").weights == "f32"
    assert np.array_equal(Engine(tmp_path / "out").logits(TOKENS), Engine(source).logits(TOKENS))


def test_thresholds_serve_both(folder: Path, packed: Path):
    plain, mapped = Engine(folder, weights="int8"), Engine(packed)
    for made_by, used_by in ((plain, mapped), (mapped, plain)):
        thresholds = made_by.calibrate([TOKENS], scope="token", error=0.2)
        tda = TDA(scope="token", thresholds=thresholds)
        scores = [engine.score(TOKENS, 40, tda) for engine in (made_by, used_by)]
        assert np.array_equal(*scores)


def test_config_keeps_its_own_keys(folder: Path, packed: Path):
    config = read_json(packed / "config.json")
    ours = config.pop("tdaengine")
    assert config == read_json(folder / "config.json")
    assert (ours["layout"], ours["weights"]) == (8, "int8")
    assert ours["fingerprint"] == Engine(folder).fingerprint


def test_the_format_stays(packed: Path):
    Engine(packed, weights="int8")
    with pytest.raises(OptionError, match=r'weights is "bf16", but .* is packed as int8'):
        Engine(packed, weights="bf16")


def test_weights_stay_in_the_page_cache(packed: Path):
    engine = Engine(packed)
    engine.logits(TOKENS)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    line = next(
        x for x in maps.read_text().splitlines() if x.endswith(f"{packed}/model.safetensors")
    )
    assert line.split()[1].startswith("r--")


def test_a_failing_write_leaves_nothing_behind(folder: Path, tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        parts = ("model.safetensors", "cannot be written")
        refused(folder, tmp_path / "parent", CheckpointError, *parts, weights="int8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_refused(folder: Path, packed: Path, tmp_path: Path):
    parent = tmp_path / "parent"
    refused(folder, parent, OptionError, 'weights is "int3"', weights="int3")
    refused(folder, parent, OptionError, "one of the two", weights="int8", dtype="bf16")
    refused(packed, parent, CheckpointError, "found an engine folder")
    refused(packed, parent, OptionError, "is packed as int8", weights="bf16")
    refused(tmp_path / "nowhere", parent, CheckpointError, "nowhere", weights="int8")
    with pytest.raises(OptionError, match="not empty"):
        convert(folder, packed, weights="int8")


def test_gguf(tmp_path: Path):
    weights = tiny.make_weights(tiny.BASE, seed=1)
    source = tiny_gguf.write(tmp_path / "model.gguf", tiny.BASE, weights)
    convert(source, tmp_path / "plain")
    convert(source, tmp_path / "packed", weights="int8")
    assert sorted(os.listdir(tmp_path)) == ["model.gguf", "packed", "plain"]
    plain, packed = Engine(tmp_path / "plain", weights="int8"), Engine(tmp_path / "packed")
    assert np.array_equal(plain.logits(TOKENS), packed.logits(TOKENS))
    assert packed.fingerprint == Engine(source).fingerprint
    assert packed.tokenizer.encode("a") == plain.tokenizer.encode("a")


def test_f16_that_auto_rounds_to_bf16_is_said(tmp_path: Path):
    """transformers would keep it; bf16 has 8 significant bits of f16's 11."""
    halves = tiny.write(tmp_path / "f16", "llama_f16")
    said = 'weights "auto": f16 holds f16, which bf16 rounds from 11 significant bits to 8'
    with pytest.warns(UserWarning, match=said):
        engine = Engine(halves)
    assert engine.weights == "bf16"
    assert len(engine.notices) == 1
    with pytest.warns(UserWarning, match=said):
        convert(halves, tmp_path / "engine", weights="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weights in ("f32", "bf16", "int8", "bf16c"):  # asked for
            assert Engine(halves, weights=weights).notices == []
        for name in ("llama", "llama_bf16"):
            assert Engine(tiny.write(tmp_path / name, name)).notices == []
        assert Engine(tmp_path / "engine").notices == []  # said when it was made
