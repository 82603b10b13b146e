"""Structured output: answers that follow a schema, an expression or a grammar."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import pydantic
import pytest
import sentencepiece
from conftest import PROMPT
from texts import PIECES

from tdaengine import Engine, Grammar, OptionError
from tdaengine.grammar import GrammarCompiler
from tdaengine.token_bytes import token_bytes
from tdaengine.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
EXPRESSIONS = [
    r"[A-Z]{3}-[0-9]{2,5}",
    r"(yes|no)",
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"[a-z ]{10,30}!",
]


class Person(pydantic.BaseModel):
    name: str
    age: int
    likes: list[str]


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Engine:
    return Engine(smollm2, weights="int8", threads=1)


def asking(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_json_of_the_real_model_is_valid(real: Engine):
    question = asking("Invent a person: name, age and what they like to drink. Answer in JSON.")
    for sampling in ({}, *({"temperature": 1.2, "seed": seed} for seed in range(5))):
        grammar = Grammar.json_schema(PERSON)
        out = real.chat(question, max_new_tokens=100, grammar=grammar, **sampling)
        assert out.finish_reason == "stop"
        jsonschema.validate(json.loads(out.text), PERSON)
        assert Person.model_validate_json(out.text).age >= 18
        assert "\n" not in out.text


def test_a_class_of_pydantic_is_a_schema(real: Engine):
    grammar = Grammar.json_schema(Person.model_json_schema())
    out = real.chat(asking("A person, please."), max_new_tokens=200, grammar=grammar)
    if out.finish_reason == "stop":
        Person.model_validate_json(out.text)
    else:
        assert out.text.startswith('{"name": "')


@pytest.mark.parametrize("pattern", EXPRESSIONS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "seed": 1}])
def test_an_expression_matches_as_a_whole(
    real: Engine, engine: Engine, pattern: str, sampling: dict
):
    for each in (real, engine):  # one with byte-level tokens, one with a token per character
        out = each.generate(PROMPT, max_new_tokens=40, grammar=Grammar.regex(pattern), **sampling)
        assert out.finish_reason == "stop" and re.fullmatch(pattern, out.text), out.text


def test_a_grammar_of_rules(real: Engine):
    grammar = Grammar.lark(
        'start: sum "=" NUMBER\nsum: NUMBER ("+" NUMBER){2}\nNUMBER: /[0-9]{1,3}/'
    )
    out = real.chat(asking("Write a sum."), max_new_tokens=60, grammar=grammar)
    assert re.fullmatch(r"\d+\+\d+\+\d+=\d+", out.text)


def test_pieces_and_prompts_each_have_their_own(engine: Engine):
    grammar = Grammar.regex("[ab]{5}c")
    whole = engine.generate([PROMPT, "Hi"], max_new_tokens=20, grammar=grammar)
    assert all(re.fullmatch("[ab]{5}c", out.text) for out in whole)
    stream = engine.stream(PROMPT, max_new_tokens=20, grammar=grammar, logprobs=1)
    assert "".join(stream) == whole[0].text
    assert stream.output.finish_reason == "stop" and len(stream.output.logprobs) == 6
    cut = engine.generate(PROMPT, max_new_tokens=3, grammar=grammar)
    assert (cut.finish_reason, cut.text) == ("length", whole[0].text[:3])


def test_characters_of_several_tokens(real: Engine):
    out = real.generate("Emojis:", max_new_tokens=40, grammar=Grammar.regex("[😀-😏]{4}"))
    assert re.fullmatch("[😀-😏]{4}", out.text)
    assert len(out.token_ids) > 4


def test_an_end_of_text_token_ends_only_what_is_complete(real: Engine):
    """The model would end its answer at once; the grammar holds it back."""
    done = asking("Say nothing at all.")
    out = real.chat(done, max_new_tokens=40, grammar=Grammar.regex("(ha){6,}"), temperature=0)
    assert len(out.text) >= 12 and set(out.text) == {"h", "a"}


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.json_schema({"type": "number", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (Grammar.json_schema({"type": "nonsense"}), "Invalid type: nonsense"),
        (Grammar.json_schema({"not": {}}), "Unimplemented keys"),
        (Grammar.json_schema({"$ref": "#/nowhere"}), "Pointer"),
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.lark("start: missing"), 'unknown name: "missing"'),
        (Grammar("xml", "<a/>"), "found 'xml', expected json, regex or lark"),
        (5, "found 5, expected a Grammar"),
        ({"type": "object"}, "expected a Grammar"),
    ],
)
def test_what_cannot_be_followed(engine: Engine, grammar: Grammar, message: str):
    with pytest.raises(OptionError, match=message) as caught:
        engine.stream(PROMPT, grammar=grammar)  # before anything is computed
    assert str(caught.value).startswith("grammar")
    assert "\n" not in str(caught.value)


def test_what_the_vocabulary_cannot_write(engine: Engine):
    """It has no "}"."""
    with pytest.raises(OptionError, match="found no token that may come next"):
        engine.generate(PROMPT, max_new_tokens=9, grammar=Grammar.regex("a}"))
    out = engine.generate(PROMPT, max_new_tokens=9, grammar=Grammar.regex("a[}b]"))
    assert out.text == "ab"


def chain(count: int) -> dict:
    definitions: dict = {
        f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(count)
    }
    definitions[f"a{count}"] = {"const": 7}
    return {"$ref": "#/$defs/a0", "$defs": definitions}


def nested(count: int) -> dict:
    return {"type": "array", "items": nested(count - 1)} if count else {"const": 7}


def test_what_would_overflow_a_stack(engine: Engine):
    """In another thread, whose stack may be smaller."""
    rules = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(20_000)) + 'r20000: "a"'
    grammars = {
        "4 levels deep with 5001 references": Grammar.json_schema(chain(5000)),
        "recursion limit exceeded": Grammar.json_schema(nested(300)),
        "20002 rules, expected at most 1000": Grammar.lark(rules),
        "too deeply nested": Grammar.lark("start: " + "(" * 9999 + '"a"' + ")" * 9999),
        "unclosed|nest": Grammar.regex("(" * 9999 + "a" + ")" * 9999),
        "too (big|large)": Grammar.json_schema({"enum": [str(i) for i in range(200_000)]}),
    }
    with ThreadPoolExecutor(1) as thread:
        for message, grammar in grammars.items():
            with pytest.raises(OptionError, match=message):
                thread.submit(engine.check_grammar, grammar).result()
        thread.submit(engine.check_grammar, Grammar.json_schema(chain(200))).result()


@pytest.mark.parametrize("schema", ["{", 5, None, {"enum": [object()]}, ["a"]])
def test_what_is_no_schema(schema: object):
    with pytest.raises(OptionError, match=r"^schema: "):
        Grammar.json_schema(schema)


def test_one_mask_at_a_time(engine: Engine):
    with pytest.raises(OptionError, match="grammar: found allowed_tokens, too"):
        engine.generate(PROMPT, grammar=Grammar.regex("a"), allowed_tokens=lambda ids: None)
    with pytest.raises(OptionError, match="pattern: found 5, expected a string"):
        Grammar.regex(5)


def test_grammars_travel_and_compare():
    grammar = Grammar.json_schema(PERSON)
    assert pickle.loads(pickle.dumps(grammar)) == grammar == Grammar.json_schema(json.dumps(PERSON))
    assert hash(Grammar.regex("a")) != hash(Grammar.lark("a"))


def sentencepiece_model(**options: object) -> bytes:
    """Of few pieces, so that bytes stand for most characters beyond ASCII."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["The sky is blue, and 12 birds sing.", "Der Himmel ist 3-mal blau."] * 9
        ),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def tokenizer_of(kind: str, folder: Path, smollm2: Path) -> Tokenizer:
    if kind == "byte-level":
        return Tokenizer.load(smollm2)
    options = {"add_dummy_prefix": False} if kind == "no prefix" else {}
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "no prefix"])
def test_any_walk_along_the_masks_gives_a_match(kind: str, tmp_path: Path, smollm2: Path):
    """Whatever the tokenizer, and however unlikely the tokens."""
    tokenizer = tokenizer_of(kind, tmp_path, smollm2)
    compiler = GrammarCompiler(tokenizer, [2])
    for pattern in (*EXPRESSIONS, "[😀-😏]{4}é", "The sky( is blue)+\\."):
        for seed in range(20):
            dice, mask = random.Random(seed), compiler.start(Grammar.regex(pattern))
            stream, text, goes_on = tokenizer.stream(), "", True
            while goes_on:
                bits = np.unpackbits(mask.allowed().view(np.uint8), bitorder="little")
                token = dice.choice(bits.nonzero()[0].tolist())
                goes_on = mask.take(token)
                text += stream.push(token)
            text += stream.flush()
            assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("kind", ["sentencepiece", "no prefix"])
def test_bytes_of_sentencepiece_add_up_to_the_text(kind: str, tmp_path: Path, smollm2: Path):
    tokenizer = tokenizer_of(kind, tmp_path, smollm2)
    for text in PIECES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        found = b"".join(token_bytes(tokenizer, ids)).decode(errors="replace")
        assert found.removeprefix(" ") == tokenizer.decode(ids, False).removeprefix(" ")


def test_bytes_of_tokens_add_up_to_the_text(real: Engine):
    for text in PIECES:
        ids = real.tokenizer.encode("x" + text, add_special_tokens=False)
        assert b"".join(token_bytes(real.tokenizer, ids)).decode() == "x" + text
    assert token_bytes(real.tokenizer, [1]) == [b"<|im_start|>"]


def test_a_missing_extra_is_named(folder: Path):
    program = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from tdaengine import Engine, Grammar\n"
        f"engine = Engine({str(folder)!r})\n"
        "engine.generate('a', max_new_tokens=1)\n"
        "engine.generate('a', grammar=Grammar.regex('a'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.endswith("OptionError: grammar needs llguidance: pip install 'tdaengine[grammar]'")
