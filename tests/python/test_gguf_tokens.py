"""convert from GGUF: which tokens end a text and which are no text, whatever the file says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import tiny_gguf
from converting import read_json, refused

from tdaengine import CheckpointError, Engine
from tdaengine.convert import convert
from tdaengine.tokenizer import Tokenizer

NORMAL, CONTROL, UNUSED = 1, 3, 5
# What llama.cpp takes for the end of a text, a turn or a message, in the order of its list.
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
)
CONFIG = tiny.BASE | {"vocab_size": 160, "hidden_size": 16, "intermediate_size": 16}


SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "<|im_end|>"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, 0.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": None,
}


def write(folder: Path, more: dict[str, int], metadata: dict | None = None) -> Path:
    """more: further tokens and their types; "end" in metadata stands for no eos_token_id."""
    tokens = [*tiny_gguf.BPE_TOKENS, *more]
    values = {
        "tokenizer.ggml.tokens": ["<plain>", *tokens[1:]],
        "tokenizer.ggml.token_type": [NORMAL, *tiny_gguf.BPE_TYPES[1:], *more.values()],
        "tokenizer.ggml.eos_token_id": None,
    }
    weights = tiny.make_weights(CONFIG, seed=1)
    return tiny_gguf.write(folder / "model.gguf", CONFIG, weights, values | (metadata or {}))


def first(more: int = 0) -> int:
    """The id of the first token of `more`."""
    return len(tiny_gguf.BPE_TOKENS) + more


def ends(folder: Path) -> list[int]:
    ids = read_json(folder / "generation_config.json").get("eos_token_id", [])
    assert read_json(folder / "config.json")["eos_token_id"] == (ids or None)
    return ids if isinstance(ids, list) else [ids]


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, UNUSED])
def test_ends_are_known_by_name(tmp_path: Path, kind: int):
    names = [name for name in ENDS if name != "<|end|>"]
    convert(write(tmp_path, dict.fromkeys(names, kind)), tmp_path / "out")
    ids = [first(i) for i in range(len(names))]
    assert ends(tmp_path / "out") == ids
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.encode(f"1{'1'.join(names)}1")[1::2] == ids
    assert tokenizer.decode([18, *ids, 18]) == "11"
    assert Engine(tmp_path / "out").config.eos_tokens == ids


def test_ends_of_several_kinds(tmp_path: Path):
    more = {"<|im_start|>": NORMAL, "<|im_end|>": NORMAL, "<|endoftext|>": CONTROL, "x<": NORMAL}
    metadata = {
        "tokenizer.ggml.eos_token_id": first(2),
        "tokenizer.ggml.eot_token_id": first(2),
        "tokenizer.ggml.eom_token_id": 5,
        "tokenizer.ggml.eos_token_ids": [first(2), 7],
    }
    convert(write(tmp_path, more, metadata), tmp_path / "out")
    assert ends(tmp_path / "out") == [first(2), 5, 7, first(1)]


def test_the_end_of_a_part_is_no_end_of_a_message(tmp_path: Path):
    more = {"<|end|>": CONTROL, "<|return|>": CONTROL}
    convert(write(tmp_path, more), tmp_path / "one")
    assert ends(tmp_path / "one") == [first(), first(1)]
    convert(write(tmp_path, more | {"<|call|>": CONTROL}), tmp_path / "two")
    assert ends(tmp_path / "two") == [first(1), first(2)]


def test_no_end_at_all(tmp_path: Path):
    """Not that of the family, 2, which here is a letter."""
    convert(write(tmp_path, {}), tmp_path / "out")
    assert ends(tmp_path / "out") == []
    config = Engine(tmp_path / "out").config
    assert (config.bos_token, config.eos_tokens) == (None, [])


def test_chat_tokens_stored_as_text(tmp_path: Path):
    more = {
        "<|im_start|>": NORMAL,
        "<start_of_turn>": NORMAL,
        "[INST]": UNUSED,
        "<think>": NORMAL,
        "<other>": NORMAL,
        "<|unused|>": UNUSED,
    }
    metadata = {
        "tokenizer.ggml.merges": [*tiny_gguf.MERGES, "1 <"],
        "tokenizer.chat_template": "<start_of_turn>{{ x }}[INST]<think>{{ '<' + 'other>' }}1<",
    }
    convert(write(tmp_path, {"1<": NORMAL, **more}, metadata), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    ids = [first(1), first(2), 18, first(3), first(4)]
    assert tokenizer.encode("<|im_start|><start_of_turn>1[INST]<think>") == ids
    assert tokenizer.decode(ids) == "<start_of_turn>1[INST]<think>"
    for text in ("<other>", "<|unused|>"):
        assert len(tokenizer.encode(text)) == len(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_padding_token_that_is_text_is_shown(tmp_path: Path):
    convert(write(tmp_path, {}, {"tokenizer.ggml.padding_token_id": 18}), tmp_path / "out")
    assert "pad_token" not in read_json(tmp_path / "out" / "tokenizer_config.json")
    assert Tokenizer.load(tmp_path / "out").decode([18, 19]) == "12"


def test_empty_tokens_match_nothing(tmp_path: Path):
    convert(write(tmp_path, {"": CONTROL}), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.encode("12") == [tiny_gguf.BPE_TOKENS.index("12")]


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"tokenizer.ggml.eos_token_ids": [999]}, ["eos_token_ids", "999"]),
        ({"tokenizer.ggml.eot_token_id": 999}, ["eot_token_id", "999"]),
        ({"tokenizer.ggml.eot_token_id": ("uint64", 2**64 - 1)}, ["eot_token_id", "1844"]),
        ({"tokenizer.ggml.suppress_tokens": [1]}, ["suppress_tokens"]),
        (SENTENCEPIECE | {"tokenizer.ggml.scores": [math.nan] * 8}, ["scores", "NaN"]),
        (SENTENCEPIECE | {"tokenizer.ggml.precompiled_charsmap": [300]}, ["charsmap", "300"]),
        ({"tokenizer.ggml.normalizer.lowercase": True}, ["normalizer.lowercase"]),
    ],
)
def test_refused(tmp_path: Path, metadata: dict, parts: list[str]):
    source = write(tmp_path, {}, metadata)
    refused(source, tmp_path / "parent", CheckpointError, str(source), *parts)


@pytest.mark.parametrize("types", [[2, 3, 3, 1, 1, 1, 1, 1], [1] * 8, [2, 3, 3, 1, 1, 1, 1, 5]])
def test_sentencepiece_without_ids(tmp_path: Path, types: list[int]):
    """<unk>, <s> and </s> are 0, 1 and 2, and <s> begins a text."""
    metadata = SENTENCEPIECE | {"tokenizer.ggml.token_type": types}
    source = write(tmp_path, {}, metadata)
    convert(source, tmp_path / "out")
    config = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert [config[f"{role}_token"] for role in ("bos", "eos", "unk")] == ["<s>", "</s>", "<unk>"]
    assert ends(tmp_path / "out") == [2, 7]
    assert read_json(tmp_path / "out" / "config.json")["bos_token_id"] == 1
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.encode("ab<|im_end|>") == [1, 6, 5, 7]
    assert tokenizer.decode([1, 6, 5, 7, 2]) == "ab"


def test_spaces_of_added_tokens(tmp_path: Path):
    """GGUF spells them as they are, SentencePiece as ▁."""
    tokens = [*SENTENCEPIECE["tokenizer.ggml.tokens"][:-1], "  "]
    types = [*SENTENCEPIECE["tokenizer.ggml.token_type"][:-1], 4]
    added = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    added["tokenizer.ggml.add_space_prefix"] = False
    weights = tiny.make_weights(CONFIG | {"vocab_size": 8}, seed=1)
    metadata = SENTENCEPIECE | added
    source = tiny_gguf.write(tmp_path / "model.gguf", CONFIG, weights, metadata)
    convert(source, tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.encode("a  b a", add_special_tokens=False) == [4, 7, 5, 6]
    assert tokenizer.decode([4, 7, 5, 6]) == "a  b a"


def test_gemma_may_write_html(tmp_path: Path):
    """Its </s> ends struck-out text."""
    tokens = ["<eos>", "</s>", *tiny_gguf.BPE_TOKENS[2:]]
    config = {**tiny.BASE, **tiny.VARIANTS["gemma3"].config, "vocab_size": len(tokens)}
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 5}
    weights = tiny.make_weights(config, seed=1)
    convert(tiny_gguf.write(tmp_path / "model.gguf", config, weights, metadata), tmp_path / "out")
    assert ends(tmp_path / "out") == [5, 0]


def test_sentencepiece_ids_of_the_file_win(tmp_path: Path):
    metadata = SENTENCEPIECE | {
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 3],
        "tokenizer.ggml.bos_token_id": 7,
        "tokenizer.ggml.eos_token_id": 7,
    }
    convert(write(tmp_path, {}, metadata), tmp_path / "out")
    assert ends(tmp_path / "out") == [7, 2]
    assert Tokenizer.load(tmp_path / "out").encode("ab") == [7, 6, 5]
