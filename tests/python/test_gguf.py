"""GGUF files, loaded as they are or converted: tensors, configuration and tokenizer come back."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiny
import tiny_gguf
from converting import read_json, refused
from gguf import GGMLQuantizationType, quants
from safetensors.numpy import load_file
from sentencepiece import sentencepiece_model_pb2 as pb2
from tiny_gguf import divisors

from tdaengine import TDA, CheckpointError, Engine
from tdaengine.convert import convert
from tdaengine.info import info
from tdaengine.tokenizer import Tokenizer


def config_of(variant: str) -> dict:
    return {**tiny.BASE, **tiny.VARIANTS[variant].config}


def write_gguf(folder: Path, variant: str = "llama", drop: str = "", **more) -> Path:
    config = config_of(variant)
    weights = tiny.make_weights(config, seed=1)
    kept = {name: values for name, values in weights.items() if name != drop}
    return tiny_gguf.write(folder / "model.gguf", config, kept, **more)


GGUF_VARIANTS = [
    "llama",
    "llama_tied",
    "llama_bias",
    "llama_odd",
    "mistral_sliding",
    "qwen2",
    "qwen3",
]


@pytest.mark.parametrize("variant", GGUF_VARIANTS)
def test_gguf_gives_back_the_checkpoint(tmp_path: Path, variant: str):
    config = config_of(variant)
    window = config.get("sliding_window")
    arch = config["model_type"].replace("mistral", "llama")
    more = {f"{arch}.attention.sliding_window": window} if window else {}
    convert(write_gguf(tmp_path, variant, metadata=more), tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    weights = tiny.make_weights(config, seed=1)
    assert made.keys() == weights.keys()
    for name in weights:
        assert np.array_equal(made[name], weights[name]), name
    found = read_json(tmp_path / "out" / "config.json")
    for key in config.keys() - {"bos_token_id", "eos_token_id"}:
        assert found[key] == config[key], key
    assert found["eos_token_id"] == 0 and found["bos_token_id"] is None
    assert Engine(tmp_path / "out").logits(tiny.tokens(variant)).shape == (80, config["vocab_size"])


GEMMA = {
    "gemma3.attention.sliding_window": 12,
    "gemma3.attention.sliding_window_pattern": 3,
    "gemma3.rope.freq_base_swa": 100.0,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
}


GEMMA2 = {
    "gemma2.attention.sliding_window": 12,
    "gemma2.attn_logit_softcapping": 2.0,
    "gemma2.final_logit_softcapping": 5.0,
}


@pytest.mark.parametrize(("variant", "keys"), [("gemma2", GEMMA2), ("gemma3", GEMMA)])
def test_gguf_of_gemma(tmp_path: Path, variant: str, keys: dict):
    """Norms have 1 added, which rounds; the scale of scores follows from the size of a head."""
    config = config_of(variant) | {"query_pre_attn_scalar": 16}
    weights = tiny.make_weights(config, seed=1)
    source = tiny_gguf.write(tmp_path / "model.gguf", config, weights, metadata=keys)
    convert(source, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == weights.keys()
    for name in weights:
        assert np.allclose(made[name], weights[name], rtol=0, atol=2e-7 * (weights[name].ndim == 1))
    original = tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    tiny.write_safetensors(original / "model.safetensors", weights, "F32")
    tokens = tiny.tokens(variant)
    logits = Engine(original).logits(tokens)
    assert np.abs(Engine(tmp_path / "out").logits(tokens) - logits).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"gemma3.attention.sliding_window": None}, [False, False, False, False]),
        ({"gemma3.attention.sliding_window_pattern": None}, [True, True, True, True]),
        ({"gemma3.attention.sliding_window_pattern": 2}, [True, False, True, False]),
        ({"gemma3.attention.sliding_window_pattern": 1}, [False, False, False, False]),
        ({"gemma3.attention.sliding_window_pattern": 0}, [True, True, True, True]),
    ],
)
def test_gguf_windows_of_gemma(tmp_path: Path, change: dict, expected: list[bool]):
    convert(write_gguf(tmp_path, "gemma3", metadata=GEMMA | change), tmp_path / "out")
    types = read_json(tmp_path / "out" / "config.json")["layer_types"]
    assert types == [f"{'sliding' if slides else 'full'}_attention" for slides in expected]
    windows = [12 * slides for slides in expected]
    assert Engine(tmp_path / "out").config.sliding_window == windows


def test_gguf_of_gemma2_without_keys(tmp_path: Path):
    """As in llama.cpp, which knows the published models; 27B has a scale of its own."""
    convert(write_gguf(tmp_path, "gemma2"), tmp_path / "out")
    config = Engine(tmp_path / "out").config
    assert (config.score_cap, config.logit_cap) == (50, 30)
    assert config.sliding_window == [4096, 0, 4096] and config.attention_scale == 0.25
    of_27b = config_of("gemma2") | {"num_hidden_layers": 46}
    weights = tiny.make_weights(of_27b, seed=1)
    source = tiny_gguf.write(tmp_path / "27b.gguf", of_27b, weights)
    assert Engine(source).config.attention_scale == pytest.approx(12**-0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"gemma3.final_logit_softcapping": 30.0},
        {"gemma3.attention.sliding_window_pattern": [True, False, True, False]},
        {"gemma3.attention.scale": 0.3},
        {"gemma3.attention.new_thing": 1},
    ],
)
def test_gguf_of_gemma_is_refused(tmp_path: Path, change: dict):
    source = write_gguf(tmp_path, "gemma3", metadata=GEMMA | change)
    refused(source, tmp_path / "parent", CheckpointError, str(source), next(iter(change)))


def test_gguf_loads_as_its_folder_does(tmp_path: Path):
    """Every format and every text: the file itself beside the folder that convert makes of it."""
    metadata = {
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<tool>{% endfor %}",
    }
    source = write_gguf(tmp_path, metadata=metadata)
    convert(source, tmp_path / "out")
    tokens = tiny.tokens("llama")
    for weights in ("auto", "f32", "bf16", "int8", "int4", "graded"):
        file = Engine(source, weights=weights)
        folder = Engine(tmp_path / "out", weights=weights)
        assert file.weights == folder.weights == weights.replace("auto", "f32")
        assert np.array_equal(file.logits(tokens), folder.logits(tokens)), weights
        assert file.config.eos_tokens == folder.config.eos_tokens == [0]
    messages = [{"role": "user", "content": "12ab"}]
    assert file.chat_prompt(messages) == folder.chat_prompt(messages)
    texts = [engine.generate("1+1", max_new_tokens=4).text for engine in (file, folder)]
    assert texts[0] == texts[1] != ""
    assert file.tokenizer.encode("1234ab 1") == folder.tokenizer.encode("1234ab 1")


def test_gguf_packed_straight_from_the_file(tmp_path: Path):
    """Without bf16 in between: int8 of the file's own values."""
    config = config_of("llama") | {"hidden_size": 64, "intermediate_size": 96}
    weights = tiny.make_weights(config, seed=1)
    kind = GGMLQuantizationType.Q8_0
    source = tiny_gguf.write(tmp_path / "model.gguf", config, weights, quantized=kind)
    convert(source, tmp_path / "packed", weights="int8")
    packed, file = Engine(tmp_path / "packed"), Engine(source, weights="int8")
    assert packed.fingerprint == file.fingerprint and packed.weights == "int8"
    assert np.array_equal(packed.logits([1, 2, 3]), file.logits([1, 2, 3]))
    assert packed.tokenizer.encode("1234") == file.tokenizer.encode("1234")
    convert(source, tmp_path / "f32", dtype="f32")
    exact = Engine(tmp_path / "f32", weights="int8")
    assert np.array_equal(exact.logits([1, 2, 3]), file.logits([1, 2, 3]))
    convert(source, tmp_path / "bf16")
    assert not np.array_equal(
        Engine(tmp_path / "bf16", weights="int8").logits([1, 2, 3]), file.logits([1, 2, 3])
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_gguf_keeps_its_four_bits_and_what_has_more(tmp_path: Path, kind: str):
    """Beside graded weights, which round all matrices to 8 bits: int4 rounds fewer."""
    four, eight = GGMLQuantizationType[kind], GGMLQuantizationType.Q8_0
    config = config_of("llama") | {"hidden_size": 64, "intermediate_size": 96}
    weights = tiny.make_weights(config, seed=1)
    down = {f"model.layers.{i}.mlp.down_proj.weight": eight for i in range(2)}
    tokens = tiny.tokens("llama")
    sizes = []
    for name, kinds in (("four", {}), ("mixed", down)):
        source = tiny_gguf.write(
            tmp_path / f"{name}.gguf", config, weights, quantized=four, kinds=kinds
        )
        exact = Engine(source, weights="f32").logits(tokens)
        found, graded = Engine(source), Engine(source, weights="graded")
        errors = [np.abs(e.logits(tokens) - exact).mean() for e in (found, graded)]
        assert found.weights == "int4" and errors[0] < 1.05 * errors[1]
        formats = {each["matrices"]: each["format"] for each in info(found)["matrices"]}
        assert formats["embedding"] == "int4, scale and minimum"
        assert formats["head"] == "graded"
        sizes.append(found.weight_bytes)
        words = found.generate(tokens[:20], max_new_tokens=3, ignore_eos=True, tda=TDA()).stats.tda
        assert words.startswith(
            "by input: 20% of inputs" if kinds else "by input: 44.7% of the head"
        )
        convert(source, tmp_path / name, weights="int4")
        packed = Engine(tmp_path / name)
        assert np.array_equal(packed.logits(tokens), found.logits(tokens))
    rows, inputs = (
        64,
        96,
    )  # 64 rows of 8 bits instead of 5: rests, their steps and lengths, less 1/2
    assert sizes[1] - sizes[0] == 2 * (inputs * 64 + 4 * rows + 4 * inputs - rows * inputs // 16)


def test_gguf_with_a_tokenizer_of_another_kind_still_computes(tmp_path: Path):
    source = write_gguf(tmp_path, metadata={"tokenizer.ggml.pre": "falcon"})
    engine = Engine(source)
    assert engine.logits([1, 2]).shape == (2, 96)
    with pytest.raises(CheckpointError, match='pre is "falcon", expected gpt-2'):
        engine.tokenizer  # noqa: B018
    with pytest.raises(CheckpointError, match="no chat template"):
        Engine(write_gguf(tmp_path)).chat_template  # noqa: B018


def test_gguf_quantized_is_bf16_unless_told(tmp_path: Path):
    kind = GGMLQuantizationType.Q4_0
    config = config_of("llama") | {"hidden_size": 64, "intermediate_size": 96}
    weights = tiny.make_weights(config, seed=1)
    source = tiny_gguf.write(tmp_path / "model.gguf", config, weights, quantized=kind)
    convert(source, tmp_path / "f32", dtype="f32")
    made = load_file(tmp_path / "f32" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    expected = quants.dequantize(quants.quantize(weights[name], kind), kind)
    assert np.array_equal(made[name], expected) and not np.array_equal(made[name], weights[name])
    convert(source, tmp_path / "auto")
    assert read_json(tmp_path / "auto" / "config.json")["torch_dtype"] == "bfloat16"
    assert Engine(tmp_path / "auto").weights == "bf16"


def test_gguf_rope_scaling(tmp_path: Path):
    def scaling(name: str, **more) -> dict:
        (tmp_path / name).mkdir()
        convert(write_gguf(tmp_path / name, **more), tmp_path / name / "out")
        Engine(tmp_path / name / "out")
        return read_json(tmp_path / name / "out" / "config.json")["rope_scaling"]

    prefix = "llama.rope.scaling"
    linear = {f"{prefix}.type": "linear", f"{prefix}.factor": 4.0}
    assert scaling("linear", metadata=linear) == {"rope_type": "linear", "factor": 4.0}
    yarn = linear | {f"{prefix}.type": "yarn", f"{prefix}.original_context_length": 32}
    assert scaling("yarn", metadata=yarn) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    assert scaling("llama3", tensors={"rope_freqs.weight": divisors(8)}) == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, ["scaling.type", "longrope"]),
        ({"tensors": {"rope_freqs.weight": divisors(8, 4096)}}, ["rope_freqs.weight"]),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": divisors(8)}}, ["ffn_gate_inp"]),
        ({"metadata": {"llama.rope.dimension_count": 6}}, ["rope.dimension_count", "6", "12"]),
        ({"metadata": {"llama.block_count": None}}, ["llama.block_count", "missing"]),
        ({"metadata": {"llama.block_count": "two"}}, ["llama.block_count", "two", "an integer"]),
        ({"metadata": {"llama.attention.head_count": 5}}, ["num_key_value_heads is 2", "(5)"]),
        ({"metadata": {"llama.attention.head_count_kv": 1}}, ["blk.0.attn_k.weight", "[12,48]"]),
        ({"metadata": {"tokenizer.ggml.pre": "falcon"}}, ["tokenizer.ggml.pre", "falcon"]),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, ["tokenizer.ggml.model", "bert"]),
        ({"metadata": {"tokenizer.ggml.merges": ["1 9"]}}, ["tokenizer.ggml.merges"]),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 999}}, ["eos_token_id", "999"]),
        (
            {"metadata": {"tokenizer.ggml.merges": [1, 2]}},
            ["tokenizer.ggml.merges[0]", "text in UTF-8"],
        ),
        ({"metadata": {"tokenizer.ggml.token_type": [1]}}, ["token_type"]),
        (
            {"metadata": {"tokenizer.ggml.token_type": [7, *tiny_gguf.BPE_TYPES[1:]]}},
            ["token_type", "7"],
        ),
        ({"metadata": {"tokenizer.ggml.add_bos_token": True}}, ["bos_token_id", "missing"]),
        (
            {"tensors": {"blk.0.ffn_up.bias": divisors(8)}},
            ["blk.0.ffn_up.bias", "unknown"],
        ),
        (
            {"tensors": {"blk.0.attn_q.bias": divisors(8)}},
            ["blk.0.attn_q.bias", "[6]", "[48]"],
        ),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(48, "f")}}, ["blk.0.attn_k.bias", "missing"]),
        (
            {"tensors": {"blk.1.attn_q_norm.weight": divisors(8)}},
            ["attn_q_norm", "unknown"],
        ),
        ({"drop": "model.embed_tokens.weight"}, ["token_embd.weight", "missing"]),
        ({"drop": "model.layers.1.mlp.up_proj.weight"}, ["blk.1.ffn_up.weight", "missing"]),
        ({"variant": "qwen3", "drop": "model.layers.0.self_attn.k_norm.weight"}, ["attn_k_norm"]),
    ],
)
def test_gguf_unsupported(tmp_path: Path, more: dict, parts: list[str]):
    source = write_gguf(tmp_path, **more)
    refused(source, tmp_path / "parent", CheckpointError, str(source), *parts)


