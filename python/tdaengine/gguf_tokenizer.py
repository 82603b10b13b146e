"""The tokenizer inside a GGUF file -> tokenizer.json or tokenizer.model, and their companions."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from ._native import CheckpointError, GgufModel
from .gguf_keys import Keys
from .source import json_bytes

# tokenizer.ggml.token_type; SentencePiece's own numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = TYPES = range(1, 7)

# Names in tokenizer_config.json and in GGUF.
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# What SentencePiece files without these ids mean, as far as the vocabulary has them.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}

# How tokens look that are not text, and those that are not if a chat template spells them out.
MARKER = re.compile(r"<\|[^\s<>]+\|>|<｜[^\s<>]+｜>")
MARKER_OF_TEMPLATE = re.compile(r"<\|?[^\s<>]+\|?>|\[/?[A-Z_]+\]")

# How Llama 3 and Qwen 2 cut text before merging; they differ in how long a run of digits may be.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_files(model: GgufModel) -> dict[str, bytes]:
    """The tokenizer's files and generation_config.json, by name. Raises CheckpointError."""
    keys = Keys(model)
    keys.expect("tokenizer.ggml.suppress_tokens", [])
    for key in ("lowercase", "strip_accents"):
        keys.expect(f"tokenizer.ggml.normalizer.{key}", False)
    vocabulary = _Vocabulary(keys, json.loads(model.generation))
    kind = keys.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        files = {"tokenizer.json": _byte_level_bpe(keys, vocabulary)}
        tokenizer_class = "PreTrainedTokenizerFast"
    elif kind == "llama":
        files = {"tokenizer.model": _sentencepiece(keys, vocabulary)}
        tokenizer_class = "LlamaTokenizer"
    else:
        raise keys.error("tokenizer.ggml.model", kind, "gpt2 or llama")
    config = {
        "tokenizer_class": tokenizer_class,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "model_max_length": json.loads(model.config)["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "legacy": True,  # a space goes before every stretch of text, as in llama.cpp
    }
    for role, token in vocabulary.roles.items():
        config[f"{role}_token"] = vocabulary.tokens[token]
    if vocabulary.template is not None:
        config["chat_template"] = vocabulary.template
    files["tokenizer_config.json"] = json_bytes(config)
    files["generation_config.json"] = json_bytes(vocabulary.generation)
    return files


class _Vocabulary:
    def __init__(self, keys: Keys, generation: dict[str, Any]):
        """generation: the tokens that begin and end a text, as the native module finds them."""
        get = keys.get
        tokens: list[str] = keys.get_list("tokenizer.ggml.tokens", str)
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self.types: list[int] = keys.get_list("tokenizer.ggml.token_type", int)
        if len(self.types) != len(self.tokens):
            raise keys.error(
                "tokenizer.ggml.token_type",
                f"a list of {len(self.types)}",
                f"as many as tokens, {len(self.tokens)}",
            )
        for kind in set(self.types) - set(TYPES):
            raise keys.error("tokenizer.ggml.token_type", f"a list with {kind}", "1 to 6")
        if len(set(self.tokens)) != len(self.tokens):
            raise keys.error("tokenizer.ggml.tokens", "a list with repetitions", "none")
        self._keys = keys
        self.template: str | None = get("tokenizer.chat_template", str, None)
        self.sentencepiece = get("tokenizer.ggml.model", str) == "llama"
        llama3 = get("tokenizer.ggml.pre", str, "") == "llama-bpe"
        self.add_bos = get("tokenizer.ggml.add_bos_token", bool, self.sentencepiece or llama3)
        self.add_eos = get("tokenizer.ggml.add_eos_token", bool, False)
        self.roles: dict[str, int] = {}
        for role, name in ROLES.items():
            if (token := self._id(name)) is not None:
                self.roles[role] = token
        self.generation = generation
        self._correct_types()

    def _id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token: int | None = self._keys.get(key, int, None)
        if token is None:
            token = SENTENCEPIECE_IDS.get(name) if self.sentencepiece else None
            return token if token is not None and token < len(self.tokens) else None
        if not 0 <= token < len(self.tokens):
            raise self._keys.error(key, token, f"0 to {len(self.tokens) - 1}")
        return token

    def _correct_types(self) -> None:
        """Of tokens that the file has as text though they are none: they would be cut into pieces
        in a chat's prompt, and some of them shown. What merges make is text, however it looks."""
        ends = self.generation.get("eos_token_id", [])
        control = set(ends) if isinstance(ends, list) else {ends}
        if self.add_bos and "bos" in self.roles:
            control.add(self.roles["bos"])
        spelled = set(MARKER_OF_TEMPLATE.findall(self.template or ""))
        merges = self._keys.get_list("tokenizer.ggml.merges", str, [])
        merged = {merge.replace(" ", "", 1) for merge in merges}
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if i in control:
                self.types[i] = CONTROL
            elif kind in (NORMAL, UNUSED) and token not in merged:
                if MARKER.fullmatch(token) and (kind == NORMAL or token in spelled):
                    self.types[i] = CONTROL
                elif token in spelled:
                    self.types[i] = USER_DEFINED  # may be meant to be seen, as <think>
        # The padding token has no use here; where it is text, as in files that state 0 without
        # meaning it, it must not become a special token, which is not shown.
        if "pad" in self.roles and self.types[self.roles["pad"]] == NORMAL:
            del self.roles["pad"]
        if self.sentencepiece and UNKNOWN not in self.types and "unk" in self.roles:
            self.types[self.roles["unk"]] = UNKNOWN  # which SentencePiece needs


def _byte_level_bpe(keys: Keys, vocabulary: _Vocabulary) -> bytes:
    merges = [tuple(m.split(" ")) for m in keys.get_list("tokenizer.ggml.merges", str)]
    pre = keys.get("tokenizer.ggml.pre", str)
    ids = {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind != UNUSED
    }
    try:
        # Llama 3 takes a word that is in the vocabulary whole, whatever its merges.
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the package raises nothing narrower
        raise keys.error(
            "tokenizer.ggml.merges", f"unusable ({error})", "pairs of tokens"
        ) from error

    tokenizer.pre_tokenizer = _pre_tokenizer(keys, pre)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    before = ["bos"] * vocabulary.add_bos
    after = ["eos"] * vocabulary.add_eos
    if before or after:
        used = {role: (vocabulary.tokens[i], i) for role, i in vocabulary.roles.items()}
        for role in before + after:
            if role not in used:
                raise keys.error(f"tokenizer.ggml.{role}_token_id", "nothing", "a token id")
        tokenizer.post_processor = TemplateProcessing(
            single=[used[r][0] for r in before] + ["$A"] + [used[r][0] for r in after],
            special_tokens=[used[r] for r in before + after],
        )
    return tokenizer.to_str(pretty=True).encode()


def _pre_tokenizer(keys: Keys, pre: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut into the words within which merges happen."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's rule
    if pre == "gpt-2":
        return words
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if pre in ("llama-bpe", "qwen2"):
        pattern = SPLIT.replace("DIGITS", "{1,3}" if pre == "llama-bpe" else "")
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, to_bytes])
    raise keys.error("tokenizer.ggml.pre", pre, "gpt-2, smollm, llama-bpe or qwen2")


