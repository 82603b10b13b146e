"""TDA of scope "token" in the engine: thresholds from the prompt, from calibration, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from reference import Reference

from tdaengine import TDA, CheckpointError, Engine, OptionError, Thresholds

PROMPT = 40  # tokens, fewer than an engine samples: all of them count; the rest is scored
TOKENS = tiny.tokens("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("token-scope") / "llama", "llama")


@pytest.fixture(scope="module")
def f32(folder: Path) -> Engine:
    return Engine(folder, threads=2)


@pytest.fixture(scope="module")
def int8(folder: Path) -> Engine:
    return Engine(folder, weights="int8", threads=2)


@pytest.fixture(scope="module")
def int4(folder: Path) -> Engine:
    return Engine(folder, weights="int4", threads=2)


def stats_of(engine: Engine, tda: TDA):
    return engine.generate(TOKENS[:PROMPT], max_new_tokens=40, ignore_eos=True, tda=tda).stats


@pytest.mark.parametrize("by_gate", [False, True])
@pytest.mark.parametrize("active", [0.3, 0.7, 1.0])
def test_scores_match_the_reference(folder: Path, f32: Engine, active: float, by_gate: bool):
    reference = Reference(folder)
    reference.forward(TOKENS[:PROMPT])
    thresholds = []
    for layer in reference.layers:
        sizes = np.linalg.norm(reference.down(layer), axis=1)
        seen = reference.gates[layer] if by_gate else reference.h[layer] * sizes
        estimates = np.sort(np.abs(seen), axis=None)[::-1]
        count = round(active * len(estimates))
        # A little below the contribution that is the threshold: rounding must not drop it here.
        thresholds.append(0 if active == 1 else estimates[count - 1] * (1 - 1e-5))
    logits = reference.forward(TOKENS, None, PROMPT, thresholds, by_gate)[PROMPT - 1 : -1]
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.log(shares / shares.sum(-1, keepdims=True))
    expected = expected[np.arange(len(expected)), TOKENS[PROMPT:]]
    tda = TDA.cats(active=active) if by_gate else TDA(scope="token", active=active)
    found = f32.score(TOKENS, prompt_tokens=PROMPT, tda=tda)
    assert np.abs(found - expected).max() < 1e-4


def test_all_neurons_are_dense_to_the_bit(int8: Engine):
    dense = int8.score(TOKENS, prompt_tokens=PROMPT)
    for tda in (TDA(scope="token", active=1.0), TDA.cats(active=1.0), TDA.griffin(active=1.0)):
        assert (int8.score(TOKENS, prompt_tokens=PROMPT, tda=tda) == dense).all()


def test_int8_is_near_f32(f32: Engine, int8: Engine):
    difference = int8.score(TOKENS, prompt_tokens=1) - f32.score(TOKENS, prompt_tokens=1)
    assert 0 < np.abs(difference).mean() < 0.1


def test_int4_is_less_near_f32(f32: Engine, int4: Engine):
    difference = int4.score(TOKENS, prompt_tokens=1) - f32.score(TOKENS, prompt_tokens=1)
    assert 0.1 < np.abs(difference).mean() < 1


def test_stats_count_what_is_read(int8: Engine):
    dense = stats_of(int8, None)
    stats = stats_of(int8, TDA(scope="token", active=0.3))
    assert 0.15 < stats.ffn_active < 0.45 and stats.ffn_coarse == 0
    assert stats.ffn_bytes_fraction == pytest.approx((2 + stats.ffn_active) / 3)
    assert stats.bytes_per_token < dense.bytes_per_token
    assert np.mean(stats.ffn_active_by_layer) == pytest.approx(stats.ffn_active)


@pytest.mark.parametrize("layer", [0, 1])
def test_shares_are_told_by_layer(int8: Engine, tmp_path: Path, layer: int):
    """One layer reads all neurons, the other drops them all."""
    file = tmp_path / "thresholds.json"
    int8.calibrate([TOKENS], scope="token", bytes=0.8).save(file)
    content = json.loads(file.read_text())
    content["values"] = [0.0 if i == layer else 1e30 for i in range(2)]
    file.write_text(json.dumps(content))
    stats = stats_of(int8, TDA(scope="token", thresholds=Thresholds.load(file)))
    assert stats.ffn_active_by_layer == [float(i == layer) for i in range(2)]
    assert stats.ffn_active == 0.5


def test_results_do_not_depend_on_threads(folder: Path, int8: Engine):
    tda = TDA(scope="token", active=0.3)
    expected = int8.score(TOKENS, prompt_tokens=PROMPT, tda=tda)
    for threads in (1, 3, 4):
        engine = Engine(folder, weights="int8", threads=threads)
        assert (engine.score(TOKENS, prompt_tokens=PROMPT, tda=tda) == expected).all()


@pytest.mark.parametrize("weights", ["f32", "int8"])
def test_error_drops_more_with_a_larger_target(folder: Path, weights: str):
    engine = Engine(folder, weights=weights)
    active = [stats_of(engine, TDA(scope="token", error=e)).ffn_active for e in (0, 0.05, 0.2, 0.5)]
    assert active[0] == 1
    assert active == sorted(active, reverse=True) and active[-1] < active[0]


@pytest.mark.parametrize("weights", ["f32", "int8"])
@pytest.mark.parametrize("bytes_", [0.75, 0.9])
def test_a_budget_is_met_on_the_text_it_was_calibrated_on(
    folder: Path, tmp_path: Path, weights: str, bytes_: float
):
    engine = Engine(folder, weights=weights, threads=2)
    seen = []
    thresholds = engine.calibrate(
        [TOKENS], scope="token", bytes=bytes_, sample_tokens=200, progress=lambda *a: seen.append(a)
    )
    assert np.mean(thresholds.reached) == pytest.approx(bytes_, abs=0.01)
    assert thresholds.weights == weights and thresholds.scope == "token"
    assert seen
    thresholds.save(str(tmp_path / "t.json"))
    tda = TDA(scope="token", thresholds=Thresholds.load(str(tmp_path / "t.json")))
    assert stats_of(engine, tda).ffn_bytes_fraction == pytest.approx(bytes_, abs=0.1)


def test_a_file_for_other_weights_or_scope_is_refused(f32: Engine, int8: Engine):
    thresholds = int8.calibrate([TOKENS], scope="token", error=0.2)
    with pytest.raises(CheckpointError, match="for int8 weights, found f32"):
        f32.score(TOKENS, prompt_tokens=PROMPT, tda=TDA(scope="token", thresholds=thresholds))
    with pytest.raises(OptionError, match='for scope "token", found scope "sequence"'):
        int8.score(TOKENS, prompt_tokens=PROMPT, tda=TDA(scope="sequence", thresholds=thresholds))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bytes": 0.6}, 'scope "token" only'),
        ({"scope": "token", "bytes": 0.0}, "bytes 0"),
        ({"scope": "token", "bytes": 1.5}, "bytes 1.5"),
        ({"scope": "token", "bytes": 0.1}, "which gate and up rows alone read"),
        ({"scope": "token", "bytes": 0.7, "error": 0.1}, "error 0.1: expected only without bytes"),
        ({"scope": "page"}, 'scope is "page"'),
    ],
)
def test_calibration_options(int8: Engine, options: dict, message: str):
    with pytest.raises(OptionError, match=message):
        int8.calibrate([TOKENS], **options)
