"""The harness's model for servers, local-completions, on ours: it gets what tdaengine as a model of
the harness gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import own_tasks
import pytest
from serving import serving

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
TOLERANCE = 2e-4  # of a token's log-probability, in f32
TASKS = ("own_choices", "own_texts")


def run(
    folder: Path, output: Path, program: str, model: str, arguments: dict[str, Any], *options: str
) -> dict[str, list[dict[str, Any]]]:
    """Runs the harness's command. Returns by task its samples, in the order of their rows."""
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [sys.executable, "-m", program, "--model", model, "--model_args", given, *options]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(folder)]
    command += ["--log_samples", "--output_path", str(output)]
    caches = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **caches})
    assert done.returncode == 0, done.stderr
    samples = {}
    for task in TASKS:
        (file,) = output.rglob(f"samples_{task}_*.jsonl")
        rows = map(json.loads, file.read_text().splitlines())
        samples[task] = sorted(rows, key=lambda row: row["doc_id"])
    return samples


def scores(samples: list[dict[str, Any]]) -> list[list[tuple[float, bool]]]:
    """Of each row's choices: log-likelihood, and whether it is the greedy text."""
    rows = [sample["filtered_resps"] for sample in samples]
    return [[(float(total), str(greedy) == "True") for total, greedy in row] for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That has the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    own_tasks.write(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict:
    own = {"pretrained": SMOLLM2, "weights": "f32"}
    return run(folder, folder / "own", "tdaengine.lm_eval", "tdaengine", own)


@pytest.mark.parametrize(("at_once", "batch"), [(1, 3), (3, 2)])
def test_tasks_through_the_server(
    tmp_path: Path, folder: Path, expected: dict, at_once: int, batch: int
):
    with serving(SMOLLM2, "--weights", "f32", "--name", "smol") as server:
        arguments = {
            "model": "smol",
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": SMOLLM2,
            "num_concurrent": at_once,
            "max_length": 8192,
        }
        options = ("--batch_size", str(batch))
        found = run(folder, tmp_path, "lm_eval", "local-completions", arguments, *options)
        asked = [line for line in server.log() if line.get("path") == "/v1/completions"]
    assert {line["status"] for line in asked} == {200}
    rows = list(zip(scores(found["own_choices"]), scores(expected["own_choices"]), strict=True))
    assert len(rows) == len(own_tasks.CHOICES) - 1
    for row, wanted in rows:
        assert [greedy for _, greedy in row] == [greedy for _, greedy in wanted]
        totals, expected_totals = [total for total, _ in row], [total for total, _ in wanted]
        assert totals == pytest.approx(expected_totals, abs=20 * TOLERANCE)
        assert totals.index(max(totals)) == expected_totals.index(max(expected_totals))
    for name in TASKS:
        metric = "acc" if name == "own_choices" else "exact_match"
        assert [row[metric] for row in found[name]] == [row[metric] for row in expected[name]]
    texts = [[row["resps"] for row in samples["own_texts"]] for samples in (found, expected)]
    assert texts[0] == texts[1]
    assert all(text for ((text,),) in texts[0])