def test_gguf_of_another_architecture(tmp_path: Path):
    config = config_of("llama") | {"model_type": "gemma"}
    source = tiny_gguf.write(tmp_path / "model.gguf", config, {})
    parts = ['general.architecture is "gemma"', "llama, qwen2, qwen3"]
    refused(source, tmp_path / "parent", CheckpointError, str(source), *parts)


def test_gguf_damaged(tmp_path: Path):
    source = write_gguf(tmp_path)
    data = source.read_bytes()
    for cut in (0, 3, 30, 2000, len(data) // 2, len(data) - 64):
        source.write_bytes(data[:cut])
        refused(source, tmp_path / "parent", CheckpointError, str(source))


def test_gguf_with_text_that_is_no_utf8(tmp_path: Path):
    source = write_gguf(tmp_path)
    source.write_bytes(source.read_bytes().replace(b"<tool>", b"<\xffool>"))
    refused(source, tmp_path / "parent", CheckpointError, "tokenizer.ggml.tokens", "UTF-8")


# ---- tokenizers from GGUF


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1234", "ab", "Ġ", "1"]),
        ("smollm", ["1", "2", "3", "4", "ab", "Ġ", "1"]),
        ("llama-bpe", ["123", "4", "ab", "Ġ", "1"]),
        ("qwen2", ["1", "2", "3", "4", "ab", "Ġ", "1"]),
    ],
)
def test_gguf_byte_level_bpe(tmp_path: Path, pre: str, pieces: list[str]):
    metadata = {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    convert(write_gguf(tmp_path, metadata=metadata), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    ids = [tiny_gguf.BPE_TOKENS.index(piece) for piece in pieces]
    assert tokenizer.encode("1234ab 1", add_special_tokens=False) == ids
    assert tokenizer.encode("<|end|>1234ab 1<tool>") == [0, 0, *ids, 1]
    assert tokenizer.decode([0, *ids, 1]) == "1234ab 1<tool>"
    config = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert config["chat_template"] == "{{ messages }}"
    assert config["bos_token"] == config["eos_token"] == "<|end|>"


def test_gguf_several_ends(tmp_path: Path):
    metadata = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 0}
    convert(write_gguf(tmp_path, metadata=metadata), tmp_path / "out")
    assert read_json(tmp_path / "out" / "generation_config.json") == {"eos_token_id": [0, 5]}


def test_gguf_sentencepiece(tmp_path: Path):
    text = "the cat sat on the mat\nthat cat ate the rat\na fat rat sat at the mat\n" * 20
    (tmp_path / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "trained"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    proto = pb2.ModelProto.FromString((tmp_path / "trained.model").read_bytes())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    convert(write_gguf(tmp_path, metadata=metadata), tmp_path / "out")
    trained = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "trained.model"))
    made = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "out" / "tokenizer.model")
    )
    for sample in ("the cat", "  two  spaces ", "ünïcödé 日本", "that<tool>rat", "", "\n"):
        assert made.encode(sample) == trained.encode(sample), sample
    assert (made.bos_id(), made.eos_id(), made.unk_id()) == (1, 2, 0)
    ids = Tokenizer.load(tmp_path / "out").encode("the cat")
    assert ids == [1, *trained.encode("the cat")]


