"""What a checkpoint's files say about its tokenizer beside the vocabulary itself.

Where files disagree, and where they are silent, the answer is that of `AutoTokenizer` of
transformers 5. `cpp/text/settings.cpp` does the same for the C++ library.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

from ._native import CheckpointError
from .contents import Contents
from .files import MAX_TOKENIZER

# Special tokens of the tokenizer classes that build their own stages. Files may overrule each.
CLASS_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Settings:
    """What the companions of tokenizer.json or tokenizer.model say; made by Settings.read."""

    values: dict[str, Any]  # by the keys of tokenizer_config.json
    tokenizer_class: str  # one of CLASS_TOKENS, "" for the one that takes tokenizer.json as it is
    roles: dict[str, AddedToken | None]  # "bos_token" and so on; None: there shall be none
    extra: list[AddedToken]  # further special tokens, without a role
    declared: dict[int, AddedToken] = field(default_factory=dict)
    only_declared: bool = False  # no tokens but these are added to those of tokenizer.json

    @staticmethod
    def read(contents: Contents) -> Settings:
        """Raises CheckpointError."""
        config, config_name = contents.json_object(CONFIG), contents.label(CONFIG)
        only_declared = "added_tokens_decoder" in config
        # Without that list the folder is of an older version, which kept special tokens in a file
        # of their own.
        token_map = "special_tokens_map.json"
        overrules = {} if only_declared else contents.json_object(token_map)
        name = _tokenizer_class(contents, config)
        values = config | overrules
        roles = _roles(_defaults(contents, name) | config, config_name)
        roles |= _named(overrules, contents.label(token_map))
        extra = _extra(config, config_name) + _extra(overrules, contents.label(token_map))
        if only_declared:
            declared = _declared(config, config_name)
        else:
            special = {token.content for token in [*filter(None, roles.values()), *extra]}
            declared = _read_added_tokens(contents, special)
        return Settings(values, name, roles, extra, declared, only_declared)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokens that have a role, by the names under which chat templates know them."""
        return {role: token.content for role, token in self.roles.items() if token is not None}

    def tokens_to_add(
        self, of_file: dict[int, AddedToken], present: Collection[str]
    ) -> Iterator[AddedToken]:
        """What is to be added to the tokens that are `present`, in order: an entry that is there
        already replaces the flags of the one before.

        of_file: the added tokens of tokenizer.json.
        """
        declared = self.declared if self.only_declared else self.declared | of_file
        known = {token.content: token for token in declared.values()}
        with_role = set(self.special_tokens.values())
        seen = {*present, *known}
        for _, token in sorted(declared.items()):
            yield with_flags(token, special=True) if token.content in with_role else token
        for token in filter(None, self.roles.values()):
            if token.content not in seen:
                yield with_flags(token, special=True)
        for token in self.extra:
            if token.content not in seen:
                yield token
        if self.tokenizer_class == "Qwen2Tokenizer":
            for token in [*filter(None, self.roles.values()), *self.extra]:
                yield AddedToken(token.content, special=True)


def with_flags(token: AddedToken, **flags: bool) -> AddedToken:
    return AddedToken(**{**token.__getstate__(), **flags})


