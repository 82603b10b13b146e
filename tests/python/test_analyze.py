"""What sets of active neurons depend on: the arithmetic on made-up sets, and on a tiny model."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from tdaengine import TDA, Engine, OptionError, plots
from tdaengine.analyze import (
    PARTS,
    active_sets,
    analyze,
    mask,
    overlap,
    recommendation,
    table,
)
from tdaengine.cli import main, make_parser
from tdaengine.options import parse_tda

TEXTS = [[(7 * i + 3 * t) % 90 + 1 for i in range(48)] for t in range(3)]
LENGTHS = {"prompt_tokens": 24, "score_tokens": 24}


def test_active_sets_are_the_largest():
    values = np.array([[3, 1, 2, 0], [0, 5, 4, 6]], dtype=np.float32)
    expected = [[True, False, True, False], [False, True, False, True]]
    assert active_sets(values, 2).tolist() == expected


def test_a_mask_weighs_every_token_alike():
    # The first token is large as a whole, but relative to it neuron 0 counts for no more than 2.
    contributions = np.array([[100, 1, 1, 1], [0, 0, 3, 1], [0, 0, 3, 1]], dtype=np.float32)
    assert mask(contributions, 2).tolist() == [True, False, True, False]
    assert mask(contributions, 1).tolist() == [False, False, True, False]
    assert mask(np.zeros((2, 4), dtype=np.float32), 3).sum() == 3


def test_overlap():
    a = np.array([True, True, False, False])
    assert overlap(a, a) == 1
    assert overlap(a, ~a) == 0
    assert overlap(a, np.stack([a, ~a, np.array([True, False, True, False])])) == 0.5


def test_the_statistic_is_that_of_the_engine(engine: Engine):
    session = engine.session(48, sample_tokens=48)
    session.prefill(TEXTS[0])
    for layer in range(engine.config.num_layers):
        contributions = session.contributions(layer)
        assert contributions.shape == (48, engine.config.intermediate_size)
        squares = contributions.astype(np.float64) ** 2
        expected = np.sqrt((squares / squares.sum(axis=1, keepdims=True)).mean(axis=0))
        assert session.statistic(layer) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(OptionError, match="sample_tokens > 0"):
        engine.session(4).contributions(0)


def test_figures_of_texts_that_say_the_same(engine: Engine):
    same = analyze(engine, [TEXTS[0], TEXTS[0]], **LENGTHS)
    assert same["texts"] == [1.0] * engine.config.num_layers
    # The mask's overlap with its own tokens' sets, by hand.
    session = engine.session(24, sample_tokens=24)
    session.prefill(TEXTS[0][:24])
    for layer in range(engine.config.num_layers):
        contributions, count = session.contributions(layer), round(same["active"] * 80)
        sets = active_sets(contributions, count)
        expected = sets[:, mask(contributions, count)].sum() / (24 * count)
        assert same["own"][layer] == pytest.approx(expected)
        # No mask of so many neurons has more of the later tokens' sets.
        whole = engine.session(48, sample_tokens=48)
        whole.prefill(TEXTS[0])
        later = active_sets(whole.contributions(layer), count)[24:]
        most = np.sort(later.sum(axis=0))[-count:].sum() / (24 * count)
        assert same["hindsight"][layer] == pytest.approx(most)
        assert most > np.mean(same["prompt"], axis=0)[layer]
    figures = analyze(engine, TEXTS, **LENGTHS)
    assert figures["compared"] == 3 and figures["active"] == pytest.approx(0.5, abs=0.02)
    assert len(figures["prompt"]) == PARTS
    for name in ("next", "own", "hindsight", "texts", "shuffled", "always", "never"):
        assert len(figures[name]) == engine.config.num_layers
        assert all(0 <= number <= 1 for number in figures[name])
    assert np.mean(figures["texts"]) < 1
    assert figures == analyze(engine, TEXTS, **LENGTHS)


def test_perplexity_with_masks(engine: Engine):
    found = analyze(engine, TEXTS, **LENGTHS)["perplexity"]
    scores: dict[str, list[float]] = {"dense": [], "prompt": [], "hindsight": []}
    for text in TEXTS:
        scores["dense"].append(engine.score(text, 24).mean(dtype="f8"))
        scores["prompt"].append(engine.score(text, 24, tda=TDA(active=0.5)).mean(dtype="f8"))
        whole = engine.session(48, sample_tokens=48)
        whole.prefill(text)
        session = engine.session(48)
        logits = [session.prefill(text[:24])]
        for layer in range(engine.config.num_layers):
            contributions = whole.contributions(layer)[24:].astype("f8")
            shares = contributions / np.linalg.norm(contributions, axis=1, keepdims=True)
            best = np.argsort(-(shares**2).mean(axis=0))[:40]
            session.set_mask(layer, np.sort(best))
        logits += [session.decode(token) for token in text[24:-1]]
        rows = np.array(logits, dtype="f8")
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        scores["hindsight"].append(rows[np.arange(24), text[24:]].mean())
    assert found["dense"] == pytest.approx(np.exp(-np.mean(scores["dense"])), rel=1e-5)
    for name in ("prompt", "hindsight"):
        losses = np.subtract(scores["dense"], scores[name])
        assert found[name]["change"] == pytest.approx(np.expm1(losses.mean()), abs=1e-6)
        assert found[name]["error"] == pytest.approx(losses.std(ddof=1) / 3**0.5, abs=1e-6)
    assert found["hindsight"] != found["prompt"]


def test_graded_weights_take_no_masks(engine: Engine):
    graded = Engine(engine.path, device="cpu", weights="graded", threads=1)
    figures = analyze(graded, TEXTS, **LENGTHS)
    assert figures["perplexity"] is None
    assert "perplexity" not in table(figures)
    assert "--weights int8" in recommendation(figures, "MODEL", "graded", cpu=True)


@pytest.mark.parametrize(
    ("prompt", "hindsight", "expected"),
    [
        (
            0.02,
            0.01,
            "hold here (+2.0%): tdaengine generate 'a b' PROMPT --weights bf16",
        ),
        (
            0.021,
            0.02,
            "prior: tdaengine calibrate 'a b' --weights bf16 --data TEXTS",
        ),
        (0.7, 0.26, "No mask of 0.75 of the neurons is likely to hold here, as even that chosen "),
    ],
)
def test_recommendations(prompt: float, hindsight: float, expected: str):
    cost = {"prompt": {"change": prompt}, "hindsight": {"change": hindsight}}
    figures = {"active": 0.75, "perplexity": cost}
    assert expected in recommendation(figures, "a b", "bf16", cpu=True)
    on_gpu = recommendation(figures, "a b", "bf16", cpu=False)
    assert "compact" not in on_gpu
    assert ("stay dense" in on_gpu) == (hindsight > 0.02)


def test_recommended_commands_are_ones(engine: Engine):
    """The command line takes them, but for the texts and files that they stand for."""
    for prompt, hindsight in ((0, 0), (1, 0), (1, 1)):
        cost = {"prompt": {"change": prompt}, "hindsight": {"change": hindsight}}
        text = recommendation(
            {"active": 0.5, "perplexity": cost}, str(engine.path), "f32", cpu=True
        )
        for command in re.findall(r"tdaengine ([^,]+(?:,\w+=\w+)*)", text):
            words = shlex.split(command)
            assert make_parser().parse_args(words).model == str(engine.path)
            if "--tda" in words and "FILE" not in command:
                parse_tda(words[words.index("--tda") + 1])


def test_wrong_options(engine: Engine):
    for texts, options, message in (
        (TEXTS[:1], {}, "found 1, expected at least 2"),
        ([TEXTS[0], TEXTS[1][:47]], {}, "text 1: found 47 tokens, expected 48"),
        (TEXTS, {"active": 0.0}, "active 0.0"),
        (TEXTS, {"active": 1.0}, "active 1.0"),
        (TEXTS, {"score_tokens": PARTS - 1}, f"score_tokens {PARTS - 1}"),
        (TEXTS, {"prompt_tokens": 1}, "prompt_tokens 1"),
    ):
        with pytest.raises(OptionError, match=message):
            analyze(engine, texts, **{**LENGTHS, **options})


def test_the_picture(engine: Engine, tmp_path: Path):
    figures = analyze(engine, TEXTS, **LENGTHS)
    plots.analysis(figures, engine, 24, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "texts.jsonl"
    texts = ["one two three four " * 20, "four three two one " * 20]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    common = ["analyze", str(engine.path), "--data", str(data), "--active", "0.25"]
    common += ["--prompt-tokens", "16", "--score-tokens", "16"]
    assert not main([*common, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["compared"] == 2
    assert not main(common)
    shown = capsys.readouterr().out
    assert f"| mean | {np.mean(figures['next']):.2f} | {np.mean(figures['own']):.2f} |" in shown
    assert f"| dense | {figures['perplexity']['dense']:.2f} |" in shown
    assert figures["recommendation"] in shown
    assert str(engine.path) in figures["recommendation"]
