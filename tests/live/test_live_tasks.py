"""Compares what `evaluate --tasks` chooses with transformers, by the harness's way of encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdaengine import Engine
from tdaengine.tasks import Item, choose

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
QUERIES = {
    "Question: Which of these melts in the sun?": ["a stone", "an ice cream", "a spoon of iron"],
    "To dry wet clothes, one should": ["hang them outside", "put them into a lake", "sell them"],
    "She opened her umbrella because it": ["was raining.", "was a fish.", "had been eaten."],
    "The opposite of hot is": ["warm", "cold", "a very hot day in the middle of July"],
    "Goal: Cut bread into slices.\n": ["Use a knife.", "Use a pillow, and press hard.", "Sing."],
    "A week has ": ["seven days", "nine days", "no days at all"],
    "The teacher wrote on the": ["blackboard with chalk", "ocean with a fork", "moon"],
    "Whales live in": ["the sea", "trees", "der See, aber nicht im Baum"],
}
ITEMS = [
    *(Item(tuple((query, choice) for choice in some), 0) for query, some in QUERIES.items()),
    Item((("The cup fell so the cup", "broke."), ("The cup fell so the floor", "broke.")), 0),
    Item((("The capital of France is", "Paris"),), 0),
    Item((("The capital of France is", "Lyon"),), 0),
]


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(SMOLLM2)


@torch.no_grad()
def expected(reference, item: Item) -> list[int]:
    model, tokenizer = reference
    sums, per_byte, greedy = [], [], False
    for context, continuation in item.candidates:
        spaces = len(context) - len(context.rstrip())
        behind = context[len(context) - spaces :] if spaces else " "
        context = context[: len(context) - spaces] if spaces else context
        prompt = tokenizer(context).input_ids
        whole = tokenizer(context + behind + continuation).input_ids
        rows = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        rows = rows[len(prompt) - 1 : -1]
        following = torch.tensor(whole[len(prompt) :])
        sums.append(float(rows.gather(1, following[:, None]).sum()))
        per_byte.append(sums[-1] / len(continuation.encode()))
        greedy = bool((rows.argmax(-1) == following).all())
    if len(item.candidates) == 1:
        return [0 if greedy else -1] * 2
    return [sums.index(max(sums)), per_byte.index(max(per_byte))]


@pytest.mark.parametrize("weights", ["f32", "bf16"])
def test_choices(reference, weights: str):
    engine = Engine(SMOLLM2, weights=weights)
    wanted = [expected(reference, item) for item in ITEMS]
    assert [choose(engine, None, item)[0] for item in ITEMS] == wanted
    assert len({tuple(choice) for choice in wanted}) > 2  # or any constant would pass