# ---- the demo model


def byte_level_bpe(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """SmolLM2's rule once more: digits alone, GPT-2's words, bytes, then merges by rank."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = dict(zip(printable, map(chr, printable), strict=True))
    letters |= {b: chr(256 + i) for i, b in enumerate(others)}
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    pieces = []
    for part in re.split(r"(\d)", text):
        for word in [part] if part.isdigit() else re.findall(words, part):
            symbols = [letters[b] for b in word.encode()]
            while len(symbols) > 1:
                pairs = list(itertools.pairwise(symbols))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                if best not in ranks:
                    break
                at = pairs.index(best)
                symbols[at : at + 2] = ["".join(best)]
            pieces += symbols
    return pieces


def test_demo_tokenizer(smollm2: Path):
    model = read_json(smollm2 / "tokenizer.json")["model"]
    ranks = {tuple(merge): i for i, merge in enumerate(model["merges"])}
    tokenizer = Tokenizer.load(smollm2)
    golden = Path(__file__).parents[1] / "golden"
    compared = 0
    for text in read_json(golden / "inputs.json")["strings"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        plain = all(c.isspace() or c.isalpha() or c.isascii() for c in text)
        if plain and not re.search(r"<[|/\w]+>", text):
            assert ids == [model["vocab"][p] for p in byte_level_bpe(text, ranks)], text
            compared += 1
    assert compared > 120


def test_demo_answers(smollm2: Path):
    question = {"role": "user", "content": "What is the capital of France?"}
    out = Engine(smollm2).chat([question], max_new_tokens=16)
    assert "Paris" in out.text and out.finish_reason == "stop"
