"""The tokenizer inside a GGUF file -> tokenizer.json or tokenizer.model, and their companions."""

from __future__ import annotations

import math
import re
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from ._native import CheckpointError
from .gguf_metadata import Metadata
from .source import json_bytes

# tokenizer.ggml.token_type; SentencePiece's own numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = TYPES = range(1, 7)

# Names in tokenizer_config.json and in GGUF.
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# What SentencePiece files without these ids mean, as far as the vocabulary has them.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}

# Tokens that end a text, a turn or a message, whether the file says so or not: where a file is
# wrong about it, a model goes on and speaks for the user. The names are those llama.cpp knows.
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
# "<|end|>" ends only a part of a message where there are tokens of one of these pairs.
PARTS_END = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})
# How tokens look that are not text, and those that are not if a chat template spells them out.
MARKER = re.compile(r"<\|[^\s<>]+\|>|<｜[^\s<>]+｜>")
MARKER_OF_TEMPLATE = re.compile(r"<\|?[^\s<>]+\|?>|\[/?[A-Z_]+\]")

# How Llama 3 and Qwen 2 cut text before merging; they differ in how long a run of digits may be.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_files(metadata: Metadata) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The tokenizer's files by name, and the token ids for generation_config.json. Raises
    CheckpointError."""
    metadata.expect("tokenizer.ggml.suppress_tokens", ([],))
    for key in ("lowercase", "strip_accents"):
        metadata.expect(f"tokenizer.ggml.normalizer.{key}", (False,))
    vocabulary = _Vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        files = {"tokenizer.json": _byte_level_bpe(metadata, vocabulary)}
        tokenizer_class = "PreTrainedTokenizerFast"
    elif kind == "llama":
        files = {"tokenizer.model": _sentencepiece(metadata, vocabulary)}
        tokenizer_class = "LlamaTokenizer"
    else:
        raise metadata.error("tokenizer.ggml.model", kind, "gpt2 or llama")
    config = {
        "tokenizer_class": tokenizer_class,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "model_max_length": metadata.get("@.context_length", int),
        "clean_up_tokenization_spaces": False,
        "legacy": True,  # a space goes before every stretch of text, as in llama.cpp
    }
    for role, token in vocabulary.roles.items():
        config[f"{role}_token"] = vocabulary.tokens[token]
    if vocabulary.template is not None:
        config["chat_template"] = vocabulary.template
    files["tokenizer_config.json"] = json_bytes(config)
    return files, vocabulary.generation_ids()


class _Vocabulary:
    def __init__(self, metadata: Metadata):
        get = metadata.get
        tokens: list[str] = metadata.get_list("tokenizer.ggml.tokens", str)
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self.types: list[int] = metadata.get_list("tokenizer.ggml.token_type", int)
        if len(self.types) != len(self.tokens):
            raise metadata.error(
                "tokenizer.ggml.token_type",
                f"a list of {len(self.types)}",
                f"as many as tokens, {len(self.tokens)}",
            )
        for kind in set(self.types) - set(TYPES):
            raise metadata.error("tokenizer.ggml.token_type", f"a list with {kind}", "1 to 6")
        if len(set(self.tokens)) != len(self.tokens):
            raise metadata.error("tokenizer.ggml.tokens", "a list with repetitions", "none")
        self._metadata = metadata
        self.template: str | None = get("tokenizer.chat_template", str, None)
        self.sentencepiece = get("tokenizer.ggml.model", str) == "llama"
        llama3 = get("tokenizer.ggml.pre", str, "") == "llama-bpe"
        self.add_bos = get("tokenizer.ggml.add_bos_token", bool, self.sentencepiece or llama3)
        self.add_eos = get("tokenizer.ggml.add_eos_token", bool, False)
        self.roles: dict[str, int] = {}
        for role, name in ROLES.items():
            if (token := self._id(name)) is not None:
                self.roles[role] = token
        self.ends = self._ends()
        self._correct_types()

    def _id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token: int | None = self._metadata.get(key, int, None)
        if token is None:
            token = SENTENCEPIECE_IDS.get(name) if self.sentencepiece else None
            return token if token is not None and token < len(self.tokens) else None
        return self._checked(key, token)

    def _checked(self, key: str, token: int) -> int:
        if not 0 <= token < len(self.tokens):
            raise self._metadata.error(key, token, f"0 to {len(self.tokens) - 1}")
        return token

    def _ends(self) -> list[int]:
        """Those that the file names first, then those known by name."""
        several = "tokenizer.ggml.eos_token_ids"
        stated = [self._id(name) for name in ("eos", "eot", "eom")]
        stated += [self._checked(several, t) for t in self._metadata.get_list(several, int, [])]
        ids = {token: i for i, token in enumerate(self.tokens)}
        named = [ids[name] for name in ENDS if name in ids]
        if self._metadata.architecture == "gemma3" and "</s>" in ids:
            named.remove(ids["</s>"])  # there a tag of HTML
        if any(pair <= ids.keys() for pair in PARTS_END) and "<|end|>" in ids:
            named.remove(ids["<|end|>"])
        return list(dict.fromkeys(token for token in [*stated, *named] if token is not None))

    def _correct_types(self) -> None:
        """Of tokens that the file has as text though they are none: they would be cut into pieces
        in a chat's prompt, and some of them shown. What merges make is text, however it looks."""
        control = set(self.ends)
        if self.add_bos and "bos" in self.roles:
            control.add(self.roles["bos"])
        spelled = set(MARKER_OF_TEMPLATE.findall(self.template or ""))
        merges = self._metadata.get_list("tokenizer.ggml.merges", str, [])
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

    def generation_ids(self) -> dict[str, Any]:
        """bos_token_id, and all that end a text: end of text, of a turn, of a message."""
        result: dict[str, Any] = {"bos_token_id": self.roles["bos"]} if "bos" in self.roles else {}
        if self.ends:
            result["eos_token_id"] = self.ends[0] if len(self.ends) == 1 else self.ends
        return result


