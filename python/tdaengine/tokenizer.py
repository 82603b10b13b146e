"""Text to token ids and back, by the checkpoint's own tokenizer.json or tokenizer.model."""

from __future__ import annotations

import itertools
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import sentencepiece
import tokenizers

from ._native import CheckpointError, OptionError
from .files import MAX_TOKENIZER, read, read_json_object, read_text
from .prompt_length import JsonLengths, SentencePieceLengths

FILES = ("tokenizer.json", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in FILES)


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by special_tokens_map.json; special tokens as strings."""
    settings = read_json_object(folder / "special_tokens_map.json", optional=True)
    settings |= read_json_object(folder / "tokenizer_config.json", optional=True)
    for name, value in settings.items():
        if name.endswith("_token") and isinstance(value, dict):
            settings[name] = value.get("content")
    return settings


class Tokenizer(ABC):
    """`Tokenizer.load(folder)` gives the one that fits the folder's files."""

    # To be set by subclasses.
    _ids: range  # everything decode accepts; ids without a token of their own have no text
    _special: frozenset[int]  # without text under skip_special_tokens
    _lengths: JsonLengths | SentencePieceLengths
    _bytes: frozenset[int]  # tokens that stand for one byte each, written <0x0A>

    @staticmethod
    def load(folder: Path | str, vocab_size: int = 0) -> Tokenizer:
        """vocab_size: of the model, which may know more ids than its tokenizer has tokens.

        Raises CheckpointError if no tokenizer file is there or it cannot be read.
        """
        folder = Path(folder)
        for name, kind in zip(FILES, (_JsonTokenizer, _SentencePieceTokenizer), strict=True):
            if os.path.lexists(folder / name):
                return kind(folder / name, read_settings(folder), vocab_size)
        raise CheckpointError(f"{folder}: no tokenizer, looked for {' and '.join(FILES)}")

    @property
    def vocab_size(self) -> int:
        """decode accepts ids from 0 to vocab_size - 1."""
        return self._ids.stop

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens that are spelled out in the text become themselves;
        add_special_tokens adds those the checkpoint wants around every text, as <s>.

        Raises OptionError if text is no str or no valid Unicode (lone surrogates).
        """
        if not isinstance(text, str):
            raise OptionError(f"text: found {type(text).__name__}, expected str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at position {error.start}"
            raise OptionError(f"text: found {found}, expected valid Unicode") from error
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD. Raises OptionError for an unknown id."""
        try:
            ids = [operator.index(token) for token in ids]
        except TypeError as error:
            raise OptionError(f"ids: {error}, expected token ids") from error
        for token in ids:
            if token not in self._ids:
                raise OptionError(f"ids: found {token}, expected 0 to {self.vocab_size - 1}")
        if skip_special_tokens:
            ids = [token for token in ids if token not in self._special]
        return self._decode(ids)

    def least_tokens(self, text: str) -> int:
        """No more than `encode` gives for this text, found in a fraction of its time and memory;
        0 where nothing is known."""
        return self._lengths.least(text.encode(errors="replace").decode())

    def stream(self) -> TextStream:
        return TextStream(self)

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """Ids to decode others behind, where they are not the first, and the anchor's own text."""
        ids = self._encode("a", False)
        return ids, self._decode(ids)


class TextStream:
    """The text of a growing sequence of ids, special tokens skipped.

    All that `push` and a last `flush` return adds up to `decode` of all ids. Text is held back
    while later ids may change it: inside a UTF-8 sequence and after byte tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # ids whose text has not been returned
        self._try_at = 1  # decode `pending` when it is so long
        self._is_first = True  # nothing returned yet

    def push(self, token: int) -> str:
        if token in self._tokenizer._special:
            return ""
        self._pending.append(token)
        # A run of byte tokens is text or not as a whole.
        if len(self._pending) < self._try_at or token in self._tokenizer._bytes:
            return ""
        text = self._decode()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            # A sequence is complete after 4 bytes. Beyond that this is no text at all; looking at
            # doubled lengths only keeps the cost linear.
            length = len(self._pending)
            self._try_at = length + 1 if length < 4 else 2 * length
            return ""
        self._restart()
        return text

    def flush(self) -> str:
        """The rest of the text, once there are no more ids."""
        text = self._decode()
        self._restart()
        return text

    def _decode(self) -> str:
        # Tokenizers strip a space from the front of a text, hence the anchor from the second piece
        # on; nothing else in front of a token changes its text.
        if self._is_first:
            return self._tokenizer.decode(self._pending)
        ids, text = self._tokenizer._anchor
        return self._tokenizer.decode(ids + self._pending)[len(text) :]

    def _restart(self) -> None:
        self._pending = []
        self._try_at = 1
        self._is_first = False


def _around(
    path: Path, settings: dict[str, Any], vocabulary: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """The tokens, none or one each, that tokenizer_config.json puts before and after every text."""
    around = []
    for kind in ("bos", "eos"):
        token = settings.get(f"{kind}_token") if settings.get(f"add_{kind}_token") else None
        if token is not None and (not isinstance(token, str) or token not in vocabulary):
            raise CheckpointError(f"{path}: {kind}_token {token!r} is not in the vocabulary")
        around.append({} if token is None else {token: vocabulary[token]})
    return around[0], around[1]


class _Faults:
    """A context in which a file's faults, however late its library finds them, are
    CheckpointErrors."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        # `tokenizers` raises plain Exception, and a panic of Rust's, as for a regular expression
        # that takes too many steps, is a BaseException whose class nobody can import.
        if kind and (issubclass(kind, Exception) or kind.__name__ == "PanicException"):
            raise CheckpointError(f"{self._path}: {error}") from cast(BaseException, error)


