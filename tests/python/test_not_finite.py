"""Weights whose products overflow, and engine folders with flipped bits: every call raises, in
every format, with every instruction set of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from tdaengine import TDA, CheckpointError, Engine, Error
from tdaengine.convert import convert

FORMATS = ("f32", "bf16", "bf16c", "int8", "int4", "graded")
TOKENS = tiny.tokens("llama")[:40]
PROMPT = 30
LAYER = "model.layers.1."
# What is too large, and how much: 3e38 overflows in the first product, 1e25 in the squares of the
# next norm.
DAMAGED = {
    "v_proj": (LAYER + "self_attn.v_proj.weight", 3e38),
    "k_proj": (LAYER + "self_attn.k_proj.weight", 3e38),
    "o_proj": (LAYER + "self_attn.o_proj.weight", 3e38),
    "gate_proj": (LAYER + "mlp.gate_proj.weight", 3e38),
    "down_proj": (LAYER + "mlp.down_proj.weight", 1e38),
    "norm": (LAYER + "input_layernorm.weight", 3e38),
    "v_proj, squares": (LAYER + "self_attn.v_proj.weight", 1e25),
    "last norm": ("model.norm.weight", 3e38),
    "embedding": ("model.embed_tokens.weight", 1e25),
}


@pytest.fixture(params=["portable", "avx2"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TDA_CPU_ISA", request.param)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("finite") / "llama", "llama")


def damage(folder: Path, to: Path, name: str) -> Path:
    tensor, size = DAMAGED[name]
    shutil.copytree(folder, to)
    tensors = load_file(folder / "model.safetensors")
    values = tensors[tensor]
    values[...] = size * np.where(np.arange(values.size).reshape(values.shape) % 3, 1, -1)
    save_file(tensors, to / "model.safetensors")
    return to


def calls(engine: Engine) -> dict[str, Callable[[], object]]:
    scopes = {
        "dense": None,
        "sequence": TDA(active=0.5),
        "error": TDA(error=0.1),
        "token": TDA(scope="token", active=0.5),
        "cats": TDA.cats(active=0.5),
    }
    if engine.weights in ("graded", "int4"):
        scopes = {"dense": None, "inputs": TDA(inputs=0.3)}
    result: dict[str, Callable[[], object]] = {
        "logits": lambda: engine.logits(TOKENS),
        "session": lambda: engine.session(40).prefill(TOKENS),
        "top_k": lambda: engine.generate(TOKENS, max_new_tokens=2, temperature=1.0, top_k=5),
    }
    for scope, tda in scopes.items():
        result[f"generate {scope}"] = lambda t=tda: engine.generate(
            TOKENS[:PROMPT], max_new_tokens=5, tda=t
        )
        result[f"score {scope}"] = lambda t=tda: engine.score(TOKENS, PROMPT, tda=t)
    return result


@pytest.mark.parametrize("name", DAMAGED)
def test_every_call_raises(folder: Path, tmp_path: Path, name: str, isa: str):
    damaged = damage(folder, tmp_path / "model", name)
    for weights in FORMATS:
        for kv in ("auto", "int8"):
            engine = Engine(damaged, weights=weights, kv=kv, threads=1, device="cpu")
            for call, run in calls(engine).items():
                with pytest.raises(Error, match="finite"):
                    run()
                    pytest.fail(f"{weights}, kv {kv}, {call}: nothing raised")


def test_a_token_that_fails_leaves_the_session_as_it_was(folder: Path, tmp_path: Path, isa: str):
    """Its row of the embedding alone is damaged: no other token meets it."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = 3e38
    damaged = shutil.copytree(folder, tmp_path / "model")
    save_file(tensors, damaged / "model.safetensors")
    good = [t for t in TOKENS if t != 5]
    for weights in FORMATS:
        engine = Engine(damaged, weights=weights, threads=1, device="cpu")
        session, untouched = engine.session(60), engine.session(60)
        assert np.array_equal(session.prefill(good), untouched.prefill(good))
        with pytest.raises(Error, match="not finite"):
            session.decode(5)
        with pytest.raises(Error, match="not finite"):
            session.prefill([7, 5, 8])
        assert session.position == len(good)
        for token in good[:5]:
            assert np.array_equal(session.decode(token), untouched.decode(token))
        if weights in ("graded", "int4"):  # makes no use of the statistic
            continue
        with pytest.raises(Error, match="finite"):  # what it has seen is in the statistic
            session.apply(TDA(active=0.5))


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_of_an_engine_folder_are_checked(
    folder: Path, tmp_path: Path, weights: str, value: float
):
    engine_folder = tmp_path / "engine"
    convert(folder, engine_folder, weights=weights)
    file = engine_folder / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(folder / "model.safetensors")
    for name, what in {
        LAYER + "input_layernorm.weight": "layer 1, norm before attention",
        LAYER + "post_attention_layernorm.weight": "layer 1, norm before the feed-forward",
        "model.norm.weight": "last norm",
    }.items():
        stored = tensors[name].astype("<f4")
        place = whole.index(stored.tobytes())
        stored[3] = value
        file.write_bytes(whole[:place] + stored.tobytes() + whole[place + stored.nbytes :])
        with pytest.raises(CheckpointError, match=f"{what}.*, value 3 is -?(nan|inf)"):
            Engine(engine_folder)
    file.write_bytes(whole)
    Engine(engine_folder).logits(TOKENS)


def test_a_flipped_bit_of_a_norm(folder: Path, tmp_path: Path, isa: str):
    """Of the exponent's highest bit: numbers below 1 become about 1e38, others NaN or infinity."""
    for weights in ("int8", "int4"):
        engine_folder = tmp_path / weights
        convert(folder, engine_folder, weights=weights)
        file = engine_folder / "model.safetensors"
        whole = file.read_bytes()
        stored = load_file(folder / "model.safetensors")[LAYER + "input_layernorm.weight"]
        place = whole.index(stored.astype("<f4").tobytes())
        for i in (int(np.argmax(stored < 1)), int(np.argmax(stored >= 1))):
            flipped = bytearray(whole)
            flipped[place + 4 * i + 3] ^= 0x40
            file.write_bytes(flipped)
            if stored[i] >= 1:
                with pytest.raises(CheckpointError, match=f"value {i} is"):
                    Engine(engine_folder)
                continue
            engine = Engine(engine_folder, device="cpu")
            for run in calls(engine).values():
                with pytest.raises(Error, match="finite"):
                    run()


@pytest.mark.parametrize("weights", FORMATS)
def test_tokens_out_of_a_window_do_not_sort_what_is_not_finite(tmp_path: Path, weights: str):
    """The prompt's last token does not see the damaged one, but the thresholds' samples do."""
    folder = tiny.write(tmp_path / "mistral", "mistral_sliding")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = 3e38
    save_file(tensors, folder / "model.safetensors")
    others = [t for t in tiny.tokens("mistral_sliding") if t != 5]
    tokens = [5, *(2 * others)[:100]]
    engine = Engine(folder, weights=weights, threads=1, device="cpu")
    assert np.isfinite(engine.score(tokens, 96)).all()  # windows and prefill's panels later
    with pytest.raises(Error, match="not finite"):
        engine.logits(tokens)
    settings = (TDA(scope="token", active=0.5), TDA(scope="token", error=0.1), TDA(active=0.5))
    for tda in (TDA(inputs=0.5),) if weights in ("graded", "int4") else settings:
        with pytest.raises(Error, match="finite"):
            engine.score(tokens, 96, tda=tda)
