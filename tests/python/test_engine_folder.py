"""Engine folders: packed weights that are mapped and used in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tiny_gguf

from tdaengine import TDA, CheckpointError, Engine, OptionError
from tdaengine.convert import convert

TOKENS = tiny.tokens("llama")
FORMATS = ["f32", "bf16", "int8"]
VARIANTS = ["llama", "llama_bias", "llama_odd", "qwen3", "llama_tied"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("engine-folder") / "source", "llama")


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "packed", weights="int8")
    return tmp_path / "packed"


def header_of(folder: Path) -> tuple[dict, bytes]:
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(folder: Path, header: dict, data: bytes, pad: int = 4096) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % pad)
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v in tiny.VARIANTS])
def test_the_same_bits(tmp_path: Path, variant: str, weights: str):
    source = tiny.write(tmp_path / "source", variant)
    convert(source, tmp_path / "packed", weights=weights)
    expected, found = Engine(source, weights=weights), Engine(tmp_path / "packed")
    assert found.weights == weights and found.fingerprint == expected.fingerprint
    assert found.weight_bytes == expected.weight_bytes
    tokens = tiny.tokens(variant)
    assert (found.logits(tokens) == expected.logits(tokens)).all()
    tda = TDA(scope="token", active=0.5)
    scores = [e.score(tokens, prompt_tokens=40, tda=tda) for e in (expected, found)]
    assert (scores[0] == scores[1]).all()


def test_thresholds_serve_both(source: Path, packed: Path):
    thresholds = Engine(source, weights="int8").calibrate([TOKENS], scope="token", error=0.2)
    tda = TDA(scope="token", thresholds=thresholds)
    assert len(Engine(packed).score(TOKENS, prompt_tokens=40, tda=tda)) == len(TOKENS) - 40


def test_data_is_aligned_and_alone(packed: Path):
    header, data = header_of(packed)
    size = (packed / "model.safetensors").stat().st_size
    assert (size - len(data)) % 4096 == 0
    assert set(header) == {"__metadata__", "tdaengine.arena"}
    assert Engine(packed).weight_bytes == len(data)


def test_the_format_cannot_be_changed(packed: Path):
    Engine(packed, weights="int8")
    with pytest.raises(OptionError, match=r"weights bf16: .*holds int8, expected that or auto"):
        Engine(packed, weights="bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "0"}, 'layout "0", expected "1"'),
        ({"layout": None}, 'layout "", expected "1"'),
        ({"weights": "int3"}, 'format "int3", expected one that'),
        ({"weights": "auto"}, 'format "auto", expected one that'),
        ({"fingerprint": "x"}, 'fingerprint "x", expected 16'),
        ({"parameters": "1x"}, 'parameters "1x", expected a positive'),
        ({"weights": "f32"}, "bytes of packed weights, expected"),
    ],
)
def test_metadata_is_checked(packed: Path, change: dict, message: str):
    header, data = header_of(packed)
    metadata = {**header["__metadata__"], **change}
    header["__metadata__"] = {k: v for k, v in metadata.items() if v is not None}
    rewrite(packed, header, data)
    with pytest.raises(CheckpointError, match=message):
        Engine(packed)


def test_the_tensor_is_checked(packed: Path):
    header, data = header_of(packed)
    rewrite(packed, header, data, pad=4096 // 8 + 8)
    with pytest.raises(CheckpointError, match="not aligned, expected data at a multiple of 4096"):
        Engine(packed)
    rewrite(packed, header, data[:-64])
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        Engine(packed)
    entry = {"dtype": "U8", "shape": [len(data) - 64], "data_offsets": [0, len(data) - 64]}
    rewrite(packed, {**header, "tdaengine.arena": entry}, data[:-64])
    with pytest.raises(CheckpointError, match="bytes of packed weights, expected"):
        Engine(packed)
    entry = {**header["tdaengine.arena"], "dtype": "I8"}
    rewrite(packed, {**header, "tdaengine.arena": entry}, data)
    with pytest.raises(CheckpointError, match="dtype I8 and shape"):
        Engine(packed)


def test_an_engine_folder_is_no_source(packed: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="dtype U8, expected F32, F16, BF16"):
        convert(packed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_options(source: Path, tmp_path: Path):
    with pytest.raises(OptionError, match='weights is "int3"'):
        convert(source, tmp_path / "out", weights="int3")
    with pytest.raises(OptionError, match="expected one of the two"):
        convert(source, tmp_path / "out", weights="int8", dtype="bf16")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_becomes_one(tmp_path: Path):
    config = {**tiny.BASE, **tiny.VARIANTS["llama"].config}
    path = tiny_gguf.write(tmp_path / "tiny.gguf", config, tiny.make_weights(config, seed=1))
    convert(path, tmp_path / "plain")
    convert(path, tmp_path / "packed", weights="int8")
    expected, found = Engine(tmp_path / "plain", weights="int8"), Engine(tmp_path / "packed")
    assert (found.logits([5, 6, 7]) == expected.logits([5, 6, 7])).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "plain", "tiny.gguf"]
