"""Writes tests/golden: transformers' results in f32, with which our tests compare.

usage: make_golden.py [--check]

--check computes everything again and compares it with the files instead. Needs torch, transformers
and models/SmolLM2-135M-Instruct (see demo_model.py).

    inputs.json            written by hand: prompts, a text, strings
    tiny.npz               per variant of tests/python/tiny.py logits of PREFILL_POSITIONS, run as
                           one prefill, and of DECODE_POSITIONS, decoded token by token
    smollm2_greedy.json    per prompt its ids and GREEDY_TOKENS greedy continuations, and how far
                           the closest second choice was from the first ("gap", in logits)
    smollm2_text.npz       the text's TEXT_TOKENS ids, the most likely token after each, and logits
                           of some ids at some positions
    smollm2_tokenizer.json the ids of the strings, and what these decode to
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
sys.path.insert(0, str(ROOT / "tests" / "python"))

import tiny  # noqa: E402

PREFILL_POSITIONS = [0, 40, 79]
PROMPT_TOKENS = 24  # of the tiny models' text; the rest is decoded
DECODE_POSITIONS = [33, 79]
GREEDY_TOKENS = 64
SMALLEST_GAP = 1e-3  # below this, rounding could change a greedy token
TEXT_TOKENS = 300
TOLERANCE = 1e-4  # in logits, for differences between machines


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def decode_logits(model, tokens: list[int], prompt_tokens: int) -> np.ndarray:
    """Logits [T - P, V] of the tokens after the prompt, decoded one by one with a cache."""
    past = model(torch.tensor([tokens[:prompt_tokens]]), use_cache=True).past_key_values
    rows = []
    for position in range(prompt_tokens, len(tokens)):
        begin = position
        if position == tiny.longrope_switch(model.config):  # as in generate() of Phi-3
            past, begin = None, 0
        step = torch.tensor([tokens[begin : position + 1]])
        out = model(step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        rows.append(out.logits[0, -1].numpy())
    return np.stack(rows)


def tiny_logits() -> dict[str, np.ndarray]:
    arrays = {
        "prefill_positions": np.array(PREFILL_POSITIONS),
        "prompt_tokens": np.array(PROMPT_TOKENS),
        "decode_positions": np.array(DECODE_POSITIONS),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in tiny.VARIANTS:
            model = load(tiny.write(Path(folder) / name, name))
            tokens = tiny.tokens(name)
            prefill = model(torch.tensor([tokens])).logits[0].numpy()
            decoded = decode_logits(model, tokens, PROMPT_TOKENS)
            arrays[f"{name}.prefill"] = prefill[PREFILL_POSITIONS]
            arrays[f"{name}.decode"] = decoded[[p - PROMPT_TOKENS for p in DECODE_POSITIONS]]
    return arrays


def greedy(model, tokenizer, prompt: dict) -> dict:
    if prompt["chat"]:
        messages = [{"role": "user", "content": prompt["text"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer.encode(prompt["text"])
    past, step, new, gap = None, ids, [], float("inf")
    for _ in range(GREEDY_TOKENS):
        out = model(torch.tensor([step]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        first, second = out.logits[0, -1].topk(2).values.tolist()
        gap = min(gap, first - second)
        step = [int(out.logits[0, -1].argmax())]
        new += step
    if gap < SMALLEST_GAP:
        print(f"{prompt['text']!r}: gap {gap:.1e}, choose another prompt")
    return {"prompt": ids, "tokens": new, "gap": round(gap, 5)}


def text_logits(model, tokenizer, text: str) -> dict[str, np.ndarray]:
    tokens = tokenizer.encode(text)[:TEXT_TOKENS]
    assert len(tokens) == TEXT_TOKENS, f"the text has only {len(tokens)} tokens"
    logits = model(torch.tensor([tokens])).logits[0].numpy()
    positions = np.linspace(0, TEXT_TOKENS - 1, 10).astype(np.int64)
    ids = np.linspace(0, logits.shape[1] - 1, 64).astype(np.int64)
    return {
        "tokens": np.array(tokens),
        "top": logits.argmax(1),
        "positions": positions,
        "ids": ids,
        "logits": logits[np.ix_(positions, ids)],
    }


@torch.no_grad()
def make() -> dict[str, dict | list]:
    inputs = json.loads((GOLDEN / "inputs.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = load(MODEL)
    encoded = [tokenizer.encode(text) for text in inputs["strings"]]
    return {
        "tiny.npz": tiny_logits(),
        "smollm2_greedy.json": [greedy(model, tokenizer, p) for p in inputs["prompts"]],
        "smollm2_text.npz": text_logits(model, tokenizer, inputs["text"]),
        "smollm2_tokenizer.json": [
            {"text": text, "ids": ids, "decoded": tokenizer.decode(ids)}
            for text, ids in zip(inputs["strings"], encoded, strict=True)
        ],
    }


def write(path: Path, content: dict | list) -> None:
    if path.suffix == ".npz":
        np.savez_compressed(path, **content)
    else:  # one entry per line
        lines = ",\n".join(json.dumps(entry) for entry in content)
        path.write_text(f"[\n{lines}\n]\n")


def difference(path: Path, content: dict | list) -> str | None:
    if path.suffix == ".npz":
        stored = dict(np.load(path))
        if stored.keys() != content.keys():
            return f"other arrays: {sorted(stored.keys() ^ content.keys())}"
        for name, values in content.items():
            error = np.abs(stored[name] - values).max()
            if error > (TOLERANCE if values.dtype == np.float32 else 0):
                return f"{name} differs by up to {error}"
        return None
    for i, (stored, made) in enumerate(zip(json.loads(path.read_text()), content, strict=True)):
        if {**stored, "gap": 0} != {**made, "gap": 0}:
            return f"entry {i} is {stored}, now {made}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    differences = 0
    for name, content in make().items():
        if not check:
            write(GOLDEN / name, content)
        elif found := difference(GOLDEN / name, content):
            print(f"{GOLDEN / name}: {found}")
            differences += 1
    sys.exit(differences > 0)


if __name__ == "__main__":
    main()