def _sentencepiece(keys: Keys, vocabulary: _Vocabulary) -> bytes:
    try:
        from sentencepiece import sentencepiece_model_pb2 as pb2
    except ImportError as error:
        raise CheckpointError(
            f"{keys.file}: its SentencePiece vocabulary needs the package protobuf: "
            "pip install 'tdaengine[convert]'"
        ) from error
    scores = keys.get_list("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise keys.error(
            "tokenizer.ggml.scores", f"a list of {len(scores)}", f"{len(vocabulary.tokens)} values"
        )
    if not all(map(math.isfinite, scores)):
        raise keys.error("tokenizer.ggml.scores", "a list with NaN or infinity", "none")
    model = pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        # GGUF spells spaces of added tokens as they are, SentencePiece as in all others.
        piece = token.replace(" ", "▁") if kind == USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = pb2.TrainerSpec.BPE  # type: ignore[attr-defined]
    trainer.vocab_size = len(vocabulary.tokens)
    trainer.byte_fallback = BYTE in vocabulary.types
    for role, role_id in vocabulary.roles.items():
        setattr(trainer, f"{role}_id", role_id)
        setattr(trainer, f"{role}_piece", vocabulary.tokens[role_id])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = keys.get("tokenizer.ggml.add_space_prefix", bool, True)
    normalizer.remove_extra_whitespaces = keys.get(
        "tokenizer.ggml.remove_extra_whitespaces", bool, False
    )
    normalizer.precompiled_charsmap = _charsmap(keys)
    serialized: bytes = model.SerializeToString()
    return serialized


def _charsmap(keys: Keys) -> bytes:
    """The rules of SentencePiece's normalisation, which may be stored as signed bytes."""
    key = "tokenizer.ggml.precompiled_charsmap"
    values = keys.get_list(key, int, [])
    for value in values:
        if not -128 <= value <= 255:
            raise keys.error(key, f"a list with {value}", "bytes")
    return bytes(value & 0xFF for value in values)
