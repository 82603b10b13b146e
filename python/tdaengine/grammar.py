"""Answers that follow a JSON schema, a regular expression or a grammar, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._native import OptionError
from .masks import Mask
from .token_bytes import encode_behind, token_bytes
from .tokenizer import Tokenizer

# JSON is written without spaces but for one behind a comma or colon: models that may write any
# number of them can fall into writing nothing else.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like, for `engine.generate(prompt, grammar=...)`. It needs the extra
    [grammar].

        Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})

    kind: "json", "regex" or "lark". source: the schema as JSON, the expression, or the grammar.
    """

    kind: str
    source: str

    @staticmethod
    def json_schema(schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON that `schema` accepts, a dict or its JSON: one line, with a space behind commas and
        colons. Raises OptionError for what is no JSON; a schema that has no instance or a keyword
        that is not supported is found where the grammar is used."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise OptionError(f"schema: {error}, expected JSON") from error
        if not isinstance(schema, Mapping | bool):
            raise OptionError(f"schema: found {schema!r}, expected a JSON schema, an object")
        try:
            return Grammar("json", json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(f"schema: {error}, expected JSON") from error

    @staticmethod
    def regex(pattern: str) -> Grammar:
        """Text that `pattern` matches as a whole: a regular expression as of Rust's crate `regex`,
        without look-around and back-references; \\d, \\w and \\s are those of Unicode."""
        return Grammar("regex", _text(pattern, "pattern"))

    @staticmethod
    def lark(text: str) -> Grammar:
        """Text that the rule `start` of a grammar matches: Lark's syntax, as llguidance takes it,
        is the `text`."""
        return Grammar("lark", _text(text, "text"))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise OptionError(f"{name}: found {value!r}, expected a string")
    return value


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise OptionError("grammar needs llguidance: pip install 'tdaengine[grammar]'") from error
    return llguidance


class GrammarCompiler:
    """Grammars over the tokens of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, eos_tokens: Sequence[int]) -> None:
        self._library = _library()
        self._size = tokenizer.vocab_size
        vocabulary = self._library.TokenizerWrapper(_Vocabulary(tokenizer, eos_tokens))
        self._tokens = self._library.LLTokenizer(
            vocabulary, n_vocab=self._size, eos_token=list(eos_tokens) or None
        )

    def start(self, grammar: Grammar) -> MaskOfGrammar:
        """For one generation. Raises OptionError for a grammar that is wrong, that nothing matches,
        or that is too large."""
        if not isinstance(grammar, Grammar):
            raise OptionError(f"grammar: found {grammar!r}, expected a Grammar")
        make = self._library.LLMatcher
        if grammar.kind == "json":
            compiled = make.grammar_from_json_schema(grammar.source, defaults=JSON_STYLE)
        elif grammar.kind == "regex":
            compiled = make.grammar_from_regex(grammar.source)
        elif grammar.kind == "lark":
            compiled = make.grammar_from_lark(grammar.source)
        else:
            raise OptionError(f"grammar: found {grammar.kind!r}, expected json, regex or lark")
        limits = self._library.LLParserLimits(verbose_errors=False)
        return MaskOfGrammar(make(self._tokens, compiled, log_level=0, limits=limits))


class _Vocabulary:
    """As llguidance takes a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos_tokens: Sequence[int]) -> None:
        ids = range(tokenizer.vocab_size)
        self.tokens = token_bytes(tokenizer, ids)
        self.special_token_ids = [token for token in ids if tokenizer.is_special(token)]
        self.eos_token_id = eos_tokens[0] if eos_tokens else 0
        self.bos_token_id = None
        self._tokenizer = tokenizer
        special = frozenset(self.special_token_ids)
        self._ids = {self.tokens[token]: token for token in ids if token not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of what a grammar forces. They must stand for exactly these bytes, which those of
        a tokenizer that changes spaces do not; then they are the longest that fit."""
        data = text.encode() if isinstance(text, str) else text
        ids = encode_behind(self._tokenizer, data.decode(), parse_special=False)
        if b"".join(self.tokens[token] for token in ids) == data:
            return ids
        ids = []
        while data:
            ends = range(min(len(data), self._longest), 0, -1)
            fitting = (self._ids[data[:end]] for end in ends if data[:end] in self._ids)
            token = next(fitting, None)
            if token is None:  # no token can go on
                break
            ids.append(token)
            data = data[len(self.tokens[token]) :]
        return ids


class MaskOfGrammar(Mask):
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._check()

    def allowed(self) -> np.ndarray:
        mask = np.frombuffer(self._matcher.compute_bitmask(), "<u4")
        self._check()
        return mask

    def take(self, token: int) -> bool:
        self._matcher.consume_token(token)
        self._check()
        return not self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().removesuffix("<non-verbose/>").split())
            if "NoExtensionBias" in reason:
                reason = "found no token that may come next: this vocabulary cannot write it"
            raise OptionError(f"grammar: {reason}")
