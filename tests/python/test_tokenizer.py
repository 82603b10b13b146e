"""Ids and texts against the reference libraries used directly, streaming, and damaged files."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizer_cases
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tdaengine import CheckpointError, OptionError
from tdaengine.tokenizer import Tokenizer

SCRIPTS = {
    "latin": (0x20, 0x24F),
    "greek and cyrillic": (0x370, 0x52F),
    "hebrew and arabic": (0x590, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "thai": (0xE00, 0xE7F),
    "combining": (0x300, 0x36F),
    "punctuation": (0x2000, 0x206F),
    "kana": (0x3040, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "private use": (0xE000, 0xE0FF),
    "mathematics": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1FAFF),
    "control": (0x00, 0x1F),
}
PROSE = """The quick brown fox jumps over the lazy dog; it's 12,345.67 dollars (or so).
Größe, naïve café, señor, Ærøskøbing. Москва и Россия. Ελληνικά γράμματα. 今日は世界です。
你好,世界!
안녕하세요 세계. नमस्ते दुनिया. שלום עולם. مرحبا بالعالم. สวัสดีชาวโลก.
def f(x):\n\treturn x ** 2  # ok
"""


def make_strings() -> list[str]:
    rng = random.Random(0)

    def draw(span: tuple[int, int]) -> str:
        return "".join(chr(rng.randint(*span)) for _ in range(rng.randint(1, 24)))

    def cut() -> str:
        start = rng.randrange(len(PROSE))
        return PROSE[start : start + rng.randint(1, 60)]

    strings = [
        "",
        " ",
        "a",
        "  a",
        " a b  c   ",
        "\n",
        "\x00",
        "</s>",
        "<s> x</s> y",
        "▁",
        "▁a",
        "�",
    ]
    strings += [
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈 x",
        "👍🏽👍🏿",
        "e\u0301",
        "\u200b\ufeff",
        "<|im_start|>user\nhi<|im_end|>\n",
    ]
    strings += [" " * n for n in range(2, 40)] + ["\n" * n + "x" for n in range(2, 20)]
    strings += ["\t \r\n" * n for n in range(1, 20)] + ["a" * n for n in (100, 1000)]
    strings += [str(rng.randrange(10**n)) for n in range(1, 40)]
    strings += [draw(span) for span in SCRIPTS.values() for _ in range(30)]
    strings += [draw(rng.choice(list(SCRIPTS.values()))) + cut() for _ in range(200)]
    strings += [cut() for _ in range(200)]
    for handler in ("replace", "ignore"):
        strings += [rng.randbytes(rng.randint(1, 40)).decode(errors=handler) for _ in range(100)]
    assert len(strings) >= 1000
    return strings


STRINGS = make_strings()


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([stream.push(token) for token in ids] + [stream.flush()])


def check_streaming(tokenizer: Tokenizer, ranges: list[range]) -> None:
    """Random ids, each sequence drawn from some of the ranges."""
    rng = random.Random(1)
    for _ in range(600):
        pools = rng.sample(ranges, rng.randint(1, len(ranges)))
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 40))]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids), ids
    for text in STRINGS:
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids), text


# ---- tokenizer.json -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.load(smollm2)


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


def test_json_ids_and_texts(smollm2_tokenizer, smollm2_reference):
    for text in STRINGS:
        ids = smollm2_tokenizer.encode(text)
        assert ids == smollm2_reference.encode(text).ids, text
        for skip in (True, False):
            expected = smollm2_reference.decode(ids, skip_special_tokens=skip)
            assert smollm2_tokenizer.decode(ids, skip) == expected, text
        if text in PROSE:  # the vocabulary lacks some control characters
            assert smollm2_tokenizer.decode(ids) == text


def test_json_streaming(smollm2_tokenizer):
    size = smollm2_tokenizer.vocab_size
    check_streaming(smollm2_tokenizer, [range(size), range(17), range(17, 17 + 256)])


def write_byte_fallback(folder: Path) -> tokenizers.Tokenizer:
    """The shape of Llama 2's tokenizer.json: ▁ for spaces, bytes as <0x0A>, <s> before the text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", *map(chr, range(33, 127)), "é", "世", "▁a", "th", "▁th"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "▁"), ("▁", "a"), ("t", "h"), ("▁", "th")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_json_with_byte_fallback(tmp_path):
    reference = write_byte_fallback(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for text in STRINGS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text).ids
        assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
        assert tokenizer.decode(ids) == reference.decode(ids)
    size = tokenizer.vocab_size
    check_streaming(tokenizer, [range(size), range(3, 259), range(259, 262), range(3)])


