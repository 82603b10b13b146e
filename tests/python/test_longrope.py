"""Texts that outgrow longrope's original length: they are what they are as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from tdaengine import TDA, Engine, OptionError, PrefixCache

TOKENS = tiny.tokens("phi3_longrope")
PROMPT = TOKENS[:25]  # the original length is 32


def write(folder: Path, original: int) -> Path:
    tiny.write(folder, "phi3_longrope")
    config = json.loads((folder / "config.json").read_text())
    config |= {"original_max_position_embeddings": original, "max_position_embeddings": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("longrope") / "phi3", "phi3_longrope")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder, weights="f32", threads=2)


def test_every_length(engine: Engine):
    session = engine.session(len(TOKENS))
    session.prefill(TOKENS[:20])
    for length in range(21, len(TOKENS) + 1):
        found, expected = session.decode(TOKENS[length - 1]), engine.logits(TOKENS[:length])[-1]
        assert np.abs(found - expected).max() < 1e-4, length


def test_factors_differ(folder: Path, tmp_path: Path, engine: Engine):
    """Else the other tests would say little."""
    always = tiny.write(tmp_path / "always", "phi3_longrope")
    config = json.loads((always / "config.json").read_text())
    config["rope_scaling"]["long_factor"] = config["rope_scaling"]["short_factor"]
    (always / "config.json").write_text(json.dumps(config))
    short = Engine(always, weights="f32")
    for length, differ in ((32, False), (33, True)):
        difference = np.abs(short.logits(TOKENS[:length]) - engine.logits(TOKENS[:length])).max()
        assert difference > 0.5 if differ else difference == 0


def test_generated_tokens(engine: Engine):
    out = engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True)
    text = list(PROMPT)
    for token in out.token_ids:
        assert engine.logits(text)[-1].argmax() == token
        text.append(token)


def test_several_steps(tmp_path: Path):
    """The original length is more than two steps."""
    engine = Engine(write(tmp_path / "phi3", 513), weights="f32", threads=2)
    tokens = tiny.tokens("phi3_longrope", 530)
    session = engine.session(len(tokens))
    session.prefill(tokens[:505])
    for length in range(506, len(tokens) + 1):
        found = session.decode(tokens[length - 1])
        if length in (506, 513, 514, 515, 530):
            assert np.abs(found - engine.logits(tokens[:length])[-1]).max() < 1e-4, length


def test_back_to_a_shorter_text(engine: Engine):
    """Each continuation begins behind the prompt, whichever was scored before."""
    continuations = [TOKENS[25:45], TOKENS[26:29], TOKENS[40:60], [5]]
    for tokens, found in zip(continuations, engine.score_each(PROMPT, continuations), strict=True):
        expected = engine.score([*PROMPT, *tokens], prompt_tokens=len(PROMPT))
        assert np.abs(np.asarray(found) - expected).max() < 1e-4


def test_together_as_alone(folder: Path):
    engine = Engine(folder, weights="bf16", threads=2, max_batch=4)
    prompts = [TOKENS[:length] for length in (5, 20, 28, 31, 32, 33, 50)]
    options = {"max_new_tokens": 20, "ignore_eos": True}
    together = engine.generate(prompts, **options)
    for prompt, out in zip(prompts, together, strict=True):
        assert out.token_ids == engine.generate(prompt, **options).token_ids


@pytest.mark.filterwarnings("ignore::tdaengine.TdaWarning")
@pytest.mark.parametrize("options", [{}, {"refresh": 3}])
def test_new_keys_are_not_decoding(tmp_path: Path, options: dict):
    """Of 257 tokens whose keys are new, the last is a step of its own, like a decoded one."""
    engine = Engine(write(tmp_path / "phi3", 257), weights="f32", threads=2)
    tokens = tiny.tokens("phi3_longrope", 255)
    out = engine.generate(tokens, max_new_tokens=9, ignore_eos=True, tda=TDA(active=0.5, **options))
    assert out.stats.ffn_active == 0.5


@pytest.mark.parametrize(
    "weights, tda", [("int8", TDA(scope="token", active=0.9)), ("graded", TDA(inputs=0.9))]
)
def test_with_tda(folder: Path, weights: str, tda: TDA):
    """Decoded tokens before the original length and beyond are near dense ones."""
    engine = Engine(folder, weights=weights, threads=2)
    found = engine.score(TOKENS, prompt_tokens=len(PROMPT), tda=tda)
    dense = engine.score(TOKENS, prompt_tokens=len(PROMPT))
    assert 0 < np.abs(found - dense).max() < 1


def test_nothing_is_kept(folder: Path):
    with pytest.warns(UserWarning, match="nothing is kept of a model with dynamic RoPE or longr"):
        engine = Engine(folder, prefix_cache="1 MiB")
    assert engine.generate(PROMPT, max_new_tokens=1).stats.cached_tokens == 0
    with pytest.raises(OptionError, match="expected none: nothing is kept"):
        engine.generate(PROMPT, max_new_tokens=1, prefix_cache=PrefixCache())