def _byte_level_bpe(metadata: Metadata, vocabulary: _Vocabulary) -> bytes:
    merges = [tuple(m.split(" ")) for m in metadata.get_list("tokenizer.ggml.merges", str)]
    pre = metadata.get("tokenizer.ggml.pre", str)
    ids = {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind != UNUSED
    }
    try:
        # Llama 3 takes a word that is in the vocabulary whole, whatever its merges.
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the package raises nothing narrower
        raise metadata.error(
            "tokenizer.ggml.merges", f"unusable ({error})", "pairs of tokens"
        ) from error

    tokenizer.pre_tokenizer = _pre_tokenizer(metadata, pre)
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
                raise metadata.error(f"tokenizer.ggml.{role}_token_id", "nothing", "a token id")
        tokenizer.post_processor = TemplateProcessing(
            single=[used[r][0] for r in before] + ["$A"] + [used[r][0] for r in after],
            special_tokens=[used[r] for r in before + after],
        )
    return tokenizer.to_str(pretty=True).encode()


def _pre_tokenizer(metadata: Metadata, pre: str) -> pre_tokenizers.PreTokenizer:
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
    raise metadata.error("tokenizer.ggml.pre", pre, "gpt-2, smollm, llama-bpe or qwen2")


def _sentencepiece(metadata: Metadata, vocabulary: _Vocabulary) -> bytes:
    try:
        from sentencepiece import sentencepiece_model_pb2 as pb2
    except ImportError as error:
        raise CheckpointError(
            f"{metadata.file}: its SentencePiece vocabulary needs the package protobuf: "
            "pip install 'tdaengine[convert]'"
        ) from error
    scores = metadata.get_list("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise metadata.error(
            "tokenizer.ggml.scores", f"a list of {len(scores)}", f"{len(vocabulary.tokens)} values"
        )
    if not all(map(math.isfinite, scores)):
        raise metadata.error("tokenizer.ggml.scores", "a list with NaN or infinity", "none")
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
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", bool, True)
    normalizer.remove_extra_whitespaces = metadata.get(
        "tokenizer.ggml.remove_extra_whitespaces", bool, False
    )
    normalizer.precompiled_charsmap = _charsmap(metadata)
    serialized: bytes = model.SerializeToString()
    return serialized


def _charsmap(metadata: Metadata) -> bytes:
    """The rules of SentencePiece's normalisation, which may be stored as signed bytes."""
    key = "tokenizer.ggml.precompiled_charsmap"
    values = metadata.get_list(key, int, [])
    for value in values:
        if not -128 <= value <= 255:
            raise metadata.error(key, f"a list with {value}", "bytes")
    return bytes(value & 0xFF for value in values)