def test_training_settings_of_the_file_are_dropped(tmp_path):
    reference = write_byte_fallback(tmp_path)
    reference.enable_truncation(4)
    reference.enable_padding(length=16)
    reference.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("0123456789")) == 12  # <s> and ▁ before it


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "bos_token": "</s>"}, [2], []),
        ({"add_eos_token": True, "eos_token": {"content": "</s>"}}, [], [2]),
        ({"add_bos_token": True, "bos_token": "<s>", "add_eos_token": False}, [1], []),
        ({"add_bos_token": True, "bos_token": None}, [], []),
    ],
)
@pytest.mark.parametrize("writes_bos", [True, False])
def test_tokens_around_a_text(tmp_path, settings, before, after, writes_bos):
    """What tokenizer.json writes has the first word, as in transformers 5."""
    reference = write_byte_fallback(tmp_path)
    if writes_bos:
        before, after = [1], []
    else:
        reference.post_processor = tokenizers.processors.ByteLevel()
        reference.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    plain = tokenizer.encode("x", add_special_tokens=False)
    assert tokenizer.encode("x") == [*before, *plain, *after]


def test_streaming_returns_text_as_soon_as_it_is_certain(smollm2_tokenizer):
    stream = smollm2_tokenizer.stream()
    for token in smollm2_tokenizer.encode("Plain words come at once"):
        assert stream.push(token) == smollm2_tokenizer.decode([token])
    ids = smollm2_tokenizer.encode("𓀀")  # four bytes, several tokens
    assert len(ids) > 1
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["𓀀"]


def test_streaming_cost_is_linear(smollm2_tokenizer, monkeypatch):
    """Counted in decoded ids, over text and over bytes that never make a character."""
    stray = next(i for i in range(17, 300) if smollm2_tokenizer.decode([i]) == "�")
    words = smollm2_tokenizer.encode(" word") * 2000
    decode, counted = smollm2_tokenizer.decode, []
    monkeypatch.setattr(
        smollm2_tokenizer, "decode", lambda ids: counted.append(len(ids)) or decode(ids)
    )
    for ids in (words, [stray] * 2000, [0] * 2000):
        counted.clear()
        assert streamed(smollm2_tokenizer, ids) == decode(ids)
        assert sum(counted) <= 5 * len(ids) + 10


# ---- tokenizer.model ----------------------------------------------------------------------------