class _JsonTokenizer(Tokenizer):
    """tokenizer.json through the `tokenizers` library."""

    def __init__(self, path: Path, settings: dict[str, Any], vocab_size: int) -> None:
        text = read_text(path, "a tokenizer", MAX_TOKENIZER)
        self._faults = _Faults(path)
        with self._faults:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # Some files carry the settings of a training run.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._lengths = JsonLengths(self._tokenizer)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._ids = range(max(vocab_size, max(vocabulary.values(), default=-1) + 1))
        self._special = frozenset(token for token, content in added.items() if content.special)
        byte = re.compile("<0x[0-9A-Fa-f]{2}>")
        self._bytes = frozenset(vocabulary[piece] for piece in filter(byte.fullmatch, vocabulary))
        # tokenizer_config.json overrules what tokenizer.json puts around a text.
        if "add_bos_token" in settings or "add_eos_token" in settings:
            bos, eos = _around(path, settings, vocabulary)
            self._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single=[*bos, "$A", *eos], special_tokens=list({**bos, **eos}.items())
            )

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with self._faults:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def _decode(self, ids: list[int]) -> str:
        with self._faults:
            return self._tokenizer.decode(ids, skip_special_tokens=False)


# A private use character: it is in no vocabulary, so nothing merges with it.
_MARK = "\ue000"


class _SentencePieceTokenizer(Tokenizer):
    """tokenizer.model through `sentencepiece`, by the conventions of Llama 2: <s> goes before every
    text, and a space before every stretch of text between special tokens; with `"legacy": false` in
    tokenizer_config.json only before the text as a whole.
    """

    def __init__(self, path: Path, settings: dict[str, Any], vocab_size: int) -> None:
        content = read(path, "a SentencePiece model", MAX_TOKENIZER)
        with _Faults(path):
            self._model = model = sentencepiece.SentencePieceProcessor()
            model.load_from_serialized_proto(content)
            self._size = model.vocab_size()
        symbols = [i for i in range(self._size) if model.is_control(i) or model.is_unknown(i)]
        added = _added_tokens(path.parent, settings)
        # Tokens that a text may spell out, which SentencePiece itself does not look for.
        self._spelled = {i: model.id_to_piece(i) for i in symbols} | added
        self._spelled_ids = {text: token for token, text in self._spelled.items()}
        self._lengths = SentencePieceLengths(model, list(self._spelled_ids))
        longest_first = sorted(self._spelled_ids, key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._ids = range(max(vocab_size, self._size, *(token + 1 for token in added)))
        self._special = frozenset(symbols) | _special_tokens(settings)
        self._bytes = frozenset(i for i in range(self._size) if model.is_byte(i))
        self._is_legacy = settings.get("legacy") is not False
        defaults = {"add_bos_token": True, "bos_token": self._spelled.get(model.bos_id())}
        bos, eos = _around(path, defaults | settings, self._spelled_ids)
        self._bos, self._eos = list(bos.values()), list(eos.values())

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = []
        for i, part in enumerate(self._splitter.split(text)):
            if part in self._spelled_ids:
                ids.append(self._spelled_ids[part])
            elif i == 0 or self._is_legacy:
                ids += self._model.encode(part)
            else:
                ids += self._model.encode(_MARK + part)[len(self._model.encode(_MARK)) :]
        return [*self._bos, *ids, *self._eos] if add_special_tokens else ids

    def _decode(self, ids: list[int]) -> str:
        text = ""
        for is_spelled, group in itertools.groupby(ids, key=self._spelled.__contains__):
            if is_spelled:
                text += "".join(self._spelled[token] for token in group)
                continue
            run = [token for token in group if token < self._size]
            if text:  # SentencePiece strips the first space
                anchor, anchor_text = self._anchor
                text += self._model.decode(anchor + run)[len(anchor_text) :]
            else:
                text = self._model.decode(run)
        return text


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, str]:
    """Id -> text of the tokens that a checkpoint has beside its tokenizer.model."""
    path = folder / "added_tokens.json"
    try:
        stored = read_json_object(path, optional=True)
        added = {int(token): str(text) for text, token in stored.items()}
        for token, entry in settings.get("added_tokens_decoder", {}).items():
            added[int(token)] = str(entry["content"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: added tokens with no id or content: {error!r}") from error
    return added


def _special_tokens(settings: dict[str, Any]) -> frozenset[int]:
    entries = settings.get("added_tokens_decoder", {})
    return frozenset(int(token) for token, entry in entries.items() if entry.get("special"))
