"""The Python API on a tiny random model: prompts, TDA, calibration, chats, loading and errors."""

import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import MESSAGES, PROMPT

from tdaengine import TDA, CheckpointError, Engine, OptionError, Thresholds, _native
from tdaengine.info import fields_of


@pytest.fixture(scope="module")
def thresholds(engine: Engine) -> Thresholds:
    return engine.calibrate([PROMPT, "Another text.", [1, 5, 9, 30]], error=0.2)


# ---- prompts ------------------------------------------------------------------------------------


def test_the_context_can_be_filled(engine):
    assert engine.max_context == 128
    ids = [5] * 100
    assert len(engine.generate(ids, max_new_tokens=28, ignore_eos=True).token_ids) == 28


# ---- threshold-based dynamic activation ---------------------------------------------------------


def test_tda_of_engine_and_of_call(folder, engine, dense):
    options = {"max_new_tokens": 40, "ignore_eos": True}
    half = engine.generate(PROMPT, tda=TDA(active=0.5), **options)
    assert half.stats.ffn_active == half.stats.ffn_bytes_fraction == 0.5
    assert half.text != dense.text
    with_default = Engine(folder, threads=1, tda=TDA(active=0.5))
    assert with_default.generate(PROMPT, **options).text == half.text
    assert with_default.generate(PROMPT, tda=False, **options).text == dense.text
    assert with_default.generate(PROMPT, tda=TDA(active=1.0), **options).text == dense.text
    ids = engine.tokenizer.encode(PROMPT) + dense.token_ids
    scores = engine.score(ids, 11, tda=TDA(active=0.5))
    assert np.array_equal(with_default.score(ids, 11), scores)
    assert not np.array_equal(with_default.score(ids, 11, tda=False), scores)


def test_calibrated_thresholds(tmp_path, engine, thresholds):
    assert thresholds.fingerprint == engine.fingerprint
    assert (thresholds.texts, thresholds.source, thresholds.error) == (3, "texts", 0.2)
    assert len(thresholds.values) == 2
    thresholds.save(str(tmp_path / "thresholds.json"))
    again = Thresholds.load(str(tmp_path / "thresholds.json"))
    assert again.values == thresholds.values
    out = engine.generate(PROMPT, tda=TDA(thresholds=again), max_new_tokens=5, ignore_eos=True)
    assert 0 < out.stats.ffn_active < 1