def train(**options) -> bytes:
    model = io.BytesIO()
    settings = {
        "sentence_iterator": iter(PROSE.split("\n") * 4),
        "model_writer": model,
        "vocab_size": 480,
        "hard_vocab_limit": False,
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(**{**settings, **options})
    return model.getvalue()


@pytest.fixture(scope="session")
def llama_model() -> bytes:
    return train()


def load_model(folder: Path, model: bytes, **settings) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    "options",
    [{}, {"remove_extra_whitespaces": True}, {"model_type": "unigram", "vocab_size": 400}],
    ids=["llama", "whitespace removed", "unigram"],
)
def test_sentencepiece_ids_and_texts(tmp_path, options):
    model = train(**options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load_model(tmp_path, model)
    for text in STRINGS:
        if "<s>" in text or "</s>" in text:
            continue  # special tokens here, plain text to the library
        ids = tokenizer.encode(text)
        assert ids == [reference.bos_id(), *reference.encode(text)], text
        assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
        assert tokenizer.decode(ids) == reference.decode(ids), text
    size = tokenizer.vocab_size
    rng = random.Random(2)
    for _ in range(300):
        ids = [rng.randrange(3, size) for _ in range(20)]
        assert tokenizer.decode(ids) == reference.decode(ids)
    check_streaming(tokenizer, [range(size), range(3), range(3, 259), range(259, size)])


def test_sentencepiece_special_tokens(tmp_path, llama_model):
    tokenizer = load_model(tmp_path, llama_model)
    plain = tokenizer.encode("dog", add_special_tokens=False)
    assert tokenizer.encode("<s>dog</s>dog") == [1, 1, *plain, 2, *plain]
    assert tokenizer.decode([1, *plain, 2, *plain]) == "dog dog"
    assert tokenizer.decode([1, *plain, 2, *plain], False) == "<s> dog</s> dog"


def test_sentencepiece_space_before_the_first_text_alone(tmp_path, llama_model):
    tokenizer = load_model(tmp_path, llama_model, legacy=False)
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    for text in ("dog", "世", "9 dogs"):
        assert tokenizer.encode(text) == [1, *reference.encode(text)]
    for text in (" dog", "  "):  # has its space already, as transformers has it
        assert tokenizer.encode(text) == [1, *reference.encode(text[1:])]
    for text in ("dog", " dog", "  ", "世", "9 dogs"):
        ids = tokenizer.encode("x</s>" + text, add_special_tokens=False)
        assert ids[: ids.index(2)] == reference.encode("x")
        assert tokenizer.decode(ids) == "x" + text
        assert tokenizer.encode("</s>" + text)[2:] == ids[ids.index(2) + 1 :]


def test_sentencepiece_added_tokens(tmp_path, llama_model):
    size = sentencepiece.SentencePieceProcessor(model_proto=llama_model).vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size, "<pad>": size + 1}))
    tokenizer = load_model(tmp_path, llama_model, pad_token="<pad>")
    ids = tokenizer.encode("dog<tool> dog<pad>", add_special_tokens=False)
    assert (ids.count(size), ids[-1]) == (1, size + 1)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.decode(ids) == "dog<tool>  dog"
    check_streaming(tokenizer, [range(size, size + 2), range(259, size + 2), range(3, 259)])


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True, "eos_token": "</s>"}, [1], [2]),
        ({"bos_token": "</s>"}, [2], []),
    ],
)
def test_sentencepiece_tokens_around_a_text(tmp_path, llama_model, settings, before, after):
    tokenizer = load_model(tmp_path, llama_model, **settings)
    plain = tokenizer.encode("x", add_special_tokens=False)
    assert tokenizer.encode("x") == [*before, *plain, *after]


# ---- what other files say -----------------------------------------------------------------------

GOLDEN = json.loads(tokenizer_cases.GOLDEN.read_text())
CASES = tokenizer_cases.make_cases()


def differs_from_transformers(name: str, text: str) -> bool:
    """With "legacy", SentencePiece's own prefix goes before a space, too; the class of transformers
    leaves it out there."""
    return name.startswith("model, LlamaTokenizer") and name.endswith(", legacy") and " " in text


@pytest.mark.parametrize("name", CASES)
def test_files_beside_the_vocabulary(tmp_path, name):
    """Against what transformers 5.24 makes of the same files."""
    tokenizer = Tokenizer.load(tokenizer_cases.write(tmp_path, CASES[name]))
    for text, (ids, shown, whole) in zip(tokenizer_cases.TEXTS, GOLDEN[name], strict=True):
        if differs_from_transformers(name, text):
            continue
        assert tokenizer.encode(text) == ids, text
        assert [tokenizer.decode(ids), tokenizer.decode(ids, False)] == [shown, whole], text
        assert streamed(tokenizer, ids) == shown, text


def test_tokenizer_model_begins_texts_with_bos_unless_told_otherwise(tmp_path, llama_model):
    """So do llama.cpp and transformers 4; transformers 5 documents it."""
    for settings, bos in (({}, [1]), ({"add_bos_token": False}, []), ({"bos_token": None}, [])):
        tokenizer = load_model(tmp_path, llama_model, **settings)
        assert tokenizer.encode("x") == bos + tokenizer.encode("x", False)


