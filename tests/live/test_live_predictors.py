"""Training of predictors, which needs PyTorch, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from safetensors.torch import load_file

from tdaengine import TDA, Engine, OptionError, Predictor
from tdaengine.analyze import active_sets
from tdaengine.cli import main
from tdaengine.predictors import Recipe, balanced_clusters, train

TEXTS = [[(7 * i * (t + 1) + 3 * t + i * i) % 90 + 1 for i in range(120)] for t in range(20)]
DEJAVU = Recipe(rank=24, active=0.25, epochs=30)
EXPERTS = Recipe(rank=8, experts=8, active=0.25, epochs=30)
HELD_OUT = TEXTS[:2]
PARTS = ("first", "second")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_checkpoint(tmp_path_factory.mktemp("training") / "llama")
    return Engine(folder, device="cpu", threads=1)


@pytest.fixture(scope="module")
def dejavu(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("dejavu") / "predictor.safetensors"
    return path, train(engine, TEXTS, path, DEJAVU)


@pytest.fixture(scope="module")
def experts(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("experts") / "experts.safetensors"
    return path, train(engine, TEXTS, path, EXPERTS)


def test_a_predictor_beats_chance_by_far(dejavu: tuple[Path, dict]):
    figures = dejavu[1]
    assert figures["tokens"] == 240 and figures["active"] == 0.25
    for share, recall, precision in zip(
        figures["shares"], figures["recall"], figures["precision"], strict=True
    ):
        # The same neurons counted in two ways.
        assert precision == pytest.approx(np.array(recall) * 0.25 / share)
    quarter, half = figures["recall"][1], figures["recall"][2]
    assert min(quarter) > 0.45 and min(half) > 0.72  # chance gives .25 and .5


def test_the_figures_are_those_of_the_file(engine: Engine, dejavu: tuple[Path, dict]):
    """Recall of a quarter of the neurons, by hand from what the engine computes."""
    path, figures = dejavu
    tensors = load_file(path)
    found = []
    for text in HELD_OUT:
        session = engine.session(len(text), sample_tokens=len(text))
        session.prefill(text)
        x = session.ffn_inputs(1)
        first, second = (tensors[f"layers.1.{name}"].float().numpy() for name in PARTS)
        active = active_sets(session.contributions(1), 20)
        found.append((active_sets(x @ first.T @ second.T, 20) & active).sum() / active.sum())
    assert np.mean(found) == pytest.approx(figures["recall"][1][1], abs=0.01)


def test_experts_beat_chance(experts: tuple[Path, dict], engine: Engine):
    path, figures = experts
    tensors = load_file(path)
    for layer in range(engine.config.num_layers):
        sizes = np.bincount(tensors[f"layers.{layer}.expert_of"].numpy())
        assert sizes.tolist() == [10] * 8
    for i, share in enumerate(figures["shares"]):
        for recall, best in zip(figures["recall"][i], figures["best_recall"][i], strict=True):
            assert share + 0.02 < recall <= best + 0.03 or share > 0.8
    assert np.mean(figures["recall"][1]) > 0.32  # a quarter of the experts


def test_the_engine_runs_what_was_trained(
    engine: Engine, dejavu: tuple[Path, dict], experts: tuple[Path, dict]
):
    """Neurons chosen one by one cost less than as many in groups."""
    text = TEXTS[0]
    dense = engine.score(text, prompt_tokens=40)

    def loss(tda: TDA) -> float:
        return float(np.abs(engine.score(text, prompt_tokens=40, tda=tda) - dense).mean())

    assert Predictor.load(dejavu[0]).rank == 24
    assert Predictor.load(experts[0]).experts == 8
    assert loss(TDA.dejavu(dejavu[0], active=1)) == 0
    assert loss(TDA.moefication(experts[0], experts=8)) == 0
    trained = loss(TDA.dejavu(dejavu[0], active=0.5))
    assert 0 < trained < 0.7 * loss(TDA.moefication(experts[0], experts=4))


class Stop(Exception):
    pass


@pytest.mark.parametrize("recipe", [DEJAVU, EXPERTS], ids=["dejavu", "experts"])
@pytest.mark.parametrize("epochs", [1, 30, 44])
def test_a_training_that_was_stopped_gives_the_same_file(
    engine: Engine,
    dejavu: tuple[Path, dict],
    experts: tuple[Path, dict],
    tmp_path: Path,
    recipe: Recipe,
    epochs: int,
):
    """Within the first layer, at its end and within the second."""
    whole = experts if recipe.experts else dejavu
    path = tmp_path / "stopped.safetensors"

    def stop(done: int, total: int) -> None:
        if total == 60 and done == epochs + 1:  # the state is that of the epoch before
            raise Stop

    with pytest.raises(Stop):
        train(engine, TEXTS, path, recipe, save_seconds=0, progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["stopped.safetensors.training"]
    seen = []
    figures = train(engine, TEXTS, path, recipe, progress=lambda *each: seen.append(each))
    assert [done for done, total in seen if total == 60] == list(range(epochs + 1, 61))
    assert figures == whole[1]
    assert path.read_bytes() == whole[0].read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["stopped.safetensors"]


def test_a_training_goes_on_from_its_own_state_alone(engine: Engine, tmp_path: Path):
    path = tmp_path / "predictor.safetensors"
    state = tmp_path / "predictor.safetensors.training"

    def stop(done: int, total: int) -> None:
        if total == 60 and done == 2:
            raise Stop

    with pytest.raises(Stop):
        train(engine, TEXTS, path, DEJAVU, save_seconds=0, progress=stop)
    for other, name in ((Recipe(rank=23, active=0.25, epochs=30), "rank"), (EXPERTS, "rank")):
        with pytest.raises(OptionError, match=f"of another training: {name}"):
            train(engine, TEXTS, path, other)
    with pytest.raises(OptionError, match="of another training: texts"):
        train(engine, TEXTS[1:], path, DEJAVU)
    state.write_bytes(b"something else")
    with pytest.raises(OptionError, match="found something else than a training's state"):
        train(engine, TEXTS, path, DEJAVU)


def test_balanced_clusters_find_directions():
    random = np.random.default_rng(3)
    directions = random.standard_normal((4, 16))
    truth = random.permutation(np.arange(40) % 4)
    lengths = random.uniform(0.1, 10, (40, 1))
    rows = (directions[truth] + 0.05 * random.standard_normal((40, 16))) * lengths
    found = balanced_clusters(rows.astype(np.float32), 4, seed=1)
    assert len({(a, b) for a, b in zip(truth, found, strict=True)}) == 4  # but for their names
    uneven = balanced_clusters(rows.astype(np.float32), 7, seed=1)
    assert sorted(np.bincount(uneven)) == [5, 5, 6, 6, 6, 6, 6]


def test_the_commands(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"Text {i} of some. " * 5}) for i in range(4)))
    common = [str(engine.path), "--device", "cpu", "--data", str(data), "--epochs", "2"]
    predictor, groups = tmp_path / "p.safetensors", tmp_path / "e.safetensors"
    assert main(["train-predictor", *common, "--rank", "5", "-o", str(predictor)]) == 0
    assert "| neurons chosen | recall | precision |\n" in capsys.readouterr().out
    assert main(["train-experts", *common, "--experts", "4", "-o", str(groups), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["shares"] == [0.25, 0.25, 0.5, 0.75, 1.0] and len(figures["best_recall"]) == 5
    settings = [f"predictor={predictor},active=0.5", f"predictor={groups},experts=2"]
    lengths = ["--prompt-tokens", "20", "--score-tokens", "20"]
    options = [each for setting in settings for each in ("--tda", setting)]
    command = ["evaluate", str(engine.path), "--device", "cpu", "--data", str(data)]
    assert main([*command, *lengths, *options, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results[settings[0]]["tda"] == "token scope (DejaVu): 50% of neurons"
    assert results[settings[1]]["tda"] == "token scope (MoEfication): 2 of 4 experts"
