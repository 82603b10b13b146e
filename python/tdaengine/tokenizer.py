"""Text to token ids and back, by the checkpoint's own tokenizer.json or tokenizer.model."""

from __future__ import annotations

import itertools
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import cast

import sentencepiece
import tokenizers
from tokenizers import AddedToken, models

from ._native import CheckpointError, OptionError
from .contents import Contents
from .files import MAX_TOKENIZER
from .prompt_length import JsonLengths, SentencePieceLengths
from .tokenizer_files import Settings, stages_of_class, with_flags

FILES = ("tokenizer.json", "tokenizer.model")


def has_tokenizer(contents: Contents) -> bool:
    return any(map(contents.has, FILES))


class Tokenizer(ABC):
    """`Tokenizer.load(checkpoint)` gives the one that fits the checkpoint's files."""

    # To be set by subclasses.
    _ids: range  # everything decode accepts; ids without a token of their own have no text
    _special: frozenset[int]  # without text under skip_special_tokens
    _lengths: JsonLengths | SentencePieceLengths
    _bytes: frozenset[int]  # tokens that stand for one byte each, written <0x0A>
    added_tokens: dict[str, int]  # tokens that a text may spell out, and their ids

    @staticmethod
    def load(checkpoint: Path | str | Contents, vocab_size: int = 0) -> Tokenizer:
        """checkpoint: a folder or a GGUF file. vocab_size: of the model, which may know more ids
        than its tokenizer has tokens.

        Raises CheckpointError if no tokenizer file is there or it cannot be read.
        """
        contents = Contents.of(checkpoint)
        for name, kind in zip(FILES, (_JsonTokenizer, _SentencePieceTokenizer), strict=True):
            if contents.has(name):
                return kind(contents, Settings.read(contents), vocab_size)
        raise CheckpointError(f"{contents.path}: no tokenizer, looked for {' and '.join(FILES)}")

    @property
    def vocab_size(self) -> int:
        """decode accepts ids from 0 to vocab_size - 1."""
        return self._ids.stop

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids.

        add_special_tokens: with those that the checkpoint wants around every text, as <s>.
        parse_special: special and other added tokens that are spelled out in the text become
        themselves; if False, they are encoded as any other text.
        Raises OptionError if text is no str or no valid Unicode (lone surrogates).
        """
        if not isinstance(text, str):
            raise OptionError(f"text: found {type(text).__name__}, expected str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at position {error.start}"
            raise OptionError(f"text: found {found}, expected valid Unicode") from error
        if not parse_special:
            return self._around(self._encode_text(text), add_special_tokens)
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

    def is_special(self, token: int) -> bool:
        """Whether `decode` and streams skip it."""
        return token in self._special

    def stream(self) -> TextStream:
        return TextStream(self)

    @abstractmethod
    def piece(self, token: int) -> str:
        """How the vocabulary writes it; empty for an id without a token of its own."""

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Without added tokens: neither such as the text spells out nor those around it."""

    @abstractmethod
    def _around(self, ids: list[int], add_special_tokens: bool) -> list[int]: ...

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
        if self._tokenizer.is_special(token):
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

    def hidden(self, token: int) -> str:
        """The text of the token if it is special, which `push` does not return."""
        tokenizer = self._tokenizer
        return tokenizer.decode([token], False) if tokenizer.is_special(token) else ""

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


def _find_around(
    file: str, settings: Settings, vocabulary: dict[str, int], bos_by_default: bool
) -> tuple[list[int], list[int]]:
    """The tokens, none or one each, that tokenizer_config.json puts before and after every text.
    A token that is new is none that the model has learned.
    """
    declared = {token.content: id for id, token in settings.declared.items()}
    around: list[list[int]] = []
    for kind, by_default in (("bos", bos_by_default), ("eos", False)):
        token = settings.roles[f"{kind}_token"]
        if token is None or not settings.values.get(f"add_{kind}_token", by_default):
            around.append([])
        elif token.content in vocabulary:
            around.append([vocabulary[token.content]])
        elif token.content in declared:
            around.append([declared[token.content]])
        else:
            raise CheckpointError(
                f"{file}: {kind}_token {token.content!r} is not in the vocabulary"
            )
    return around[0], around[1]


