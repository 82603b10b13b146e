"""`tdaengine evaluate --tasks`: choices as the logits say, figures that fit together, errors."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tdaengine import TDA, Engine, OptionError, cli, plots
from tdaengine.tasks import (
    Item,
    choose,
    encode_pair,
    evaluate_tasks,
    mean_of_tasks,
    read_items,
    summary,
    table,
)

CHOICES = [
    {"query": "The sky is", "choices": ["blue.", "a long answer", "x"], "gold": 0},
    {"query": "Two:\n", "choices": ["2", "three", "5 or so"], "gold": 2},
    {"query": "One more", "choices": ["b", "aa", "ccc"], "gold": 1},
]
CONTEXTS = [
    {"contexts": ["Ann was ill so Ann", "Ann was ill so Bea"], "continuation": "slept.", "gold": 1}
]


def write(path: Path, items: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n\n")
    return path


def tasks_of(results: dict) -> list[dict]:
    return [task for tasks in results.values() for task in tasks.values()]


def without_seconds(lines: list[str]) -> list[dict]:
    rows = [json.loads(line) for line in lines]
    for row in rows[1:]:
        assert all(row[name].pop("seconds") > 0 for name in row if name != "text")
    return rows


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def likelihood(engine: Engine, context: str, continuation: str) -> float:
    """From the logits of the whole text, without `score`. A token is a character here."""
    before = engine.tokenizer.encode(context)
    ids = engine.tokenizer.encode(context + continuation)
    assert ids[: len(before)] == before
    rows = log_softmax(engine.logits(ids))[len(before) - 1 : -1]
    return float(sum(row[token] for row, token in zip(rows, ids[len(before) :], strict=True)))


def test_the_likeliest_choice(engine: Engine, tmp_path: Path):
    for item, source in zip(read_items(write(tmp_path / "t.jsonl", CHOICES)), CHOICES, strict=True):
        query, choices = source["query"], source["choices"]
        space = "" if query[-1].isspace() else " "
        # The gap belongs to the continuation, as it may be part of its first token.
        bare = query.rstrip()
        gap = query[len(bare) :] + space
        sums = [likelihood(engine, bare, gap + choice) for choice in choices]
        lengths = [len(choice.encode()) for choice in choices]
        expected = [int(np.argmax(sums)), int(np.argmax(np.divide(sums, lengths)))]
        assert choose(engine, None, item)[0] == expected


def test_the_likeliest_context(engine: Engine, tmp_path: Path):
    (item,) = read_items(write(tmp_path / "t.jsonl", CONTEXTS))
    sums = [likelihood(engine, context, " slept.") for context in CONTEXTS[0]["contexts"]]
    assert choose(engine, None, item)[0][0] == int(np.argmax(sums))


def test_the_last_word_is_what_greedy_decoding_gives(smollm2: Path):
    engine = Engine(smollm2)
    for word, expected in (("Paris", 0), ("Lyon", -1)):
        item = Item((("The capital of France is", word),), 0)
        assert choose(engine, None, item)[0] == [expected] * 2


def test_how_texts_are_joined(engine: Engine):
    for context, continuation, whole in (
        ("A question?", "Yes", "A question? Yes"),
        ("A question?\n", "Yes", "A question?\nYes"),
    ):
        ids, prompt = encode_pair(engine, context, continuation)
        assert ids == engine.tokenizer.encode(whole)
        assert ids[:prompt] == engine.tokenizer.encode("A question?")


def test_figures():
    gold = [0, 1, 2, 1]
    dense = [[0, 0], [1, 0], [0, 2], [0, 1]]
    chosen = [[0, 0], [0, 1], [2, 2], [1, 0]]
    found = summary(chosen, dense, gold)
    assert (found["items"], found["as_dense"]) == (4, 0.25)
    assert found["raw"]["accuracy"] == 0.75 and found["raw"]["change"] == 0.25
    assert found["raw"]["error"] == pytest.approx(0.25)
    changes = np.array([0, -1, 1, 1])
    assert found["raw"]["change_error"] == pytest.approx(changes.std(ddof=1) / 2)
    assert found["by_length"]["accuracy"] == 0.75 and found["by_length"]["change"] == 0


def test_settings_beside_dense_and_going_on(engine: Engine, tmp_path: Path):
    tasks = {
        "choices": read_items(write(tmp_path / "choices.jsonl", CHOICES)),
        "contexts": read_items(write(tmp_path / "contexts.jsonl", CONTEXTS)),
    }
    settings = {"all": TDA(error=0), "few": TDA(active=0.1)}
    output = tmp_path / "rows"
    whole = evaluate_tasks(engine, tasks, settings, output=output)
    assert list(whole) == ["dense", "all", "few"]
    for task, count in (("choices", 3), ("contexts", 1)):
        for metric in ("raw", "by_length", "as_dense"):
            assert whole["all"][task][metric] == whole["dense"][task][metric]
        assert whole["dense"][task]["items"] == count
        assert whole["dense"][task]["raw"]["change"] == 0
    lines = output.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    first = {name: items[:1] for name, items in tasks.items()}
    fewer = tmp_path / "fewer"
    evaluate_tasks(engine, first, settings, output=fewer)
    expected = without_seconds(lines[:3])  # one of each task
    assert without_seconds(fewer.read_text().splitlines()) == expected
    output.write_text("".join(lines[:3]) + lines[3][:9])
    steps: list[tuple[int, int]] = []
    again = evaluate_tasks(
        engine, tasks, settings, output=output, progress=lambda *step: steps.append(step)
    )
    for results in (again, whole):
        assert all(task.pop("tokens_per_second") > 0 for task in tasks_of(results))
    assert again == whole
    assert steps == [(3, 4), (4, 4)]
    assert without_seconds(output.read_text().splitlines()) == without_seconds(lines)
    with pytest.raises(OptionError, match="these are other results"):
        evaluate_tasks(engine, tasks, {"all": TDA(active=0.5)}, output=output)
    with pytest.raises(OptionError, match="found 'dense' twice"):
        evaluate_tasks(engine, tasks, {"dense": TDA(active=0.5)})
    rows = table(whole).splitlines()
    assert rows[0] == (
        "| setting | choices (3) | contexts (1) | mean | chosen as dense | MB per token |"
    )
    assert rows[3].startswith("| all | ") and "(+0.0 ± 0.0) | 1.000 | " in rows[3]


def test_written_answers(engine: Engine, smollm2: Path, tmp_path: Path):
    model = Engine(smollm2)
    lines = [
        {"question": "What is 2 + 2?", "answer": "2 and 2 are <<2+2=4>>4.\n#### 4"},
        {"question": "What is 2 + 2?", "answer": "#### 5"},
        {"question": "Say nothing of numbers, just hello. Hello?", "answer": "1,234.50"},
    ]
    items = read_items(write(tmp_path / "t.jsonl", lines))
    assert [item.candidates[0][1] for item in items] == ["4", "5", "1234.5"]
    found = evaluate_tasks(model, {"t": items}, {})["dense"]["t"]
    prompt = "Question: What is 2 + 2?\nAnswer:"
    text = model.generate(prompt, max_new_tokens=256, stop="\nQuestion:").text
    last = re.findall(r"\d+", text)[-1]
    assert last in ("4", "5")  # or nothing would be shown
    assert found["raw"]["accuracy"] == pytest.approx(1 / 3)
    # Where the context is short, the text ends with it.
    assert evaluate_tasks(engine, {"t": items[:1]}, {})["dense"]["t"]["items"] == 1


def test_means_of_tasks():
    def task(accuracy: float, error: float, change: float, change_error: float) -> dict:
        names = ("accuracy", "error", "change", "change_error")
        return {"raw": dict(zip(names, (accuracy, error, change, change_error), strict=True))}

    found = mean_of_tasks({"a": task(0.5, 0.03, -0.1, 0), "b": task(0.25, 0.04, 0, 0.02)}, "raw")
    expected = {"accuracy": 0.375, "error": 0.025, "change": -0.05, "change_error": 0.01}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: "),
        ("[1]", "found none, expected query, choices, gold; or contexts"),
        ('{"text": "x"}', "found text, expected query, choices, gold"),
        ('{"query": 1, "choices": ["a"], "gold": 0}', "query: found 1, expected a text"),
        ('{"query": "q", "choices": [], "gold": 0}', r"choices: found \[\], expected a list"),
        ('{"query": "q", "choices": ["a", 2], "gold": 0}', "choices: found"),
        ('{"query": "q", "choices": ["a"], "gold": 1}', "gold: found 1, expected 0 to 0"),
        ('{"query": "q", "choices": ["a"], "gold": true}', "gold: found True, expected 0 to 0"),
        ('{"query": " ", "choices": ["a"], "gold": 0}', "found an empty text"),
        ('{"context": "c", "continuation": ""}', "found an empty text"),
        ('{"question": "q", "answer": "none"}', "answer: found 'none', expected a number"),
        ('{"question": " ", "answer": "3"}', "question: found ' ', expected a text"),
        ("", "found no items"),
    ],
)
def test_bad_items(tmp_path: Path, line: str, message: str):
    path = tmp_path / "task.jsonl"
    path.write_text(line)
    with pytest.raises(OptionError, match=message):
        read_items(path)


def test_command(folder: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = [
        str(write(tmp_path / "choices.jsonl", CHOICES)),
        str(write(tmp_path / "two.jsonl", CONTEXTS)),
    ]
    command = ["evaluate", str(folder), "--weights", "f32", "--tasks", *files]
    setting = ["--tda", "active=0.5", "--texts", "2"]
    assert cli.main([*command, *setting]) == 0
    assert "| setting | choices (2) | two (1) |" in capsys.readouterr().out
    assert cli.main([*command, *setting, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    items = {"choices": read_items(Path(files[0]), 2), "two": read_items(Path(files[1]))}
    expected = evaluate_tasks(engine, items, {"active=0.5": TDA(active=0.5)})
    for rows in (found, expected):
        assert all(task.pop("tokens_per_second") > 0 for task in tasks_of(rows))
    assert found == expected
    plotted = ["--weights", "int8", *setting, "--also", "f32", "--plot", str(tmp_path / "p.png")]
    assert cli.main([*command, *plotted]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    also = ["--also", "int8", "--also", "int8,active=0.5", "--also", "graded,recommended"]
    assert cli.main([*command, *also, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["dense", "int8 dense", "int8 active=0.5", "graded recommended"]
    read = [found[name]["choices"]["bytes_per_token"] for name in found]
    assert read[0] > read[1] > read[2] and read[3] < read[1]
    for more, message in (
        (["--plot", "x.gif"], "--plot x.gif: expected a name that ends in .png or .svg"),
        (["--score-tokens", "8"], "--score-tokens: expected with --data only"),
        ([files[0]], "--tasks: found 'choices' twice"),
        (["--texts", "0"], "--texts 0: expected 1 or more"),
    ):
        assert cli.main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "tdaengine.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"needs lm_eval, pip install 'tdaengine\[eval\]'"):
        importlib.import_module("tdaengine.lm_eval")


def test_lines_of_a_picture_look_different():
    assert len({tuple(plots.style(i).values()) for i in range(70)}) == 70
