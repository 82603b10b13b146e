"""convert --weights int4 --data: weights rounded by what the texts make the products' inputs."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import tiny
import tiny_gguf
from converting import read_json, refused

from tdaengine import Engine, OptionError, _native, cli
from tdaengine.convert import convert
from tdaengine.info import describe, info

TEXTS = [
    "The ferry leaves at seven, and the harbour is quiet until then. " * 3,
    "Rain fell on the roofs; nobody had expected it so early in the year. " * 6,
    "Numbers: 1, 2, 3, 10, 250. Names: Ada, Grace, Emmy.",
]


def pack(source: Path, destination: Path, texts: list[list[int]]) -> None:
    _native.pack_checkpoint(str(source), str(destination), "int4", None, texts)


def rounding_error(folder: Path, exact: Engine, text: str) -> float:
    tokens = exact.tokenizer.encode(text)[:128]
    difference = Engine(folder, threads=2).logits(tokens) - exact.logits(tokens)
    return float((difference**2).mean())


def test_texts_lower_the_error(folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "plain", weights="int4")
    convert(folder, tmp_path / "by_texts", weights="int4", texts=TEXTS)
    exact = Engine(folder, weights="f32", threads=2)
    for text in (TEXTS[1], "The harbour was quiet; rain fell on Grace and Ada at ten."):
        plain = rounding_error(tmp_path / "plain", exact, text)
        assert rounding_error(tmp_path / "by_texts", exact, text) < 0.8 * plain
    assert Engine(tmp_path / "by_texts").weights == "int4"


def test_info_counts_the_tokens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, ""]))
    arguments = ["convert", str(folder), str(tmp_path / "out"), "--weights", "int4"]
    assert cli.main([*arguments, "--data", str(data), "--json"]) == 0
    engine = Engine(tmp_path / "out", threads=1)
    tokens = sum(len(engine.tokenizer.encode(text)) for text in [*TEXTS, ""])
    assert read_json(tmp_path / "out" / "config.json")["tdaengine"]["calibration_tokens"] == tokens
    assert info(engine)["calibration_tokens"] == tokens
    assert f"rounded by               {tokens:,} tokens of text" in describe(info(engine))
    plain = info(Engine(folder, threads=1))
    assert plain["calibration_tokens"] is None and "rounded by" not in describe(plain)


@pytest.mark.parametrize(
    "variant", ["llama_tied", "llama_bias", "qwen3", "gemma2", "gemma3", "phi3"]
)
def test_every_kind_of_layer(tmp_path: Path, variant: str):
    """Texts of ids alone, beyond the model's context."""
    source = tiny.write(tmp_path / "source", variant)
    tokens = tiny.tokens(variant)
    errors = []
    for name, texts in (("plain", []), ("by_texts", [tokens * 4, tokens[:1], tokens[3:50]])):
        (tmp_path / name).mkdir()
        pack(source, tmp_path / name, texts)
        difference = Engine(tmp_path / name).logits(tokens) - Engine(source).logits(tokens)
        errors.append(float((difference**2).mean()))
    assert errors[1] < 0.8 * errors[0]


def test_what_texts_cannot_round(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    config = tiny.BASE | {"hidden_size": 64, "intermediate_size": 96}
    four = tiny_gguf.write(
        tmp_path / "four.gguf",
        config,
        tiny.make_weights(config, seed=1),
        quantized=gguf.GGMLQuantizationType.Q4_1,
    )
    with pytest.raises(OptionError, match="keep the bits they have in int4"):
        pack(four, tmp_path / "empty", [[1, 2, 3]])
    with pytest.raises(OptionError, match=r"tokens\[1\] = 100000"):
        pack(folder, tmp_path / "empty", [[1, 100000]])
    assert not list((tmp_path / "empty").iterdir())
    convert(folder, tmp_path / "packed", weights="int4")
    refused(
        *(tmp_path / "packed", tmp_path / "a", OptionError, "found engine folder"),
        weights="int4",
        texts=TEXTS,
    )
