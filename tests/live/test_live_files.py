"""What transformers makes of folders whose files disagree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import test_files_disagree as cases
import tiny
import torch
from transformers import AutoModelForCausalLM

from tdaengine import Engine


@pytest.mark.parametrize(("config", "generation", "expected"), cases.ENDS)
def test_ends_of_texts(tmp_path: Path, config: dict, generation: dict | None, expected: list[int]):
    model = AutoModelForCausalLM.from_pretrained(cases.write(tmp_path / "m", config, generation))
    found = model._prepare_generation_config(None)[0].eos_token_id
    assert ([found] if isinstance(found, int) else found or []) == expected


@torch.no_grad()
def test_a_head_of_its_own_counts_more_than_tied_embeddings(tmp_path: Path):
    folder = cases.write(tmp_path / "m", {"tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tiny.tokens("llama")
    expected = model(torch.tensor([tokens])).logits[0].numpy()
    found = Engine(folder, weights="f32", threads=1).logits(tokens)
    assert np.abs(found - expected).max() <= 1e-4
