"""Tasks for the Language Model Evaluation Harness, of a few rows that are written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHOICES = {
    "Question: Which of these melts in the sun?\nAnswer:": [" a stone", " an ice cream", " iron"],
    "To dry wet clothes, one should ": ["hang them outside", "put them into a lake"],
    "A week has": [" seven days", " nine days", " no days at all, as far as we know", " 7"],
    "The capital of France is": [" Paris", " Lyon"],
    "": ["The sky is blue.", "Blue sky the is."],
}
TEXTS = {"One, two, three,": "six", "The capital of France is": ".", "Red, green, blue,": "\n"}


def write(folder: Path) -> None:
    """own_choices picks one of several answers, own_texts writes until a stop string."""
    choices = [
        {"query": question, "choices": [each.strip() for each in choices], "gold": i % 2}
        for i, (question, choices) in enumerate(CHOICES.items())
        if question
    ]
    fields = "doc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    _write(folder, "own_choices", choices, f"output_type: multiple_choice\n{fields}")
    texts = [{"query": query, "answer": answer} for query, answer in TEXTS.items()]
    fields = "doc_to_text: query\ndoc_to_target: answer\n"
    options = json.dumps({"until": list(TEXTS.values()), "max_gen_toks": 12, "do_sample": False})
    fields += f"generation_kwargs: {options}\nmetric_list: [{{metric: exact_match}}]\n"
    _write(folder, "own_texts", texts, f"output_type: generate_until\n{fields}")


def _write(folder: Path, name: str, rows: list[dict[str, Any]], fields: str) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n{fields}"
    )
