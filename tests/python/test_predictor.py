"""Predictors of active neurons (DejaVu, MoEfication) in the engine, from files made by hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import predictors
import pytest
import tiny
from reference import Reference

from tdaengine import TDA, CheckpointError, Engine, OptionError, Predictor
from tdaengine.evaluate import describe_run
from tdaengine.options import parse_tda

PROMPT = 40
TOKENS = tiny.tokens("llama")
EXPERTS = 8
WEIGHTS = ("f32", "bf16", "bf16c", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("predictor") / "llama", "llama")


@pytest.fixture(scope="module")
def f32(folder: Path) -> Engine:
    return Engine(folder, device="cpu", threads=2)


@pytest.fixture(scope="module")
def dejavu(f32: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dejavu") / "predictor.safetensors"
    return predictors.write(path, f32, predictors.make_layers(f32, rank=7))


@pytest.fixture(scope="module")
def experts(f32: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "experts.safetensors"
    return predictors.write(path, f32, predictors.make_layers(f32, EXPERTS, EXPERTS))


def expected_scores(folder: Path, layers: predictors.Layers, count: int) -> np.ndarray:
    reference = Reference(folder)
    reference.choose = lambda layer, x: predictors.chosen(layers[layer], x, count)
    logits = reference.forward(TOKENS, dense_tokens=PROMPT)[PROMPT - 1 : -1]
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shares / shares.sum(-1, keepdims=True)
    return np.log(probabilities[np.arange(len(logits)), TOKENS[PROMPT:]])


@pytest.mark.parametrize("active", [0.1, 0.5, 0.9])
def test_dejavu_matches_the_reference(folder: Path, f32: Engine, dejavu: Path, active: float):
    layers = predictors.make_layers(f32, rank=7)
    expected = expected_scores(folder, layers, round(active * f32.config.intermediate_size))
    found = f32.score(TOKENS, prompt_tokens=PROMPT, tda=TDA.dejavu(dejavu, active=active))
    assert found == pytest.approx(expected, abs=1e-4)
    assert np.abs(found - f32.score(TOKENS, prompt_tokens=PROMPT)).max() > 0.01


@pytest.mark.parametrize("count", [1, 3, 7])
def test_moefication_matches_the_reference(folder: Path, f32: Engine, experts: Path, count: int):
    expected = expected_scores(folder, predictors.make_layers(f32, EXPERTS, EXPERTS), count)
    found = f32.score(TOKENS, prompt_tokens=PROMPT, tda=TDA.moefication(experts, experts=count))
    assert found == pytest.approx(expected, abs=1e-4)
    assert np.abs(found - f32.score(TOKENS, prompt_tokens=PROMPT)).max() > 0.01


@pytest.mark.parametrize("weights", WEIGHTS)
def test_all_neurons_are_dense_to_the_bit(folder: Path, dejavu: Path, experts: Path, weights: str):
    engine = Engine(folder, device="cpu", weights=weights, threads=2)
    dense = engine.score(TOKENS, prompt_tokens=PROMPT)
    for tda in (TDA.dejavu(dejavu, active=1), TDA.moefication(experts, experts=EXPERTS)):
        assert engine.score(TOKENS, prompt_tokens=PROMPT, tda=tda).tolist() == dense.tolist()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_predictors_bytes_count(folder: Path, dejavu: Path, weights: str):
    engine = Engine(folder, device="cpu", weights=weights, threads=1)
    predictor = Predictor.load(dejavu)
    hidden, neurons = engine.config.hidden_size, engine.config.intermediate_size
    assert predictor.bytes == engine.config.num_layers * 2 * 7 * (hidden + neurons)
    read = {}
    for active in (0.5, 1.0):
        tda = TDA(predictor=predictor, active=active)
        stats = engine.generate(TOKENS[:PROMPT], max_new_tokens=20, ignore_eos=True, tda=tda).stats
        assert stats.ffn_active == active and stats.ffn_active_by_layer[0] == active
        assert stats.tda == f"token scope (DejaVu): {active:.0%} of neurons"
        read[active] = stats.ffn_bytes / 19
        dense = stats.ffn_bytes / stats.ffn_bytes_fraction / 19
        assert read[active] == pytest.approx(active * dense + predictor.bytes)


def test_the_number_of_threads_changes_nothing(folder: Path, dejavu: Path, experts: Path):
    for tda in (TDA.dejavu(dejavu, active=0.5), TDA.moefication(experts, experts=3)):
        one, three = (
            Engine(folder, device="cpu", weights="int8", threads=threads)
            .score(TOKENS, prompt_tokens=PROMPT, tda=tda)
            .tolist()
            for threads in (1, 3)
        )
        assert one == three


def test_settings_of_a_session_follow_each_other(f32: Engine, dejavu: Path):
    """What one setting leaves behind does not change the next one."""

    def after(*settings: TDA) -> list[float]:
        session = f32.session(len(TOKENS), sample_tokens=PROMPT)
        session.prefill(TOKENS[:PROMPT])
        for tda in settings:
            session.apply(tda)
        return session.decode(TOKENS[PROMPT]).tolist()

    predicted, mask = TDA.dejavu(dejavu, active=0.5), TDA(active=0.4, compact=True)
    token = TDA(scope="token", active=0.3)
    assert after(predicted) != after(mask) != after(token)
    assert after(mask, predicted) == after(token, predicted) == after(predicted)
    assert after(predicted, mask) == after(mask)
    assert after(predicted, token) == after(token)


def test_inputs_of_the_feed_forward_network(folder: Path, f32: Engine):
    reference = Reference(folder)
    reference.forward(TOKENS)
    session = f32.session(len(TOKENS), sample_tokens=len(TOKENS))
    with pytest.raises(OptionError, match="sample_tokens > 0"):
        session.ffn_inputs(0)
    session.prefill(TOKENS)
    for layer in reference.layers:
        assert session.ffn_inputs(layer) == pytest.approx(reference.inputs[layer], abs=1e-4)
        gate = reference.weights[f"model.layers.{layer}.mlp.gate_proj"]
        assert f32.gate(layer).tolist() == gate.tolist()


def test_the_same_setting_by_its_ways(f32: Engine, dejavu: Path, experts: Path):
    made = TDA.dejavu(dejavu, active=0.5)
    assert repr(made.predictor) == f"Predictor(file='{dejavu}', rank=7)"
    written = parse_tda(f"predictor={experts},experts=3")
    assert written.predictor.experts == EXPERTS and written.predictor.rank == EXPERTS
    ways = (made, pickle.loads(pickle.dumps(made)), parse_tda(f"predictor={dejavu},active=.5"))
    scores = [f32.score(TOKENS, prompt_tokens=PROMPT, tda=tda).tolist() for tda in ways]
    assert scores[0] == scores[1] == scores[2]
    described = describe_run(f32, made)["tda"]["predictor"]
    assert described == describe_run(f32, TDA.dejavu(dejavu, active=1))["tda"]["predictor"]
    assert described != describe_run(f32, written)["tda"]["predictor"]


def test_other_models_and_weights_are_refused(folder: Path, f32: Engine, dejavu: Path):
    tda = TDA.dejavu(dejavu, active=0.5)
    for weights in ("graded", "int4"):
        engine = Engine(folder, weights=weights, device="cpu", threads=1)
        with pytest.raises(OptionError, match=f"predictor: expected f32, .* found {weights}"):
            engine.score(TOKENS, prompt_tokens=PROMPT, tda=tda)
    other = Engine(tiny.write(dejavu.parent / "other", "llama_tied"), device="cpu", threads=1)
    with pytest.raises(CheckpointError, match="does not fit model"):
        other.score(TOKENS, prompt_tokens=PROMPT, tda=tda)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"model": 5}, "model: found 5, expected a string"),
        ({"version": 2}, "version: found 2, expected 1"),
        ({"rank": 8}, r"tensor layers.0.first: found shape \[7, 48\], expected shape \[8, any\]"),
        ({"rank": "many"}, 'rank: found "many", expected an integer of 1 or more'),
        ({"layers": 1}, "tensors: found 4, expected 2 for 1 layers"),
        ({"layers": 3}, "tensor layers.2.first: found none, expected it in every layer"),
        ({"experts": 4}, r"tensor layers.0.second: found shape .*, expected shape \[4, 7\]"),
    ],
)
def test_metadata_that_is_not_true(f32: Engine, tmp_path: Path, damage: dict, message: str):
    layers = predictors.make_layers(f32, rank=7)
    path = predictors.write(tmp_path / "bad.safetensors", f32, layers, **damage)
    with pytest.raises(CheckpointError, match=message) as error:
        Predictor.load(path)
    assert str(path) in str(error.value)


def test_numbers_that_cannot_be(f32: Engine, tmp_path: Path):
    for value in (np.nan, np.inf):
        layers = predictors.make_layers(f32, rank=7)
        layers[1]["second"][2, 3] = value
        path = predictors.write(tmp_path / "bad.safetensors", f32, layers)
        with pytest.raises(CheckpointError, match=r"layers.1.second, number 17: .*finite"):
            Predictor.load(path)
    layers = predictors.make_layers(f32, EXPERTS, EXPERTS)
    layers[0]["expert_of"][5] = EXPERTS
    path = predictors.write(tmp_path / "bad.safetensors", f32, layers)
    with pytest.raises(CheckpointError, match="neuron 5: found 8, expected 0 to 7"):
        Predictor.load(path)
    few = predictors.make_layers(f32, rank=7)
    for layer in few:
        layer["first"] = layer["first"][:, 1:].copy()
    path = predictors.write(tmp_path / "few.safetensors", f32, few)
    with pytest.raises(CheckpointError, match="found 47 inputs, expected 48"):
        f32.score(TOKENS, prompt_tokens=PROMPT, tda=TDA.dejavu(path, active=0.5))
