"""TDA in the engine against the NumPy reference, on tiny checkpoints in f32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
from reference import Reference

from tdaengine import TDA, CheckpointError, Engine, OptionError, Session, Thresholds

VARIANTS = ["llama", "llama_bias", "llama_gelu_tanh", "llama_relu", "llama_odd"]
PRIOR_TOKENS = 512  # of a prompt that a prior weighs as much as
PROMPT = 40  # tokens; the rest of tiny.tokens is decoded


class Case:
    def __init__(self, folder: Path, name: str):
        self.folder = tiny.write(folder / name, name)
        self.engine = Engine(self.folder, threads=2)
        self.reference = Reference(self.folder)
        self.tokens = tiny.tokens(name)
        self.prompt, self.rest = self.tokens[:PROMPT], self.tokens[PROMPT:]
        self.layers = self.reference.layers
        self.neurons = self.reference.config["intermediate_size"]
        self.neuron_bytes = 3 * self.reference.config["hidden_size"] * 4
        self.reference.forward(self.prompt)
        self.h = self.reference.h  # of the prompt
        self.downs = [self.reference.down(layer) for layer in self.layers]
        self.scores = list(map(reference.statistic, self.h, self.downs))

    def prefilled(self, sample_tokens: int = 0) -> Session:
        session = self.engine.session(len(self.tokens), sample_tokens)
        session.prefill(self.prompt)
        return session

    def masks(self, session: Session) -> list[np.ndarray]:
        return [session.mask(layer) for layer in self.layers]


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("tda"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("tda"), "llama")


def test_statistic(case: Case):
    session = case.prefilled()
    for layer in case.layers:
        assert np.allclose(session.statistic(layer), case.scores[layer], rtol=1e-4)


def test_statistic_does_not_depend_on_the_parts_of_a_prompt(case: Case):
    session = case.engine.session(PROMPT)
    for begin, end in ((0, 1), (1, 17), (17, PROMPT)):
        session.prefill(case.prompt[begin:end])
    for layer in case.layers:
        assert np.allclose(session.statistic(layer), case.scores[layer], rtol=1e-4)


@pytest.mark.parametrize("error", [0.02, 0.1, 0.3, 0.7])
def test_error_target_is_met_and_used_up(case: Case, error: float):
    session = case.prefilled(sample_tokens=PROMPT)  # CETT is measured on all of them
    session.apply(TDA(error=error))
    for layer in case.layers:
        scores, h, down = case.scores[layer], case.h[layer], case.downs[layer]
        kept = session.mask(layer)
        assert np.array_equal(kept, reference.strongest(scores, len(kept)))
        assert len(kept) in reference.last_counts_within(scores, h, down, error)
        assert reference.cett(h, down, kept) <= error


@pytest.mark.parametrize("active", [0.01, 0.3, 0.5, 0.99, 1.0])
def test_active_keeps_the_strongest(case: Case, active: float):
    session = case.prefilled()
    session.apply(TDA(active=active))
    count = max(1, int(active * case.neurons + 0.5))
    for layer in case.layers:
        expected = reference.strongest(case.scores[layer], count)
        assert np.array_equal(session.mask(layer), expected)


def test_masked_decoding(case: Case):
    random = np.random.default_rng(5)
    everything = np.arange(case.neurons)
    choices = {
        "random": [np.flatnonzero(random.random(case.neurons) < 0.4) for _ in case.layers],
        "one": [everything[7:8] for _ in case.layers],
        "empty": [everything[:0] for _ in case.layers],
        "full": [everything for _ in case.layers],
        "empty and full": [everything[: layer % 2 * case.neurons] for layer in case.layers],
    }
    for name, masks in choices.items():
        session = case.prefilled()
        for layer in case.layers:
            session.set_mask(layer, masks[layer])
            assert np.array_equal(session.mask(layer), masks[layer])
        logits = np.stack([session.decode(token) for token in case.rest])
        expected = case.reference.forward(case.tokens, masks, PROMPT)[PROMPT:]
        assert np.abs(logits - expected).max() <= 1e-4, name
        used = sum(len(mask) for mask in masks)
        assert session.ffn_bytes == len(case.rest) * used * case.neuron_bytes


def test_masks_are_all_neurons_until_set(llama: Case):
    session = llama.engine.session(4)
    assert all(np.array_equal(m, np.arange(llama.neurons)) for m in llama.masks(session))


def test_bad_masks(llama: Case):
    session = llama.prefilled()
    for mask in ([3, 3], [5, 4], [-1], [llama.neurons], ["x"]):
        with pytest.raises(OptionError):
            session.set_mask(0, mask)
    for layer in (-1, len(llama.layers)):
        with pytest.raises(OptionError, match="layer"):
            session.set_mask(layer, [0])
    with pytest.raises(OptionError, match="sample_tokens"):
        session.apply(TDA(error=0.1))
    with pytest.raises(OptionError, match="prefill"):
        llama.engine.session(4).apply(TDA(active=0.5))


def test_error_zero_is_dense_to_the_bit(case: Case):
    dense, sparse = case.prefilled(), case.prefilled(sample_tokens=8)
    sparse.apply(TDA(error=0.0))
    assert all(len(mask) == case.neurons for mask in case.masks(sparse))
    for token in case.rest:
        assert np.array_equal(dense.decode(token), sparse.decode(token))
    plain = case.engine.generate(case.prompt, max_new_tokens=60, ignore_eos=True)
    zero = case.engine.generate(case.prompt, max_new_tokens=60, ignore_eos=True, tda=TDA(error=0.0))
    assert plain.token_ids == zero.token_ids
    assert zero.stats.ffn_bytes_fraction == zero.stats.ffn_active == 1


def test_threads_change_nothing(case: Case):
    def run(threads: int) -> list[np.ndarray]:
        engine = Engine(case.folder, threads=threads)
        session = engine.session(len(case.tokens), PROMPT)
        results = [engine.logits(case.tokens), session.prefill(case.prompt)]
        session.apply(TDA(error=0.2, refresh=6))
        results += [session.statistic(layer) for layer in case.layers]
        results += [session.decode(token) for token in case.rest]
        return results + case.masks(session)

    one = run(1)
    for threads in (2, 3):
        for a, b in zip(one, run(threads), strict=True):
            assert np.array_equal(a, b)


def test_bytes_of_a_long_generation(tmp_path: Path, llama: Case):
    engine = Engine(llama.folder, max_context=512)
    tda = TDA(active=0.3)
    out = engine.generate(llama.prompt, max_new_tokens=200, ignore_eos=True, tda=tda)
    assert len(out.token_ids) == 200
    session = llama.prefilled()
    session.apply(tda)
    used = [len(mask) for mask in llama.masks(session)]
    stats = out.stats
    steps = 199  # the first token comes from the prompt
    assert stats.ffn_bytes == steps * sum(used) * llama.neuron_bytes
    dense = steps * len(used) * llama.neurons * llama.neuron_bytes
    assert stats.ffn_bytes_fraction == pytest.approx(stats.ffn_bytes / dense, rel=1e-12)
    shares = [count / llama.neurons for count in used]
    assert stats.ffn_active_by_layer == pytest.approx(shares, rel=1e-12)
    assert stats.ffn_active == pytest.approx(np.mean(shares), rel=1e-12)


def test_bytes_in_bf16_are_half(llama: Case):
    options = {"max_new_tokens": 20, "ignore_eos": True, "tda": TDA(active=0.3)}
    f32 = llama.engine.generate(llama.prompt, **options).stats
    bf16 = Engine(llama.folder, weights="bf16").generate(llama.prompt, **options).stats
    assert 2 * bf16.ffn_bytes == f32.ffn_bytes
    assert bf16.ffn_bytes_fraction == f32.ffn_bytes_fraction


@pytest.mark.parametrize("refresh", [0, 8])
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "bf16c"])
@pytest.mark.parametrize("variant", ["llama", "llama_odd"])
def test_compact_masks_change_no_bit(tmp_path: Path, variant: str, weights: str, refresh: int):
    folder = tiny.write(tmp_path / "m", variant)
    engine = Engine(folder, device="cpu", weights=weights, threads=2)
    tokens = tiny.tokens(variant)

    def run(compact: bool) -> tuple[np.ndarray, Session]:
        session = engine.session(len(tokens), PROMPT)
        session.prefill(tokens[:PROMPT])
        session.apply(TDA(active=0.4, refresh=refresh, compact=compact))
        logits = [session.decode(token) for token in tokens[PROMPT:-10]]
        session.set_mask(0, range(1, 40, 2))  # this one is not copied
        logits += [session.decode(token) for token in tokens[-10:]]
        return np.stack(logits), session

    in_place, expected = run(False)
    copied, session = run(True)
    assert (copied == in_place).all()
    for layer in range(engine.config.num_layers):
        assert np.array_equal(session.mask(layer), expected.mask(layer))
    assert (session.ffn_bytes > expected.ffn_bytes) == (refresh > 0)  # copying reads, too


def test_compact_masks_of_all_and_of_none(llama: Case, tmp_path: Path):
    path = tmp_path / "thresholds.json"
    llama.engine.calibrate([llama.tokens], error=0.2).save(str(path))
    content = json.loads(path.read_text())
    content["values"] = [0.0, *[9.0 for _ in llama.layers[1:]]]
    path.write_text(json.dumps(content))
    thresholds = Thresholds.load(str(path))
    engine = Engine(llama.folder, device="cpu")
    expected = engine.score(llama.tokens, PROMPT, tda=TDA(thresholds=thresholds))
    found = engine.score(llama.tokens, PROMPT, tda=TDA(thresholds=thresholds, compact=True))
    assert (found == expected).all()


def test_refresh_of_fewer_tokens_than_the_window(tmp_path: Path):
    engine = Engine(tiny.write(tmp_path / "sliding", "mistral_sliding"))
    options = {"max_new_tokens": 12, "ignore_eos": True}
    prompt = tiny.tokens("mistral_sliding", 20)
    dense = engine.generate(prompt, **options)
    assert engine.generate(prompt, tda=TDA(active=1.0, refresh=4), **options).token_ids == (
        dense.token_ids
    )


def test_refresh(case: Case):
    """After every `every` decoded tokens these run again, dense, and their statistic counts as
    much as all before."""
    every, share = 6, 0.4
    session = case.prefilled()
    session.apply(TDA(active=share, refresh=every))
    count = round(share * case.neurons)
    scores = case.scores
    masks = [reference.strongest(s, count) for s in scores]
    for begin in range(PROMPT, len(case.tokens), every):
        if begin > PROMPT:
            case.reference.forward(case.tokens[:begin])
            recent = [h[begin - every :] for h in case.reference.h]
            fresh = map(reference.statistic, recent, case.downs)
            scores = [np.sqrt((a**2 + b**2) / 2) for a, b in zip(scores, fresh, strict=True)]
            masks = [reference.strongest(s, count) for s in scores]
        end = min(begin + every, len(case.tokens))
        logits = np.stack([session.decode(token) for token in case.tokens[begin:end]])
        for layer in case.layers:
            assert np.array_equal(session.mask(layer), masks[layer])
        expected = case.reference.forward(case.tokens[:end], masks, begin)[begin:]
        assert np.abs(logits - expected).max() <= 1e-4
    decoded = len(case.rest)
    refreshes = (decoded - 1) // every
    layers = len(case.layers)
    expected = (decoded * count + refreshes * case.neurons) * layers * case.neuron_bytes
    assert session.ffn_bytes == expected


def test_thresholds_serve_generate_and_score(case: Case, tmp_path: Path):
    texts = [case.tokens[:50], case.tokens[20:]]
    thresholds = case.engine.calibrate(texts, error=0.2)
    assert (thresholds.texts, thresholds.tokens) == (2, 110)
    assert max(thresholds.reached) <= 0.2
    thresholds.save(str(tmp_path / "thresholds.json"))
    thresholds = Thresholds.load(str(tmp_path / "thresholds.json"))
    tda = TDA(thresholds=thresholds)
    session = case.prefilled()
    session.apply(tda)
    for layer in case.layers:
        scores = with_prior(session.statistic(layer), PROMPT, priors_of(thresholds, case)[layer])
        expected = np.flatnonzero(scores >= thresholds.values[layer])
        assert np.array_equal(session.mask(layer), expected)
        assert 0 < len(expected) < case.neurons

    masks = case.masks(session)
    logits = case.reference.forward(case.tokens, masks, PROMPT)[PROMPT - 1 : -1]
    greatest = logits.max(1, keepdims=True)
    logits = logits - greatest - np.log(np.exp(logits - greatest).sum(1, keepdims=True))
    expected = logits[np.arange(len(case.rest)), case.rest]
    assert np.allclose(case.engine.score(case.tokens, PROMPT, tda=tda), expected, atol=1e-4)

    out = case.engine.generate(case.prompt, max_new_tokens=30, ignore_eos=True, tda=tda)
    shares = [len(mask) / case.neurons for mask in masks]
    assert out.stats.ffn_active_by_layer == pytest.approx(shares)
    everything = case.prompt + out.token_ids
    expected = case.reference.forward(everything, masks, PROMPT)[PROMPT - 1 : -1]
    # Each token is the best one, within rounding.
    chosen = expected[np.arange(30), out.token_ids]
    assert np.all(chosen >= expected.max(1) - 1e-3)


def priors_of(thresholds: Thresholds, case: Case) -> np.ndarray:
    """[L, F]"""
    return np.array(thresholds.prior).reshape(len(case.layers), case.neurons)


def with_prior(scores: np.ndarray, tokens: int, prior: np.ndarray) -> np.ndarray:
    """R of a prompt of so many tokens, joined with R² of other text."""
    return np.sqrt((tokens * scores**2 + PRIOR_TOKENS * prior) / (tokens + PRIOR_TOKENS))


def test_a_prior_joins_the_prompts_statistic(case: Case, tmp_path: Path):
    texts = [case.tokens[:50], case.tokens[20:]]
    found = case.engine.calibrate(texts, error=0.2, sample_tokens=60)
    found.save(tmp_path / "t.json")
    assert Thresholds.load(tmp_path / "t.json").prior == found.prior
    squares, h = [], []
    for text in texts:
        case.reference.forward(text)
        h.append(case.reference.h)
        squares.append(
            [reference.statistic(*of) ** 2 for of in zip(h[-1], case.downs, strict=True)]
        )
    a, b = map(np.array, squares)
    prior = (50 * a + 60 * b) / 110
    assert np.allclose(priors_of(found, case), prior, rtol=1e-4, atol=2.0**-24)
    session = case.prefilled()
    session.apply(TDA(active=0.4, thresholds=found))
    for layer in case.layers:
        scores = with_prior(case.scores[layer], PROMPT, prior[layer])
        count = round(0.4 * case.neurons)
        assert np.array_equal(session.mask(layer), reference.strongest(scores, count))
        # Each text was searched with the other one's statistic as its prior.
        errors = []
        for own, other, length, each in ((a, b, 50, h[0]), (b, a, 60, h[1])):
            scores = with_prior(np.sqrt(own[layer]), length, other[layer])
            kept = np.flatnonzero(scores >= found.values[layer] * (1 - 1e-5))
            errors += [reference.cett(each[layer], case.downs[layer], kept)] * length
        assert found.reached[layer] == pytest.approx(np.mean(errors), rel=1e-3)


def test_a_prior_of_fewer_neurons_is_refused(llama: Case, tmp_path: Path):
    path = tmp_path / "thresholds.json"
    llama.engine.calibrate([llama.tokens], error=0.2).save(path)
    content = json.loads(path.read_text())
    content["prior"] = content["prior"][: -len(content["values"])]
    path.write_text(json.dumps(content))
    expected = len(llama.layers) * llama.neurons
    found = expected - len(llama.layers)
    with pytest.raises(CheckpointError, match=f"prior of {found} neurons, expected {expected}"):
        llama.prefilled().apply(TDA(thresholds=Thresholds.load(path)))


def test_thresholds_without_a_prior_serve_as_before(llama: Case, tmp_path: Path):
    path = tmp_path / "thresholds.json"
    llama.engine.calibrate([llama.tokens], error=0.2).save(path)
    content = json.loads(path.read_text())
    del content["prior"]
    path.write_text(json.dumps(content))
    thresholds = Thresholds.load(path)
    session = llama.prefilled()
    session.apply(TDA(thresholds=thresholds))
    for layer in llama.layers:
        expected = np.flatnonzero(session.statistic(layer) >= thresholds.values[layer])
        assert np.array_equal(session.mask(layer), expected)
    with pytest.raises(OptionError, match="thresholds with a prior"):
        TDA(active=0.5, thresholds=thresholds)


def test_calibrated_thresholds_meet_the_target_by_the_reference(llama: Case):
    text = llama.tokens
    thresholds = llama.engine.calibrate([text], error=0.15, sample_tokens=len(text))
    llama.reference.forward(text)
    for layer in llama.layers:
        h, down = llama.reference.h[layer], llama.downs[layer]
        scores = reference.statistic(h, down)
        # The last neuron kept has the threshold as its score, up to what h in f32 rounds.
        slack = 1e-6 if llama.engine.device.startswith("cpu") else 1e-5
        kept = np.flatnonzero(scores >= thresholds.values[layer] * (1 - slack))
        assert len(kept) in reference.last_counts_within(scores, h, down, 0.15)
        assert thresholds.reached[layer] == pytest.approx(reference.cett(h, down, kept), rel=1e-3)


def test_thresholds_of_another_model_are_refused(llama: Case, tmp_path: Path):
    other = Engine(tiny.write(tmp_path / "another", "llama_tied"))
    thresholds = other.calibrate([llama.tokens], error=0.2)
    tda = TDA(thresholds=thresholds)
    for use in (
        lambda: llama.engine.generate(llama.prompt, max_new_tokens=4, tda=tda),
        lambda: llama.engine.score(llama.tokens, PROMPT, tda=tda),
        lambda: llama.prefilled().apply(tda),
    ):
        with pytest.raises(CheckpointError, match=r'"another".*"llama"'):
            use()
