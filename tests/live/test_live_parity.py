"""Compares the engine with transformers on checkpoints that transformers saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tdaengine import Engine
from tdaengine.convert import convert

LENGTH = 100  # tokens; longer than the original context of every kind of scaled RoPE
PROMPT = 20
TOLERANCE = 1e-4  # in logits, which are about 3
SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


def random_model(name: str) -> PreTrainedModel:
    """A model initialised by transformers, except parameters that would then have no effect."""
    config = AutoConfig.for_model(**tiny.config_of(name))
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are 1, biases 0
                parameter += 0.3 * torch.randn_like(parameter)
        model.get_input_embeddings().weight *= 5
    return model


@pytest.fixture(scope="module", params=tiny.VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """transformers and the engine, loaded from what transformers saved."""
    variant = tiny.VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("live") / request.param
    storage = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    shards = {"max_shard_size": "30KB"} if variant.shards > 1 else {}
    random_model(request.param).to(storage[variant.storage]).save_pretrained(folder, **shards)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Engine(folder, weights="f32", max_context=LENGTH)


def sample(model: PreTrainedModel, seed: int) -> list[int]:
    return np.random.RandomState(seed).randint(0, model.config.vocab_size, LENGTH).tolist()


@torch.no_grad()
def test_prefill(pair: tuple[PreTrainedModel, Engine]):
    model, engine = pair
    for seed in range(3):
        tokens = sample(model, seed)
        expected = model(torch.tensor([tokens])).logits[0].numpy()
        assert np.abs(engine.logits(tokens) - expected).max() <= TOLERANCE
        assert expected.std() > 0.5  # else the tolerance would be loose


@torch.no_grad()
def test_decode(pair: tuple[PreTrainedModel, Engine]):
    model, engine = pair
    tokens = sample(model, 3)
    session = engine.session(LENGTH)
    out = model(torch.tensor([tokens[:PROMPT]]), use_cache=True)
    found, expected = session.prefill(tokens[:PROMPT]), out.logits[0, -1].numpy()
    assert np.abs(found - expected).max() <= TOLERANCE
    for position in range(PROMPT, LENGTH):
        past, begin = out.past_key_values, position
        if position == tiny.longrope_switch(model.config):  # as in generate() of Phi-3
            past, begin = None, 0
        step = torch.tensor([tokens[begin : position + 1]])
        out = model(step, past_key_values=past, use_cache=True)
        found, expected = session.decode(tokens[position]), out.logits[0, -1].numpy()
        assert np.abs(found - expected).max() <= TOLERANCE


@torch.no_grad()
def test_generate(pair: tuple[PreTrainedModel, Engine]):
    model, engine = pair
    prompt = sample(model, 4)[:PROMPT]
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, PROMPT, dtype=torch.int64),
        max_new_tokens=40,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    gaps = [scores[0].topk(2).values.diff().abs().item() for scores in out.scores]
    expected = out.sequences[0, PROMPT:].tolist()
    assert len(expected) == 40
    # Up to the first near tie, where rounding may decide.
    sure = next((i for i, gap in enumerate(gaps) if gap < 10 * TOLERANCE), len(gaps))
    assert sure > 0
    found = engine.generate(prompt, max_new_tokens=40, ignore_eos=True).token_ids
    assert found[:sure] == expected[:sure]


@torch.no_grad()
def test_converted_folders_load_in_transformers(tmp_path: Path):
    model = random_model("llama")
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    convert(tmp_path / "saved", tmp_path / "converted", dtype="bf16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert loaded.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


@torch.no_grad()
def test_demo_model():
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    engine = Engine(SMOLLM2, weights="f32")
    messages = [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "Apple."},
        {"role": "user", "content": "Another one, and why you like it?"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert engine.chat_prompt(messages) == ids
    expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(engine.logits(ids) - expected).max() <= 2e-3