@pytest.mark.parametrize("id", [tokenizer_cases.SIZE + 5, 7])
def test_a_new_token_with_an_id_that_tokenizer_json_has_no_place_for(tmp_path, id):
    files = {"tokenizer.json": tokenizer_cases.json_file(), "added_tokens.json": {"<end>": id}}
    expected = f"'<end>' has id {id}, expected {tokenizer_cases.SIZE}, the next one behind"
    with pytest.raises(CheckpointError, match=expected):
        Tokenizer.load(tokenizer_cases.write(tmp_path, files))


@pytest.mark.parametrize("kind", ["json", "model"])
def test_added_tokens_as_text(tmp_path, kind):
    content = getattr(tokenizer_cases, f"{kind}_file")()
    config = {"extra_special_tokens": ["<end>"], "added_tokens_decoder": {}}
    tokenizer = Tokenizer.load(
        tokenizer_cases.write(
            tmp_path, {f"tokenizer.{kind}": content, "tokenizer_config.json": config}
        )
    )
    ids = tokenizer.encode("a<end>b</s>", parse_special=False)
    assert ids[0] == 1 and not {2, tokenizer_cases.SIZE} & set(ids)
    assert tokenizer.decode(ids) == "a<end>b</s>"
    assert tokenizer.encode("a<end>b</s>", False, False) == ids[1:]
    assert tokenizer.encode("a b", parse_special=False) == tokenizer.encode("a b")


# ---- errors -------------------------------------------------------------------------------------


def test_no_tokenizer_names_the_files_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json and tokenizer\.model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b'{"model": 5}'])
def test_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.load(tmp_path)


def test_truncated_sentencepiece_model(tmp_path, llama_model):
    for size in (10, 1000, len(llama_model) - 1):
        (tmp_path / "tokenizer.model").write_bytes(llama_model[:size])
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[1]", r"tokenizer_config\.json: found list"),
        ("{", r"tokenizer_config\.json"),
        ('{"add_bos_token": true, "bos_token": "<x>"}', "bos_token '<x>' is not in the vocabulary"),
        ('{"add_bos_token": true, "bos_token": [1]}', "bos_token"),
    ],
)
@pytest.mark.parametrize("kind", ["json", "model"])
def test_broken_settings(tmp_path, llama_model, settings, message, kind):
    if kind == "json":
        reference = write_byte_fallback(tmp_path)
        reference.post_processor = tokenizers.processors.ByteLevel()  # leaves it to the settings
        reference.save(str(tmp_path / "tokenizer.json"))
    else:
        (tmp_path / "tokenizer.model").write_bytes(llama_model)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("added", [{"5": 7}, {"5": {}}, {"x": {"content": "y"}}, [5]])
def test_broken_added_tokens(tmp_path, llama_model, added):
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        load_model(tmp_path, llama_model, added_tokens_decoder=added)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", b"bytes", None, 5, ["a"]])
def test_text_that_is_none(smollm2_tokenizer, text):
    with pytest.raises(OptionError, match="text: found"):
        smollm2_tokenizer.encode(text)


@pytest.mark.parametrize("ids", [[-1], [49152], [2**40], [1.5], ["a"], "ab", 5, None])
def test_ids_that_are_none(smollm2_tokenizer, ids):
    with pytest.raises(OptionError, match="ids"):
        smollm2_tokenizer.decode(ids)


def test_model_may_know_more_ids_than_the_tokenizer(tmp_path, llama_model):
    for write in (write_byte_fallback, lambda folder: load_model(folder, llama_model)):
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(folder)
        known = Tokenizer.load(folder).encode("x")
        tokenizer = Tokenizer.load(folder, vocab_size=1000)
        assert tokenizer.decode([999, *known, 998]) == "x"
        with pytest.raises(OptionError, match="found 1000, expected 0 to 999"):
            tokenizer.decode([1000])


def test_numpy_ids(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("numbers")
    assert smollm2_tokenizer.decode(np.array(ids, np.int32)) == "numbers"
