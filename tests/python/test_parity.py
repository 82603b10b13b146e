"""The engine against stored results of transformers, see tools/make_golden.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from tdaengine import Engine
from tdaengine.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = np.load(GOLDEN / "tiny.npz")
GREEDY = json.loads((GOLDEN / "smollm2_greedy.json").read_text())


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


@pytest.fixture(scope="module", params=tiny.VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    name = request.param
    folder = tiny.write(tmp_path_factory.mktemp("parity") / name, name)
    return name, Engine(folder, weights="f32", threads=2, max_context=tiny.CONTEXT)


def test_prefill(variant: tuple[str, Engine]):
    name, engine = variant
    logits = engine.logits(tiny.tokens(name))
    close(logits[TINY["prefill_positions"]], TINY[f"{name}.prefill"], 1e-4)


def test_decode(variant: tuple[str, Engine]):
    name, engine = variant
    tokens, prompt = tiny.tokens(name), int(TINY["prompt_tokens"])
    session = engine.session(len(tokens))
    session.prefill(tokens[:prompt])
    rows = {position: session.decode(tokens[position]) for position in range(prompt, len(tokens))}
    close(np.stack([rows[p] for p in TINY["decode_positions"]]), TINY[f"{name}.decode"], 1e-4)


def test_prefill_in_parts(variant: tuple[str, Engine]):
    """The cache of earlier parts serves later ones."""
    name, engine = variant
    # Dynamic RoPE turns keys by the length there is when they come: only a whole gives the golden.
    ends = (80,) if name == "dynamic" else (1, 8, 41, 80)
    tokens = tiny.tokens(name)
    session = engine.session(len(tokens))
    for begin, end in zip((0, *ends), ends, strict=False):
        last = session.prefill(tokens[begin:end])
    close(last, TINY[f"{name}.prefill"][-1], 1e-4)


def test_bf16_storage_stays_near(tmp_path: Path):
    """bf16 has 8 bits: logits of size 3 move by some hundredths, and by as much again where the
    machine multiplies bf16 with bf16, so that prefill rounds what it multiplies."""
    tokens = tiny.tokens("llama_bf16")
    engine = Engine(tiny.write(tmp_path / "llama_bf16", "llama_bf16"))
    assert engine.weights == "bf16" and engine.kv == "bf16"
    logits = engine.logits(tokens)[TINY["prefill_positions"]]
    close(logits, TINY["llama_bf16.prefill"], 0.2)


# ---- the demo model


@pytest.fixture(scope="module")
def smollm2_f32(smollm2: Path) -> Engine:
    return Engine(smollm2, weights="f32")


@pytest.fixture(scope="module")
def text() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "smollm2_text.npz"))


@pytest.mark.parametrize("index", range(len(GREEDY)))
def test_greedy_tokens(smollm2_f32: Engine, index: int):
    golden = GREEDY[index]
    count = len(golden["tokens"])
    out = smollm2_f32.generate(golden["prompt"], max_new_tokens=count, ignore_eos=True)
    assert out.token_ids == golden["tokens"]


def test_chat_prompts(smollm2_f32: Engine):
    prompts = json.loads((GOLDEN / "inputs.json").read_text())["prompts"]
    for prompt, golden in zip(prompts, GREEDY, strict=True):
        if prompt["chat"]:
            ids = smollm2_f32.chat_prompt([{"role": "user", "content": prompt["text"]}])
        else:
            ids = smollm2_f32.tokenizer.encode(prompt["text"])
        assert ids == golden["prompt"]


def test_text_logits(smollm2_f32: Engine, text: dict[str, np.ndarray]):
    logits = smollm2_f32.logits(text["tokens"])
    close(logits[np.ix_(text["positions"], text["ids"])], text["logits"], 2e-3)
    assert np.array_equal(logits.argmax(1), text["top"])


def test_text_top_tokens_in_bf16(smollm2: Path, text: dict[str, np.ndarray]):
    top = Engine(smollm2, weights="bf16").logits(text["tokens"]).argmax(1)
    assert np.mean(top == text["top"]) >= 0.98


def test_tokenizer(smollm2: Path):
    tokenizer = Tokenizer.load(smollm2)
    for golden in json.loads((GOLDEN / "smollm2_tokenizer.json").read_text()):
        assert tokenizer.encode(golden["text"]) == golden["ids"], golden["text"]
        decoded = tokenizer.decode(golden["ids"], skip_special_tokens=False)
        assert decoded == golden["decoded"], golden["text"]
