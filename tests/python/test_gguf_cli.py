"""Every command takes a GGUF file where it takes a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tiny_gguf
from gguf import GGMLQuantizationType

from tdaengine import Engine, Thresholds, cli

CONFIG = tiny.BASE | {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96}
TEMPLATE = "{% for m in messages %}{{ m.content }}<tool>{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    metadata = {"tokenizer.chat_template": TEMPLATE}
    kind = GGMLQuantizationType.Q4_1
    return tiny_gguf.write(
        path, CONFIG, tiny.make_weights(CONFIG, seed=1), metadata, quantized=kind
    )


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """main() of some arguments with --json -> the result."""

    def call(*arguments: object) -> dict:
        assert cli.main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


SHORT = ("--max-new-tokens", "8", "--ignore-eos", "--temperature", "0")


def test_info(run, model: Path):
    info = run("info", model)
    assert info["path"] == str(model) and info["weights"] == "int4"
    assert info["files"] == {"model.gguf": model.stat().st_size}
    assert info["fingerprint"] == Engine(model).fingerprint
    assert info["config"]["model_type"] == "llama"


def test_generate_and_chat(run, model: Path):
    expected = Engine(model).generate("12 ab", max_new_tokens=8, ignore_eos=True)
    found = run("generate", model, "12 ab", *SHORT)
    assert found["token_ids"] == expected.token_ids and found["text"] == expected.text != ""
    answer = run("chat", model, "--message", "12 ab", "--weights", "int8", *SHORT)
    engine = Engine(model, weights="int8")
    message = {"role": "user", "content": "12 ab"}
    expected = engine.chat([message], max_new_tokens=8, ignore_eos=True)
    assert answer["token_ids"] == expected.token_ids


def test_evaluate_and_bench(run, model: Path, tmp_path: Path):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "1234 ab ab 12 12"}\n' * 2)
    settings = ("--prompt-tokens", "4", "--score-tokens", "4")
    result = run("evaluate", model, "--data", data, *settings)
    assert result["dense"]["texts"] == 2 and result["dense"]["perplexity"] > 1
    small = ("--prefill", "8", "--context", "8", "--new-tokens", "4", "--rounds", "1")
    assert run("bench", model, *small)["path"] == str(model)


def test_thresholds_lie_beside_the_file(run, model: Path, tmp_path: Path):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "1234 ab ab 12 12"}\n{"text": "ab 1 2 3"}')
    run("calibrate", model, "--weights", "graded", "--data", data)
    assert Thresholds.load(str(model.with_name("model.tda.json"))).inputs
    found = run("generate", model, "12", *SHORT, "--weights", "graded", "--tda", "loss=0.1")
    assert "for a loss of 10%" in found["stats"]["tda"]


def test_convert(run, model: Path, tmp_path: Path):
    run("convert", model, tmp_path / "packed", "--weights", "int8")
    assert run("info", tmp_path / "packed", "--verify")["weights"] == "int8"
    tokens = [1, 2, 3]
    packed, file = Engine(tmp_path / "packed"), Engine(model, weights="int8")
    assert (packed.logits(tokens) == file.logits(tokens)).all()
