"""Graded weights: precision by input, its options, and what it leaves as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from tdaengine import TDA, CheckpointError, Engine, Error, OptionError, Thresholds

PROMPT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("graded") / "llama", "llama")


@pytest.fixture(scope="module")
def graded(folder: Path) -> Engine:
    return Engine(folder, weights="graded", threads=2)


def score(engine: Engine, tda: TDA | None = None, variant: str = "llama") -> np.ndarray:
    return engine.score(tiny.tokens(variant), prompt_tokens=PROMPT, tda=tda)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_dense_is_nearly_as_good_as_int8(tmp_path: Path, variant: str):
    """In every architecture, in prefill and in decode."""
    source = tiny.write(tmp_path / variant, variant)
    exact = Engine(source, weights="f32")
    tokens = tiny.tokens(variant)[: min(80, exact.max_context)]
    prompt = len(tokens) // 2
    expected = exact.logits(tokens)

    def errors(weights: str) -> np.ndarray:
        engine = Engine(source, weights=weights)
        session = engine.session(len(tokens))
        session.prefill(tokens[:prompt])
        decoded = np.stack([session.decode(token) for token in tokens[prompt:]])
        found = engine.logits(tokens)
        return np.array(
            [np.abs(found - expected).mean(), np.abs(decoded - expected[prompt:]).mean()]
        )

    assert (errors("graded") < 1.8 * errors("int8")).all()


def test_all_inputs_are_dense_to_the_bit(graded: Engine):
    assert np.array_equal(score(graded, TDA(inputs=1, active=1)), score(graded))


@pytest.mark.parametrize("tda", [None, TDA(), TDA(inputs=0.5, active=0), TDA(inputs=0)])
def test_threads_change_no_bit(folder: Path, tda: TDA | None):
    one, *others = (score(Engine(folder, weights="graded", threads=n), tda) for n in (1, 2, 3))
    for other in others:
        assert np.array_equal(other, one)


def test_fewer_inputs_are_farther_from_dense(graded: Engine):
    dense = score(graded)
    shares = (0.0, 0.25, 0.5, 0.75)
    errors = [np.abs(score(graded, TDA(inputs=s, active=s)) - dense).mean() for s in shares]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] / 4


def test_bytes_follow_the_shares(smollm2: Path):
    engine = Engine(smollm2, weights="graded")
    prompt = engine.tokenizer.encode("The history of the lighthouse begins in the year " * 10)

    def stats(tda: TDA | None):
        return engine.generate(prompt, max_new_tokens=30, ignore_eos=True, tda=tda).stats

    dense, none = stats(None), stats(TDA(inputs=0))
    rests = dense.bytes_per_token - none.bytes_per_token
    assert 0.42 < rests / dense.bytes_per_token < 0.48  # 4 bits of about 8.6
    fifth = stats(TDA(inputs=0.2, active=0.2))
    share = (fifth.bytes_per_token - none.bytes_per_token) / rests
    assert 0.1 < share < 0.35
    assert (dense.ffn_active, dense.ffn_coarse, none.ffn_coarse) == (1, 0, 1)
    assert 0.1 < 1 - fifth.ffn_coarse < 0.35
    assert len(fifth.ffn_coarse_by_layer) == 30
    assert np.mean(fifth.ffn_coarse_by_layer) == pytest.approx(fifth.ffn_coarse)


def test_the_recommended_setting(smollm2: Path):
    engine = Engine(smollm2, weights="graded")
    question = [
        {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    ]
    out = engine.chat(question, temperature=0, tda=TDA())
    assert out.text == "The capital of France is Paris."
    assert out.stats.tda.startswith("by input: ")


@pytest.fixture(scope="module")
def calibrated(graded: Engine) -> Thresholds:
    return graded.calibrate([tiny.tokens("llama"), tiny.tokens("llama")[:50]])


def test_calibrated_losses(graded: Engine, calibrated: Thresholds):
    """They are those of the texts' second halves, measured by `score`."""
    texts = [tiny.tokens("llama"), tiny.tokens("llama")[:50]]

    def log_probabilities(tda: TDA | None) -> np.ndarray:
        scores = [graded.score(t, prompt_tokens=len(t) // 2, tda=tda) for t in texts]
        return np.concatenate(scores).astype(np.float64)

    dense = log_probabilities(None)
    for share, loss, error in zip(
        calibrated.inputs, calibrated.losses, calibrated.loss_errors, strict=True
    ):
        rises = dense - log_probabilities(TDA(inputs=round(share, 4)))
        assert loss == pytest.approx(np.expm1(rises.mean()), rel=1e-4, abs=1e-7)
        assert error == pytest.approx(rises.std() / len(rises) ** 0.5, rel=1e-4)
    assert (calibrated.weights, calibrated.texts) == ("graded", 2)
    assert calibrated.tokens == sum(map(len, texts))
    assert calibrated.values == []


def test_a_loss_becomes_a_share(graded: Engine, calibrated: Thresholds):
    for loss in (0.0, max(calibrated.losses)):
        kept = 1.0
        for share, found in zip(calibrated.inputs, calibrated.losses, strict=True):
            if found > loss:
                break
            kept = share
        by_hand = score(graded, TDA(inputs=kept) if kept < 1 else None)  # no share: dense
        assert np.array_equal(score(graded, TDA(loss=loss, thresholds=calibrated)), by_hand)
    assert kept == 0  # and so the second differs from the first


def test_a_loss_by_the_file_in_the_folder(tmp_path: Path):
    folder = tiny.write(tmp_path / "llama", "llama")
    engine = Engine(folder, weights="graded")
    with pytest.raises(OptionError, match="tda loss: expected thresholds, or a file"):
        score(engine, TDA(loss=0.1))
    found = engine.calibrate([tiny.tokens("llama")])
    found.save(folder / "tda.json")
    expected = score(engine, TDA(loss=0.1, thresholds=found))
    assert np.array_equal(score(engine, TDA(loss=0.1)), expected)
    int8 = Engine(folder, weights="int8").calibrate([tiny.tokens("llama")])
    int8.save(folder / "tda.json")
    with pytest.raises(CheckpointError, match="are for int8 weights, found graded"):
        score(engine, TDA(loss=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": -0.1}, "tda loss -0.1: expected 0 or more"),
        ({"loss": float("inf")}, "tda loss inf: expected 0 or more"),
        ({"loss": 0.1, "inputs": 0.2}, "tda loss: expected alone or with thresholds"),
        ({"inputs": -0.1}, "tda inputs -0.1: expected 0 to 1"),
        ({"inputs": 1.5}, "tda inputs 1.5: expected 0 to 1"),
        ({"inputs": float("nan")}, "tda inputs nan: expected 0 to 1"),
        ({"inputs": 0.2, "active": 2}, "tda active 2: expected 0 to 1"),
        ({"inputs": 0.2, "refresh": 5}, "inputs: expected alone or with active"),
        ({"inputs": 0.2, "scope": "token"}, "inputs: expected alone or with active"),
    ],
)
def test_bad_options(options: dict[str, float], message: str):
    with pytest.raises(OptionError, match=message):
        TDA(**options)


def test_options_that_do_not_fit_the_weights(folder: Path, graded: Engine):
    with pytest.raises(
        OptionError, match="tda inputs: expected graded or int4 weights, found int8"
    ):
        score(Engine(folder, weights="int8"), TDA(inputs=0.2))
    for tda in (TDA(error=0.1), TDA(active=0.5), TDA.cats(active=0.5), TDA.griffin(active=0.5)):
        with pytest.raises(OptionError, match="tda with graded weights: expected inputs"):
            score(graded, tda)
    for target in ({"error": 0.2}, {"scope": "token"}, {"sample_tokens": 3}):
        with pytest.raises(OptionError, match="calibrate: found graded weights, expected neither"):
            graded.calibrate([tiny.tokens("llama")], **target)
    with pytest.raises(OptionError, match="tda loss: expected graded or int4 weights, found int8"):
        score(Engine(folder, weights="int8"), TDA(loss=0.02))
    with pytest.raises(OptionError, match="mask of layer 0: found graded weights"):
        graded.session(10).set_mask(0, [1])
    session = graded.session(60)
    session.prefill(tiny.tokens("llama")[:PROMPT])
    with pytest.raises(OptionError, match="tda inputs: the session remembers no tokens"):
        session.apply(TDA(inputs=0.2))


def test_int4_reads_the_heads_rests_by_input(folder: Path):
    engine = Engine(folder, weights="int4", threads=2)
    tokens = tiny.tokens("llama")[:PROMPT]

    def stats_of(tda: TDA | None):
        return engine.generate(tokens, max_new_tokens=20, ignore_eos=True, tda=tda).stats

    dense, some, none = stats_of(None), stats_of(TDA()), stats_of(TDA(inputs=0.0))
    assert dense.head_bytes_fraction == 1
    assert dense.head_bytes_fraction > some.head_bytes_fraction > none.head_bytes_fraction
    assert some.tda == "by input: 44.7% of the head's inputs at 8 bits, everything else at 4"
    assert some.ffn_bytes == dense.ffn_bytes and some.ffn_active == 1 and some.ffn_coarse == 0
    assert (score(engine, TDA(inputs=1.0)) == score(engine, None)).all()
    with pytest.raises(OptionError, match="tda with int4 weights: expected inputs"):
        score(engine, TDA(active=0.5))


def test_int4_holds_weights_that_had_four_bits(tmp_path: Path):
    """Whatever their scale and minimum; others lose what 4 bits lose."""
    folder = tiny.write(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    random = np.random.default_rng(5)
    for name, values in tensors.items():
        if "proj.weight" not in name:
            continue
        rows, cols = values.shape
        scale, minimum = 0.01 + 0.01 * random.random((2, rows, -(-cols // 32), 1))
        codes = random.integers(0, 16, (rows, scale.shape[1], 32))
        four_bits = (scale * (codes - 8) + minimum).astype(np.float32)
        tensors[name] = np.ascontiguousarray(four_bits.reshape(rows, -1)[:, :cols])
    save_file(tensors, folder / "model.safetensors")
    tokens = tiny.tokens("llama")

    def errors() -> tuple[float, float]:  # of int4, and of graded, which has 8 bits
        exact = Engine(folder, weights="f32").logits(tokens)
        found = (Engine(folder, weights=w).logits(tokens) for w in ("int4", "graded"))
        int4, graded = (float(np.abs(logits - exact).mean()) for logits in found)
        return int4, graded

    int4, graded = errors()
    assert int4 < 1.1 * graded
    for name, values in tensors.items():
        if "proj.weight" in name:
            tensors[name] = random.normal(0, 0.1, values.shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    int4, graded = errors()
    assert int4 > 3 * graded


def test_a_single_token_prompt(graded: Engine):
    assert len(graded.generate([5], max_new_tokens=3, ignore_eos=True, tda=TDA()).token_ids) == 3


def test_cuda_refuses_them(folder: Path):
    with pytest.raises(Error, match="cuda"):
        Engine(folder, weights="graded", device="cuda")
