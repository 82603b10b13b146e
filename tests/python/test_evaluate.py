"""`tdaengine evaluate`: figures that fit together, results that go on later, errors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny

from tdaengine import TDA, Engine, OptionError, Thresholds, cli
from tdaengine.evaluate import evaluate, frontier, lines_of, summary
from tdaengine.options import parse_tda

TEXTS = [[(7 * i + 3 * t) % 90 + 1 for i in range(40)] for t in range(3)]
LENGTHS = {"prompt_tokens": 24, "score_tokens": 16}
SETTINGS = {"half": TDA(active=0.5), "all": TDA(error=0)}
SPEEDS = ("tokens_per_second", "speedup", "speedup_quartiles")


@pytest.fixture(scope="module")
def int8(folder: Path) -> Engine:
    return Engine(folder, weights="int8", threads=1)


def without_speeds(results: dict) -> dict:
    return {
        name: {key: value for key, value in row.items() if key not in SPEEDS}
        for name, row in results.items()
    }


def test_figures(engine: Engine):
    results = evaluate(engine, TEXTS, SETTINGS, **LENGTHS)
    assert list(results) == ["dense", "half", "all"]
    dense, half, everything = results.values()
    scores = [
        {name: engine.score(ids, prompt_tokens=24, tda=tda) for name, tda in SETTINGS.items()}
        | {"dense": engine.score(ids, prompt_tokens=24)}
        for ids in TEXTS
    ]
    means = {name: [score[name].mean(dtype="f8") for score in scores] for name in scores[0]}
    assert half["perplexity"] == pytest.approx(math.exp(-np.mean(means["half"])))
    losses = np.subtract(means["dense"], means["half"])
    assert half["perplexity_change"] == pytest.approx(math.expm1(losses.mean()))
    assert half["perplexity_error"] == pytest.approx(losses.std(ddof=1) / math.sqrt(3))
    assert half["active_by_layer"] == [0.5, 0.5] and half["ffn_bytes"] == 0.5
    assert (dense["tda"], half["tda"]) == ("dense", "sequence scope: 50% of neurons")
    assert half["bytes_per_token"] < dense["bytes_per_token"]
    assert everything["perplexity"] == dense["perplexity"]
    assert everything["top1_agreement"] == dense["top1_agreement"] == 1
    for row in results.values():
        low, high = row["speedup_quartiles"]
        assert 0 < low <= row["speedup"] <= high
    assert dense["speedup_quartiles"] == [1, 1]


def test_speeds_are_medians_of_ratios():
    row = {name: 1 for name in ("log_probability", "loss", "agreed", "active", "coarse")}
    row |= {
        "tda": "dense",
        "ffn_bytes": 1,
        "bytes_per_token": 1,
        "active_by_layer": [1],
        "tokens_per_second": 5,
    }
    of = summary([{**row, "speedup": speedup} for speedup in (1, 9, 2, 1.5, 3)], score_tokens=1)
    assert (of["speedup"], of["speedup_quartiles"]) == (2, [1.5, 3])
    one = summary([{**row, "speedup": 2}], score_tokens=1)
    assert (one["speedup_quartiles"], one["perplexity_error"]) == ([2, 2], None)


def test_every_setting_has_each_place_once(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    order, score = [], Engine.__base__.score

    def noted(self: Engine, ids: list[int], prompt: int, tda: TDA | None):
        order.append(None if tda is None else tda.active if tda.error is None else tda.error)
        return score(self, ids, prompt, tda)

    monkeypatch.setattr(Engine.__base__, "score", noted)
    evaluate(engine, TEXTS, SETTINGS, **LENGTHS)
    assert order == [None, 0.5, 0, 0.5, 0, None, 0, None, 0.5]


def test_another_format_of_weights(engine: Engine, int8: Engine):
    results = evaluate(int8, TEXTS, {}, others={"as it is": (engine, None)}, **LENGTHS)
    same = evaluate(engine, TEXTS, {}, **LENGTHS)["dense"]
    assert results["as it is"]["perplexity"] == same["perplexity"]
    assert results["as it is"]["bytes_per_token"] == same["bytes_per_token"]
    assert results["as it is"]["perplexity"] != results["dense"]["perplexity"]


def test_an_interrupted_evaluation_goes_on(engine: Engine, tmp_path: Path):
    whole, file = tmp_path / "whole.jsonl", tmp_path / "results.jsonl"
    expected = evaluate(engine, TEXTS, SETTINGS, output=whole, **LENGTHS)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(engine, TEXTS, SETTINGS, output=file, progress=stop, **LENGTHS)
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    file.write_bytes(b"".join(lines) + whole.read_bytes().splitlines()[3][:50])
    seen = []
    results = evaluate(
        engine, TEXTS, SETTINGS, output=file, progress=lambda *done: seen.append(done), **LENGTHS
    )
    assert seen == [(3, 3)]
    assert without_speeds(results) == without_speeds(expected)
    assert file.read_bytes().splitlines(keepends=True)[:3] == lines
    # With nothing left to do, the file says it all; speeds, too.
    assert evaluate(engine, TEXTS, SETTINGS, output=file, **LENGTHS) == results


def test_results_of_something_else(engine: Engine, int8: Engine, tmp_path: Path):
    file = tmp_path / "results.jsonl"
    evaluate(engine, TEXTS[:2], SETTINGS, output=file, **LENGTHS)
    content = file.read_bytes()
    other = {**SETTINGS, "half": TDA(active=0.25)}
    for changed, texts, settings, lengths, message in (
        (engine, TEXTS, other, LENGTHS, "half: tda: active: found 0.5, expected 0.25"),
        (engine, TEXTS, {}, LENGTHS, "found .*, expected None"),
        (int8, TEXTS, SETTINGS, LENGTHS, "found 'f32', expected 'int8'"),
        (engine, TEXTS[1:], SETTINGS, LENGTHS, "text 0: found"),
        (engine, TEXTS[:1], SETTINGS, LENGTHS, "found 2 texts, expected at most 1"),
        (engine, TEXTS, SETTINGS, {**LENGTHS, "score_tokens": 8}, "score_tokens: found 16"),
    ):
        with pytest.raises(OptionError, match=message):
            evaluate(changed, texts, settings, output=file, **lengths)
    assert file.read_bytes() == content
    for broken in (b"{}\n", b"[]\n", b"\xff\n", b"no line end", content.replace(b'"text"', b'"x"')):
        file.write_bytes(broken)
        with pytest.raises(OptionError, match=f"{file}: found something else"):
            evaluate(engine, TEXTS, SETTINGS, output=file, **LENGTHS)
        assert file.read_bytes() == broken


def test_wrong_options(engine: Engine, int8: Engine, tmp_path: Path):
    stranger = Engine(tiny.write(tmp_path / "stranger", "llama_bias"), threads=1)
    for texts, settings, options, message in (
        (TEXTS, {"dense": TDA(active=0.5)}, {}, "found 'dense' twice"),
        (TEXTS, SETTINGS, {"others": {"half": (int8, None)}}, "found 'half' twice"),
        (TEXTS, {}, {"others": {"int4": (stranger, None)}}, "int4: found another checkpoint"),
        ([], {}, {}, "texts: found none"),
        ([TEXTS[0], TEXTS[1][:39]], {}, {}, "text 1: found 39 tokens, expected 40"),
        (TEXTS, {}, {"prompt_tokens": 0}, "prompt_tokens 0"),
        (TEXTS, {}, {"score_tokens": 1}, "score_tokens 1"),
    ):
        with pytest.raises(OptionError, match=message):
            evaluate(engine, texts, settings, **{**LENGTHS, **options})


def test_parse_tda(int8: Engine, tmp_path: Path):
    file = tmp_path / "thresholds.json"
    int8.calibrate(TEXTS, scope="token", bytes=0.7).save(str(file))
    assert parse_tda(f"thresholds={file}").thresholds.scope == "token"
    assert (repr(parse_tda("recommended")), parse_tda("off")) == ("TDA()", None)
    assert parse_tda("scope=token,active=0.3").active == 0.3
    for text, message in (
        ("active", "found 'active', expected NAME=VALUE"),
        ("active=0.5,active=0.6", "found 'active' twice"),
        ("active=0.5,error=0.1", "active"),
        ("active=0.5,coarse=0.2", 'unknown option "coarse"'),
        (f"scope=sequence,thresholds={file}", "scope"),
        ("speed=1", "unknown option"),
    ):
        with pytest.raises(OptionError, match=message):
            engine_setting = parse_tda(text)
            int8.score(TEXTS[0], prompt_tokens=24, tda=engine_setting)


def test_frontier_is_six_settings_each(folder: Path):
    for weights in ("int8", "bf16"):
        settings = frontier(Engine(folder, weights=weights))
        assert [len(family) for family in settings.values()] == [6] * 4


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    texts = ["one two three four " * 5, "four three two one " * 5]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


COMMON = ["--prompt-tokens", "16", "--score-tokens", "16", "--threads", "1"]


def test_settings_as_text(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    settings = ("error=0", "active=0.5,refresh=8")
    options = [f"--tda={setting}" for setting in settings]
    assert not cli.main(["evaluate", str(folder), "--data", str(data), *COMMON, *options, "--json"])
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["dense", *settings]
    dense, exact, sparse = results.values()
    assert exact["perplexity"] == dense["perplexity"] and exact["top1_agreement"] == 1
    assert sparse["perplexity"] != dense["perplexity"] and sparse["active"] == 0.5
    assert sparse["ffn_bytes"] > 0.5  # the refreshes read all


def test_the_frontier_with_its_picture(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture, output = tmp_path / "frontier.png", tmp_path / "results.jsonl"
    command = ["evaluate", str(folder), "--data", str(data), *COMMON, "--weights", "int8"]
    command += ["--frontier", "--tda=scope=token,active=0.9", "--also", "int4"]
    command += ["--output", str(output)]
    assert not cli.main([*command, "--plot", str(picture)])
    out, err = capsys.readouterr()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(out.splitlines()) == 2 + 1 + 1 + 4 * 6 + 1
    assert "| token 0.7 | " in out and "\n| int4 dense | 1.00 + 0.00 | " in out
    assert "2/2" in err
    assert not cli.main([*command, "--json"])  # nothing is left to do
    out, err = capsys.readouterr()
    assert json.loads(out)["int4 dense"]["texts"] == 2 and not err


def test_errors_come_before_the_work(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    thresholds = tmp_path / "thresholds.json"
    Engine(folder, threads=1).calibrate(TEXTS, scope="token").save(str(thresholds))
    assert Thresholds.load(str(thresholds)).weights == "f32"
    int8 = ["--weights", "int8"]
    for arguments, message in (
        ([*int8, "--tda", f"thresholds={thresholds}"], "are for f32 weights, found int8"),
        (["--tda", "inputs=0.2"], "expected graded or int4 weights, found f32"),
        (["--tda", "active=0.5", "--tda", "active=0.5"], "found 'active=0.5' twice"),
        (["--also", "int8", "--also", "int8"], "found 'int8' twice"),
        (["--also", "int3"], "int3"),
        (["--also", "int8,speed=1"], 'unknown option "speed"'),
        (["--tda", "active=2"], "active 2"),
        (["--plot", "picture.jpg"], "picture.jpg: expected a name that ends in .png or .svg"),
        (["--plot", str(tmp_path / "absent" / "x.png")], "no such folder"),
        (["--texts", "0"], "--texts 0: expected 1 or more"),
        (["--prompt-tokens", "90"], "found none of 2 texts with 106 tokens or more"),
        (["--output", str(data)], "found something else than results"),
    ):
        command = ["evaluate", str(folder), "--data", str(data), *COMMON, *arguments]
        assert cli.main(command) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and message in err, arguments


def test_settings_that_differ_in_one_value_are_a_line():
    names = ["inputs=0.3", "error=0.1", "inputs=0.1", "recommended", "scope=token,active=0.3"]
    lines = lines_of({name: TDA() for name in names})
    assert {line: list(members) for line, members in lines.items()} == {
        "inputs=0.3 to 0.1": ["inputs=0.3", "inputs=0.1"],
        "error=0.1": ["error=0.1"],
        "recommended": ["recommended"],
        "scope=token,active=0.3": ["scope=token,active=0.3"],
    }


def test_a_picture_without_matplotlib(
    folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert cli.main(["evaluate", str(folder), "--data", str(data), *COMMON, "--plot=x.png"]) == 2
    assert "pip install 'tdaengine[plot]'" in capsys.readouterr().err
