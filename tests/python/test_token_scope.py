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
    stats = stats_of(int8, TDA(scope="token", active=0.3, coarse=0.4))
    exact = stats.ffn_active - stats.ffn_coarse
    assert 0.15 < exact < 0.45 and 0.25 < stats.ffn_coarse < 0.55
    high, low = plane_bytes(int8.config.hidden_size)
    share = (2 * high + exact * (high + 3 * low) + stats.ffn_coarse * high) / (3 * (high + low))
    assert stats.ffn_bytes_fraction == pytest.approx(share)
    assert stats.bytes_per_token < dense.bytes_per_token
    assert np.mean(stats.ffn_coarse_by_layer) == pytest.approx(stats.ffn_coarse)


@pytest.mark.parametrize("layer", [0, 1])
def test_shares_are_told_by_layer(int8: Engine, tmp_path: Path, layer: int):
    """One layer reads all neurons at 4 bits, the other drops them all."""
    file = tmp_path / "thresholds.json"
    int8.calibrate([TOKENS], scope="token", bytes=0.8).save(file)
    content = json.loads(file.read_text())
    content["values"] = [1e30, 1e30]
    content["coarse"] = [0.0 if i == layer else 1e30 for i in range(2)]
    file.write_text(json.dumps(content))
    stats = stats_of(int8, TDA(scope="token", thresholds=Thresholds.load(file)))
    shares = [float(i == layer) for i in range(2)]
    assert stats.ffn_active_by_layer == stats.ffn_coarse_by_layer == shares
    assert stats.ffn_active == stats.ffn_coarse == 0.5


def decoded(engine: Engine, tda: TDA | None) -> np.ndarray:
    """Logits [T, V] of all tokens behind the prompt."""
    session = engine.session(len(TOKENS), sample_tokens=PROMPT)
    session.prefill(TOKENS[:PROMPT])
    if tda:
        session.apply(tda)
    return np.stack([session.decode(token) for token in TOKENS[PROMPT:]])


@pytest.mark.parametrize("options", [{"scope": "token", "active": 1.0}, {"error": 0.0}])
def test_unlikely_tokens_get_estimates(int8: Engine, options: dict):
    engine = int8
    dense = decoded(engine, None)
    assert (decoded(engine, TDA(head=1e-30, **options)) == dense).all()
    estimates = decoded(engine, TDA(head=1.0, **options))
    found = decoded(engine, TDA(head=0.2, **options))
    likely = estimates == dense  # the first alone, and what is right by chance
    assert likely.sum() < 1.1 * len(dense)
    estimates[likely] = found[likely]
    exact = found == dense
    assert ((found == estimates) | exact).all()
    assert 2 * len(dense) < exact.sum() < dense.size / 2
    assert found[exact].mean() > found[~exact].mean() + 1
    assert 0.01 < np.abs(estimates - dense).mean() < 0.5


def test_likely_tokens_of_capped_logits(tmp_path: Path):
    """Of these, near the cap of 5, many are about as likely as the first."""
    engine = Engine(tiny.write(tmp_path / "gemma2", "gemma2"), weights="int8", threads=2)
    dense = decoded(engine, None)
    assert 4.5 < np.abs(dense).max() <= 5
    assert (decoded(engine, TDA(scope="token", active=1.0, head=1e-30)) == dense).all()
    found = decoded(engine, TDA(scope="token", active=1.0, head=0.2))
    assert np.abs(found).max() <= 5 and 0.01 < np.abs(found - dense).mean() < 0.5
    above = dense - dense.max(axis=1, keepdims=True) - np.log(0.2)
    assert (found == dense)[above > 0.5].all() and (above > 0.5).sum() > 2 * len(dense)
    assert (found == dense)[above < -0.5].mean() < 0.02


def test_what_the_head_reads_is_counted(int8: Engine):
    tda = TDA(scope="token", active=1.0)
    all_of_it = stats_of(int8, tda)
    assert all_of_it.head_bytes_fraction == 1
    previous = 1.0
    for head in (1e-30, 0.2, 1.0):
        stats = stats_of(int8, TDA(scope="token", active=1.0, head=head))
        assert 0.5 < stats.head_bytes_fraction <= previous
        saved = (1 - stats.head_bytes_fraction) * head_bytes(int8)
        assert all_of_it.bytes_per_token - stats.bytes_per_token == pytest.approx(saved, abs=1)
        previous = stats.head_bytes_fraction
    high, low = plane_bytes(int8.config.hidden_size)
    rows = int8.config.vocab_size
    assert previous == pytest.approx(high / (high + low) + low / (high + low) / rows, abs=2e-3)


def plane_bytes(hidden: int) -> tuple[int, int]:
    """Bytes of a row's high and low plane."""
    low = -(-hidden // 64) * 32
    return low + -(-(2 * -(-hidden // 64) + 4) // 32) * 32, low


def head_bytes(engine: Engine) -> int:
    return engine.config.vocab_size * sum(plane_bytes(engine.config.hidden_size))


def test_results_do_not_depend_on_threads(folder: Path, int8: Engine):
    tda = TDA(scope="token", active=0.3, coarse=0.3, head=0.2)
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
    assert len(thresholds.coarse) == (len(thresholds.values) if weights == "int8" else 0)
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


def test_coarse_needs_int8(f32: Engine):
    with pytest.raises(OptionError, match="expected int8 weights, found f32"):
        f32.generate(TOKENS[:9], max_new_tokens=4, tda=TDA(scope="token", active=0.3, coarse=0.4))


def test_head_needs_planes(f32: Engine):
    with pytest.raises(OptionError, match=r"head 0\.1: expected int8 weights"):
        f32.generate(TOKENS[:9], max_new_tokens=4, tda=TDA(active=0.3, head=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bytes": 0.6}, 'scope "token" only'),
        ({"scope": "token", "bytes": 0.0}, "bytes 0"),
        ({"scope": "token", "bytes": 1.5}, "bytes 1.5"),
        ({"scope": "token", "bytes": 0.1}, "the estimates alone"),
        ({"scope": "token", "bytes": 0.7, "error": 0.1}, "error 0.1: expected only without bytes"),
        ({"scope": "page"}, 'scope is "page"'),
    ],
)
def test_calibration_options(int8: Engine, options: dict, message: str):
    with pytest.raises(OptionError, match=message):
        int8.calibrate([TOKENS], **options)