def test_calibration_progress_and_own_texts(engine):
    seen = []
    thresholds = engine.calibrate(
        self_texts=3, self_tokens=8, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert thresholds.source == "self-generated"
    assert thresholds.error == 0.1


def test_an_exception_in_progress_ends_calibration(engine):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.calibrate([PROMPT, PROMPT], progress=stop)


# ---- chats --------------------------------------------------------------------------------------


def test_chat(engine):
    rendered = "<s>[system] Be brief.\n[user] Hi.\n[assistant]"
    ids = engine.chat_prompt(MESSAGES)
    assert ids == engine.tokenizer.encode(rendered, add_special_tokens=False)
    assert ids.count(1) == 1
    out = engine.chat(MESSAGES, max_new_tokens=10, ignore_eos=True, stop="\x7f")
    assert out.token_ids == engine.generate(ids, max_new_tokens=10, ignore_eos=True).token_ids


# ---- score, session, loading --------------------------------------------------------------------


def test_score(engine, dense):
    ids = engine.tokenizer.encode(PROMPT) + dense.token_ids
    prompt = len(ids) - 40
    scores = engine.score(ids, prompt_tokens=prompt)
    logits = engine.logits(ids)[prompt - 1 : -1].astype(np.float64)
    log_sum = np.log(np.exp(logits).sum(axis=1))
    expected = logits[np.arange(40), dense.token_ids] - log_sum
    assert (scores.shape, scores.dtype) == ((40,), np.float32)
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_session(engine, dense):
    ids = engine.tokenizer.encode(PROMPT)
    session = engine.session(capacity=20)
    token = int(session.prefill(ids).argmax())
    assert token == dense.token_ids[0]
    assert int(session.decode(token).argmax()) == dense.token_ids[1]
    assert session.position == len(ids) + 1


def test_engine_properties(folder, engine):
    limited = Engine(str(folder), weights="bf16", kv="f32", threads=2, max_context=16)
    assert (limited.weights, limited.kv, limited.threads) == ("bf16", "f32", 2)
    assert limited.max_context == 16
    assert (engine.weights, engine.kv) == ("f32", "f32")
    assert limited.fingerprint == engine.fingerprint
    assert engine.weight_bytes > limited.weight_bytes > 0
    assert engine.device.startswith(os.environ["TDA_DEVICE"])
    config = engine.config
    assert (config.model_type, config.num_layers, config.eos_tokens) == ("llama", 2, [2])
    assert config.rope.theta == 10000


@pytest.mark.parametrize(
    ("device", "forced", "weights", "found"),
    [
        ("cuda", None, "f32", "DeviceError: device cuda: .*(no CUDA|no NVIDIA driver)"),
        ("auto", "cuda", "f32", "DeviceError: device cuda: "),
        ("auto", "cuda", "int8", "cpu"),
        ("auto", None, "f32", "cpu"),
        ("cpu", "cuda", "f32", "cpu"),
        ("auto", "gpu", "f32", "OptionError: environment variable TDA_DEVICE: .*gpu"),
    ],
)
def test_device_without_a_gpu(folder, device, forced, weights, found):
    """In a process that sees none, wherever the tests run."""
    environment = {k: v for k, v in os.environ.items() if k != "TDA_DEVICE"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({"TDA_DEVICE": forced} if forced else {})
    code = """
import sys, tdaengine
try:
    print(tdaengine.Engine(sys.argv[1], device=sys.argv[2], weights=sys.argv[3]).device)
except tdaengine.Error as error:
    print(f"{type(error).__name__}: {error}")
"""
    command = [sys.executable, "-c", code, str(folder), device, weights]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.match(found, done.stdout), done.stdout


def test_hub_id(tmp_path, monkeypatch, folder):
    seen = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        seen.append(repo_id)
        if repo_id == "some/model":
            return str(folder)
        raise ConnectionError("offline")

    hub = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert Engine("some/model", threads=1).path == folder
    with pytest.raises(CheckpointError, match=r"other/model: no such folder.*offline"):
        Engine("other/model")
    assert seen == ["some/model", "other/model"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if not installed
    with pytest.raises(CheckpointError, match=r"pip install 'tdaengine\[hub\]'"):
        Engine("some/model")


def test_without_a_tokenizer_only_token_ids_work(tmp_path):
    engine = Engine(tiny.write(tmp_path / "bare", "llama"), threads=1)
    out = engine.generate([1, 5, 6], max_new_tokens=4, ignore_eos=True)
    assert out.text is None
    assert len(out.token_ids) == 4


def test_packing_reports_its_progress_and_can_be_stopped(folder: Path):
    reports: list[tuple[int, int]] = []
    Engine(folder, weights="int8", progress=lambda done, total: reports.append((done, total)))
    assert reports and reports == sorted(reports)
    assert reports[-1][0] == reports[-1][1]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine(folder, progress=stop)


def test_the_cache_may_be_int8(folder: Path):
    tokens = [(7 * i) % 90 for i in range(40)]
    exact = Engine(folder, weights="f32").score(tokens, prompt_tokens=20)
    rounded = Engine(folder, weights="f32", kv="int8")
    assert rounded.kv == "int8"
    difference = abs(rounded.score(tokens, prompt_tokens=20) - exact).mean()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("variant", ["llama_bf16", "llama_odd", "qwen3"])
def test_bf16c_is_bf16(tmp_path, variant):
    folder = tiny.write(tmp_path / "m", variant)
    plain, compressed = (
        Engine(folder, device="cpu", weights=w, kv="f32") for w in ("bf16", "bf16c")
    )
    tokens = tiny.tokens(variant)
    assert np.array_equal(plain.logits(tokens), compressed.logits(tokens))
    decoded = [e.score(tokens, prompt_tokens=1) for e in (plain, compressed)]
    assert decoded[0] == pytest.approx(decoded[1], abs=1e-4)
    sparse = [
        e.score(tokens, prompt_tokens=8, tda=TDA(scope="token", active=0.5))
        for e in (plain, compressed)
    ]
    assert sparse[0] == pytest.approx(sparse[1], abs=1e-4)
    assert not np.allclose(sparse[0], decoded[0][-len(sparse[0]) :], atol=1e-4)


def test_an_engine_says_what_it_is_and_can_be_closed(folder):
    with Engine(folder, threads=1, weights="int8") as engine:
        shown = f"weights='int8', device={engine.device!r}, threads=1, max_context=128"
        assert repr(engine) == f"Engine({str(folder)!r}, {shown})"
        stream = engine.stream("The sky is", max_new_tokens=4, ignore_eos=True)
        next(stream)
        config = engine.config
    assert engine.closed and repr(engine) == f"Engine({str(folder)!r}, closed)"
    assert len("".join(stream)) == 3  # what was under way goes on
    assert config.num_layers == 2
    engine.close()  # does nothing more
    for use in (
        lambda: engine.generate("The sky is"),
        lambda: engine.chat([{"role": "user", "content": "Hi."}]),
        lambda: engine.logits([1]),
        lambda: engine.score([1, 5], 1),
        lambda: engine.score_each([1], [[5]]),
        lambda: engine.calibrate([[1, 5]]),
        lambda: engine.session(4),
        lambda: engine.config,
        lambda: engine.weights,
    ):
        with pytest.raises(OptionError, match="engine: found it closed, expected an open one"):
            use()


def test_closing_frees_the_weights(smollm2):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    engine = Engine(smollm2, weights="int8")
    size, before = engine.weight_bytes, resident()
    engine.close()
    assert before - resident() > 0.8 * size


# ---- continuations of one prompt ----------------------------------------------------------------

SETTINGS = {
    "bf16": [
        None,
        TDA(active=0.5),
        TDA(error=0.2),
        TDA(active=0.3, refresh=2),
        TDA.cats(active=0.4),
    ],
    "int8": [None, TDA(scope="token", active=0.3), TDA.griffin(active=0.5)],
    "graded": [None, TDA(inputs=0.2), TDA(inputs=0)],
}


@pytest.mark.parametrize("weights", SETTINGS)
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_continuations_of_one_prompt(folder: Path, weights: str, kv: str):
    """Each is scored as if it were alone: after a long one, a short one, and a single token."""
    engine = Engine(folder, threads=2, weights=weights, kv=kv)
    prompt, *continuations = map(engine.tokenizer.encode, (PROMPT, "blue and wide", "2", "blue"))
    continuations.append([7])
    seconds = {"prefill_seconds", "mask_seconds", "decode_seconds", "tokens_per_second"}
    for tda in SETTINGS[weights]:
        found = _native.Engine.score_each(engine, prompt, continuations, tda)
        for each, continuation in zip(found, continuations, strict=True):
            alone = _native.Engine.score(engine, prompt + continuation, len(prompt), tda)
            assert np.array_equal(each.log_probabilities, alone.log_probabilities)
            assert np.array_equal(each.top_tokens, alone.top_tokens)
            for name in set(fields_of(alone.stats)) - seconds:
                assert getattr(each.stats, name) == getattr(alone.stats, name), name
        again = engine.score_each(prompt, continuations, tda or False)
        assert all(map(np.array_equal, again, (each.log_probabilities for each in found)))
    assert engine.score_each(prompt, []) == []


def test_the_prompt_of_continuations_runs_once(smollm2: Path):
    engine = Engine(smollm2, threads=1, weights="int8")
    prompt = engine.tokenizer.encode("One two three. " * 60)
    start = time.perf_counter()
    (single,) = _native.Engine.score_each(engine, prompt, [[5]])
    one = time.perf_counter() - start
    start = time.perf_counter()
    found = _native.Engine.score_each(engine, prompt, [[5]] * 20)
    assert time.perf_counter() - start < 5 * one
    assert {each.log_probabilities[0] for each in found} == {single.log_probabilities[0]}