def _ids_of(tokens: Iterable[str], vocabulary: dict[str, int]) -> frozenset[int]:
    return frozenset(vocabulary[token] for token in tokens if token in vocabulary)


class _Faults:
    """A context in which a file's faults, however late its library finds them, are
    CheckpointErrors. What a signal's handler raises meanwhile passes as it is."""

    # `tokenizers` raises plain Exception, and a panic of Rust's, as for a regular expression that
    # takes too many steps, is a BaseException whose class nobody can import.
    _KINDS = (Exception, RuntimeError, ValueError, TypeError, OverflowError)

    def __init__(self, file: str) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        if kind in self._KINDS or (kind and kind.__name__ == "PanicException"):
            raise CheckpointError(f"{self._file}: {error}") from cast(BaseException, error)


class _JsonTokenizer(Tokenizer):
    """tokenizer.json through the `tokenizers` library."""

    def __init__(self, contents: Contents, settings: Settings, vocab_size: int) -> None:
        name, label = FILES[0], contents.label(FILES[0])
        content = contents.text(name, "a tokenizer", MAX_TOKENIZER)
        self._faults = _Faults(label)
        with self._faults:
            file = tokenizers.Tokenizer.from_str(content)
        own = file.get_vocab(with_added_tokens=True)
        of_file = file.get_added_tokens_decoder()
        self._tokenizer = file
        # Some files carry the settings of a training run.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if settings.tokenizer_class and isinstance(file.model, models.BPE):
            self._tokenizer = stages_of_class(file, settings)
        present = self._tokenizer.get_added_tokens_decoder().values()
        more = list(settings.tokens_to_add(of_file, {token.content for token in present}))
        special = {token.content for token in [*present, *more] if token.special}
        with self._faults:
            self._tokenizer.add_tokens(more)
        self._lengths = JsonLengths(self._tokenizer)
        self._tokenizer.encode_special_tokens = settings.values.get("split_special_tokens") is True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for id, token in settings.declared.items():
            if token.content and token.content not in own and vocabulary[token.content] != id:
                raise CheckpointError(
                    f"{contents.path}: added token {token.content!r} has id {id}, expected "
                    f"{vocabulary[token.content]}, the next one behind {name}"
                )
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_tokens = {token.content: id for id, token in added.items()}
        self._ids = range(max(vocab_size, max(vocabulary.values(), default=-1) + 1))
        self._special = _ids_of(special, vocabulary)
        byte = re.compile("<0x[0-9A-Fa-f]{2}>")
        self._bytes = frozenset(vocabulary[piece] for piece in filter(byte.fullmatch, vocabulary))
        # What tokenizer.json puts around a text has the first word.
        self._before: list[int] = []
        self._after: list[int] = []
        post = self._tokenizer.post_processor
        if post is None or post.num_special_tokens_to_add(False) == 0:
            self._before, self._after = _find_around(label, settings, own, False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with self._faults:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def _encode_text(self, text: str) -> list[int]:
        normalizer, model = self._tokenizer.normalizer, self._tokenizer.model
        with self._faults:
            if normalizer is not None:
                text = normalizer.normalize_str(text)
            words = [text]
            if self._tokenizer.pre_tokenizer is not None:
                words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
            return [token.id for word in words if word for token in model.tokenize(word)]

    def _around(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        # The tokens around the empty text are those around any.
        around = self._encode("", add_special_tokens)
        end = len(around) - len(self._after)
        return [*around[:end], *ids, *around[end:]]

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def _decode(self, ids: list[int]) -> str:
        with self._faults:
            return self._tokenizer.decode(ids, skip_special_tokens=False)


# A private use character: it is in no vocabulary, so nothing merges with it.
_MARK = "\ue000"


class _SentencePieceTokenizer(Tokenizer):
    """tokenizer.model through `sentencepiece`, by the conventions of Llama 2: <s> goes before every
    text, and a space before every stretch of text between special tokens; with `"legacy": false` in
    tokenizer_config.json, which LlamaTokenizer takes for granted, only before the text as a whole,
    and only if it has none.
    """

    def __init__(self, contents: Contents, settings: Settings, vocab_size: int) -> None:
        name, label = FILES[1], contents.label(FILES[1])
        content = contents.read(name, "a SentencePiece model", MAX_TOKENIZER)
        with _Faults(label):
            self._model = model = sentencepiece.SentencePieceProcessor()
            model.load_from_serialized_proto(content)
            self._size = model.vocab_size()
        pieces = {model.id_to_piece(i): i for i in range(self._size)}
        symbols = [i for i in range(self._size) if model.is_control(i) or model.is_unknown(i)]
        # Tokens that a text may spell out, which SentencePiece itself does not look for.
        tokens = [AddedToken(model.id_to_piece(i), special=True) for i in symbols]
        tokens += settings.tokens_to_add({}, {token.content for token in tokens})
        tokens = [token for token in tokens if token.content]
        if settings.tokenizer_class != "LlamaTokenizer":  # all are found in the text as it is
            tokens = [with_flags(token, normalized=False) for token in tokens]
        ids = pieces | {token.content: id for id, token in settings.declared.items()}
        free = itertools.count(max(ids.values(), default=-1) + 1)
        for token in tokens:
            if token.content not in ids:
                ids[token.content] = next(free)
        self.added_tokens = {token.content: ids[token.content] for token in tokens}
        self._spelled = {id: text for text, id in self.added_tokens.items()}
        self._lengths = SentencePieceLengths(model, list(self.added_tokens))
        special = {token.content for token in tokens if token.special}
        self._special = _ids_of(special, ids)
        splits_special = settings.values.get("split_special_tokens") is True
        self._splitter = tokenizers.Tokenizer(models.WordLevel({_MARK: 0}, _MARK))
        self._splitter.add_tokens(tokens)
        self._splitter.encode_special_tokens = splits_special
        self._ids = range(max(vocab_size, self._size, *(id + 1 for id in self._spelled)))
        self._bytes = frozenset(i for i in range(self._size) if model.is_byte(i))
        is_llama = settings.tokenizer_class == "LlamaTokenizer"
        self._is_legacy = bool(settings.values.get("legacy", not is_llama))
        self._adds_space = not is_llama or settings.values.get("add_prefix_space") is not False
        self._bos, self._eos = _find_around(label, settings, pieces, True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = []
        split = self._splitter.encode(text, add_special_tokens=False)
        for found, (begin, end) in zip(split.ids, split.offsets, strict=True):
            token = self._splitter.id_to_token(found)
            if token in self.added_tokens:
                ids.append(self.added_tokens[token])
            else:
                ids += self._encode_part(text[begin:end], begin == 0)
        return self._around(ids, add_special_tokens)

    def _encode_part(self, part: str, is_first: bool) -> list[int]:
        has_space = not self._is_legacy and part.startswith((" ", "▁"))
        if self._adds_space and (self._is_legacy or (is_first and not has_space)):
            return self._encode_text(part)
        return self._encode_text(_MARK + part)[len(self._encode_text(_MARK)) :]

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def _around(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        return [*self._bos, *ids, *self._eos] if add_special_tokens else ids

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        ids = self._encode("a", False)
        return ids, self._model.decode(ids)

    def piece(self, token: int) -> str:
        known = token < self._size
        return str(self._model.id_to_piece(token)) if known else self._spelled.get(token, "")

    def _decode(self, ids: list[int]) -> str:
        text = ""
        for is_spelled, group in itertools.groupby(ids, key=self._spelled.__contains__):
            if is_spelled:
                text += "".join(self._spelled[token] for token in group)
                continue
            run = [token for token in group if token < self._size]
            if text or not self._adds_space:  # SentencePiece strips the first space
                anchor, anchor_text = self._anchor
                text += self._model.decode(anchor + run)[len(anchor_text) :]
            else:
                text = self._model.decode(run)
        return text