def _tokenizer_class(contents: Contents, config: dict[str, Any]) -> str:
    """The class that `AutoTokenizer` takes for the model types that the engine knows."""
    model = contents.json_object("config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
    if not isinstance(name, str):
        where = contents.label(CONFIG)
        raise CheckpointError(f"{where}: tokenizer_class: found {name!r}, expected str")
    name = name.removesuffix("Fast")
    model_type = model.get("model_type")
    if model_type == "qwen2" or (model_type == "qwen3" and not name):
        name = "Qwen2Tokenizer"
    file = "tokenizer.json"
    if model_type == "mistral" or name not in CLASS_TOKENS:
        return ""
    # Llama 3's files call themselves so, too.
    if name == "LlamaTokenizer" and contents.has(file):
        return "" if '"ByteLevel"' in contents.text(file, "a tokenizer", MAX_TOKENIZER) else name
    return name


def _defaults(contents: Contents, tokenizer_class: str) -> dict[str, Any]:
    if tokenizer_class:
        return dict(CLASS_TOKENS[tokenizer_class])
    file = "tokenizer.model"
    if contents.has("tokenizer.json") or not contents.has(file):
        return {}
    try:
        model = SentencePieceProcessor(
            model_proto=contents.read(file, "a SentencePiece model", MAX_TOKENIZER)
        )
    except RuntimeError as error:
        raise CheckpointError(f"{contents.label(file)}: {error}") from error
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    return {role: model.id_to_piece(token) for role, token in ids.items() if token >= 0}


def _token(value: Any, name: str, special: bool = True) -> AddedToken:
    """From a text, or an object with text and flags. name: of the value, for messages."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    try:
        flags = {key: each for key, each in value.items() if key not in ("content", "__type")}
        return AddedToken(value["content"], **{"special": special, **flags})
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name}: found {value!r}, expected a token's text, or an object with content and flags"
        ) from error


def _named(values: dict[str, Any], file: str) -> dict[str, AddedToken | None]:
    """The special tokens that have a role: bos_token and so on, image_token and the like."""
    named = {
        key: value
        for key, value in values.items()
        if key.endswith("_token") and not isinstance(value, bool)
    }
    more = values.get("extra_special_tokens")
    if isinstance(more, dict):
        named |= more
    return {
        role: None if value is None else _token(value, f"{file}: {role}")
        for role, value in named.items()
        if role not in ("add_bos_token", "add_eos_token")
    }


def _roles(values: dict[str, Any], file: str) -> dict[str, AddedToken | None]:
    return dict.fromkeys(ROLES) | _named(values, file)


def _extra(values: dict[str, Any], file: str) -> list[AddedToken]:
    for key in ("extra_special_tokens", "additional_special_tokens"):
        tokens = values.get(key)
        if isinstance(tokens, dict):
            return []  # they have roles
        if tokens:
            return [_token(each, f"{file}: {key}") for each in tokens]
    return []


def _declared(config: dict[str, Any], file: str) -> dict[int, AddedToken]:
    entries = config["added_tokens_decoder"]
    if not isinstance(entries, dict) or not all(map(_is_id, entries)):
        raise CheckpointError(
            f"{file}: added_tokens_decoder: found {entries!r}, expected token ids and their tokens"
        )
    name = f"{file}: added_tokens_decoder"
    return {int(id): _token(entry, f"{name}[{id}]", False) for id, entry in entries.items()}


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdigit()


def _read_added_tokens(contents: Contents, special: Collection[str]) -> dict[int, AddedToken]:
    file = "added_tokens.json"
    entries = contents.json_object(file)
    for text, id in entries.items():
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            where = f"{contents.label(file)}: {text!r}"
            raise CheckpointError(f"{where}: found {id!r}, expected a token id")
    return {
        id: AddedToken(text, special=text in special, normalized=text not in special)
        for text, id in entries.items()
    }


def stages_of_class(file: Tokenizer, settings: Settings) -> Tokenizer:
    """The file's model, with the stages that the class of the tokenizer puts around it.

    Llama 2's own tokenizer has no tokenizer.json: conversions of it differ in what they do with
    the text behind a special token, where the class goes by `legacy`.
    """
    result = Tokenizer(file.model)
    result.post_processor = file.post_processor
    if settings.tokenizer_class != "LlamaTokenizer":
        result.normalizer, result.pre_tokenizer = file.normalizer, file.pre_tokenizer
        result.decoder = file.decoder
        return result
    result.model.fuse_unk = result.model.byte_fallback = True
    result.model.unk_token = None
    result.model.ignore_merges = False
    adds_space = settings.values.get("add_prefix_space") is not False
    behind = "always" if settings.values.get("legacy") else "first"
    result.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme=behind if adds_space else "never", split=False
    )
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return result
