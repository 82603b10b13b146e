"""Answers that follow a JSON schema, a regular expression or a grammar, by llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ._native import OptionError
from .masks import Mask
from .token_bytes import encode_behind, token_bytes
from .tokenizer import Tokenizer

# JSON is written without spaces but for one behind a comma or colon: models that may write any
# number of them can fall into writing nothing else.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# llguidance follows references and rules by recursion; several times as many overflow the stack.
MOST_LEVELS, MOST_RULES = 1000, 1000


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
            except (ValueError, RecursionError) as error:
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
        matcher = self._library.LLMatcher
        if grammar.kind == "json":
            check_levels(json.loads(grammar.source))
            compile_source = partial(matcher.grammar_from_json_schema, defaults=JSON_STYLE)
        elif grammar.kind == "regex":
            compile_source = matcher.grammar_from_regex
        elif grammar.kind == "lark":
            _check_rules(grammar.source)
            compile_source = matcher.grammar_from_lark
        else:
            raise OptionError(f"grammar: found {grammar.kind!r}, expected json, regex or lark")
        try:
            compiled = compile_source(grammar.source)
        except ValueError as error:  # as for a schema nested too deep
            raise OptionError(f"grammar: {error}") from error
        limits = self._library.LLParserLimits(verbose_errors=False)
        return MaskOfGrammar(matcher(self._tokens, compiled, log_level=0, limits=limits))


def check_levels(schema: Any) -> None:
    """Raises OptionError for a schema whose references could lead too deep."""
    deepest, references, todo = 0, {"#"}, [(schema, 1)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, dict):
            references.add(str(value.get("$ref", "#")))
            value = list(value.values())
        if isinstance(value, list):
            deepest = max(deepest, depth)
            todo += [(each, depth + 1) for each in value]
    if deepest * len(references) > MOST_LEVELS:
        raise OptionError(
            f"grammar: found a schema {deepest} levels deep with {len(references) - 1} references, "
            f"expected at most {MOST_LEVELS} levels in all"
        )


def _check_rules(text: str) -> None:
    rules = len(re.findall(r"^\s*[?!]?\w+[^:\n]*:", text, re.MULTILINE))
    if rules > MOST_RULES:
        raise OptionError(f"grammar: found {rules} rules, expected at most {MOST_RULES}")


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
                reason = (
                    "found no token that may come next: nothing matches, or the vocabulary cannot "
                    "write what does"
                )
            raise OptionError(f"grammar: {reason}")
