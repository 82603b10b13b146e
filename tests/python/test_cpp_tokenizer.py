"""The C++ tokenizer against the package's own, which is `tokenizers` and `sentencepiece`."""

import io
import json
import random
import subprocess
from pathlib import Path

import pytest
import sentencepiece
import texts
import tiny
import tiny_gguf
import tokenizer_cases
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from tdaengine.tokenizer import Tokenizer

PROGRAM = Path(__file__).parents[2] / "build" / "tokenize"
TEXTS = texts.make_texts()
SOME = TEXTS[::4]  # for variants
SPLIT = (  # Llama 3's and Qwen 2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def ask(folder: Path, requests: list[dict]) -> list:
    lines = "".join(json.dumps(each) + "\n" for each in requests)
    run = subprocess.run([PROGRAM, folder], input=lines, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stdout[-1000:]
    return [json.loads(line) for line in run.stdout.split("\n")[:-1]]


def check_equal(folder: Path, texts: list[str] = TEXTS) -> None:
    """Ids of all the texts; decoded and streamed text of some of them, and of ids at random."""
    tokenizer = Tokenizer.load(folder)
    cases = [(text, True) for text in texts] + [(text, False) for text in texts[::5]]
    found = ask(folder, [{"encode": text, "special": special} for text, special in cases])
    for (text, special), ids in zip(cases, found, strict=True):
        assert ids == tokenizer.encode(text, special), text
    rng = random.Random(1)
    size = tokenizer.vocab_size
    pools = [range(size), sorted(tokenizer._bytes) or range(min(size, 300)), range(64)]
    lists = found[::20] + [
        [rng.choice(pool) for _ in range(rng.randint(1, 30))] for pool in pools for _ in range(100)
    ]
    for special in (True, False):
        found = ask(folder, [{"decode": each, "special": special} for each in lists])
        assert found == [tokenizer.decode(each, not special) for each in lists]
    for each, pieces in zip(lists, ask(folder, [{"stream": each} for each in lists]), strict=True):
        stream = tokenizer.stream()
        assert pieces == [*map(stream.push, each), stream.flush()], each


# ---- tokenizer.json -----------------------------------------------------------------------------


def test_smollm2(smollm2):
    check_equal(smollm2)


def trained(stages: dict, specials: tuple = (), **options) -> tokenizers.Tokenizer:
    """A BPE tokenizer with these stages, trained on some of the texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**options))
    for name, stage in stages.items():
        setattr(tokenizer, name, stage)
    is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if is_byte_level else [],
        limit_alphabet=300,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[100:4000:3], trainer)
    return tokenizer


def byte_level(split: str, **options) -> tokenizers.Tokenizer:
    cut = pre_tokenizers.Split(Regex(split), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    stages = {
        "pre_tokenizer": pre_tokenizers.Sequence([cut, to_bytes]),
        "decoder": decoders.ByteLevel(),
    }
    return trained(stages, ("<s>", "</s>", "<|im_start|>"), **options)


def around(*single: str) -> TemplateProcessing:
    return TemplateProcessing(single=list(single), special_tokens=[("<s>", 0), ("</s>", 1)])


def llama3() -> tokenizers.Tokenizer:
    tokenizer = byte_level(SPLIT.replace("DIGITS", "{1,3}"), ignore_merges=True)
    tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), around("<s>", "$A")])
    return tokenizer


def qwen2() -> tokenizers.Tokenizer:
    tokenizer = byte_level(SPLIT.replace("DIGITS", ""))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(["<tool>", AddedToken("[X]", normalized=False)])
    return tokenizer


def gpt2() -> tokenizers.Tokenizer:
    stages = {
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "decoder": decoders.ByteLevel(),
    }
    return trained(stages, ("<s>", "</s>"))


def digits() -> tokenizers.Tokenizer:
    cuts = [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]
    stages = {"pre_tokenizer": pre_tokenizers.Sequence(cuts), "decoder": decoders.ByteLevel()}
    tokenizer = trained(stages, ("<s>", "</s>"))
    tokenizer.post_processor = around("<s>", "$A", "</s>")
    return tokenizer


def with_byte_fallback(stages: dict) -> tokenizers.Tokenizer:
    """Llama 2's: <unk>, <s>, </s>, the bytes, then pieces with ▁ for spaces."""
    learned = json.loads(trained(stages, unk_token="<unk>").to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in learned["vocab"] if piece not in pieces]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = list(map(tuple, learned["merges"]))
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    for name, stage in stages.items():
        setattr(tokenizer, name, stage)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def llama2() -> tokenizers.Tokenizer:
    cut = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = with_byte_fallback({"pre_tokenizer": cut})
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def llama2_normalizer() -> tokenizers.Tokenizer:
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = with_byte_fallback({"normalizer": normalizers.Sequence(steps)})
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=True), "</s>"])
    return tokenizer


def gemma() -> tokenizers.Tokenizer:
    """Text in one piece: the spaces that it would be cut behind are replaced before."""
    cut = pre_tokenizers.Split(" ", "merged_with_previous")
    stages = {"normalizer": normalizers.Replace(" ", "▁"), "pre_tokenizer": cut}
    tokenizer = with_byte_fallback(stages)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("▁▁", "\n\n", "<mask>")])
    return tokenizer


def cut_behind() -> tokenizers.Tokenizer:
    return trained({"pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous")})


def metaspace() -> tokenizers.Tokenizer:
    cut = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    stages = {"pre_tokenizer": cut, "decoder": decoders.Metaspace(prepend_scheme="always")}
    return trained(stages, ("<unk>", "<s>"), unk_token="<unk>")


def plain() -> tokenizers.Tokenizer:
    """No stages, unknown characters dropped, merges over the whole text."""
    return trained({})


def added() -> tokenizers.Tokenizer:
    tokenizer = qwen2()
    tokenizer.add_tokens(
        [
            AddedToken("<mask>", lstrip=True, rstrip=True, special=True, normalized=False),
            AddedToken("it", single_word=True, normalized=False),
            AddedToken("it's", rstrip=True, normalized=False),
            AddedToken("ab", lstrip=True, normalized=True),
            AddedToken("  ", normalized=False),
            AddedToken("e\u0301", single_word=True, normalized=True),
            AddedToken("1", single_word=True, lstrip=True),
            AddedToken("世", single_word=True),
        ]
    )
    return tokenizer


@pytest.mark.parametrize(
    "make", [llama3, qwen2, llama2, gemma, added], ids=lambda make: make.__name__
)
def test_json(tmp_path, make):
    make().save(str(tmp_path / "tokenizer.json"))
    check_equal(tmp_path)


VARIANTS = {
    "gpt2": gpt2,
    "gpt2 split": lambda: byte_level(GPT2),
    "tekken": lambda: byte_level(TEKKEN),
    "digits": digits,
    "prepend": llama2_normalizer,
    "metaspace": metaspace,
    "cut behind": cut_behind,
    "plain": plain,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_json_variants(tmp_path, name):
    VARIANTS[name]().save(str(tmp_path / "tokenizer.json"))
    check_equal(tmp_path, SOME)


@pytest.mark.parametrize(
    "settings",
    [
        {"add_bos_token": False},
        {"add_bos_token": True, "bos_token": {"content": "</s>"}, "add_eos_token": None},
        {"add_eos_token": True, "eos_token": "</s>"},
        {"add_bos_token": True, "bos_token": None},
        {"add_bos_token": True, "add_eos_token": True},
    ],
)
@pytest.mark.parametrize("kind", ["json", "model"])
def test_settings(tmp_path, kind, settings):
    if kind == "json":
        llama2().save(str(tmp_path / "tokenizer.json"))
    else:
        (tmp_path / "tokenizer.model").write_bytes(train_model())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = ask(tmp_path, [{"encode": "x y", "special": True}])
    assert found == [Tokenizer.load(tmp_path).encode("x y")]


# ---- what other files say -----------------------------------------------------------------------

GOLDEN = json.loads(tokenizer_cases.GOLDEN.read_text())
CASES = tokenizer_cases.make_cases()


@pytest.mark.parametrize("name", CASES)
def test_files_beside_the_vocabulary(tmp_path, name):
    """Against the package's tokenizer, which test_tokenizer.py holds against transformers."""
    tokenizer = Tokenizer.load(tokenizer_cases.write(tmp_path, CASES[name]))
    texts = tokenizer_cases.TEXTS
    ids = [tokenizer.encode(text) for text in texts]
    requests = [{"encode": text, "special": True} for text in texts]
    requests += [{"decode": each, "special": special} for each in ids for special in (False, True)]
    requests += [{"encode": text, "special": False, "parse": False} for text in texts]
    expected = ids + [tokenizer.decode(each, skip) for each in ids for skip in (True, False)]
    expected += [tokenizer.encode(text, False, False) for text in texts]
    assert ask(tmp_path, requests) == expected


# ---- tokenizer.model ----------------------------------------------------------------------------


def train_model(**options) -> bytes:
    model = io.BytesIO()
    settings = {
        "sentence_iterator": iter(TEXTS[100:4000:3]),
        "model_writer": model,
        "vocab_size": 900,
        "hard_vocab_limit": False,
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "character_coverage": 0.99,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(**{**settings, **options})
    return model.getvalue()


SYMBOLS = ["<tool>", "it's", " of", "世界"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(tmp_path, kind):
    (tmp_path / "tokenizer.model").write_bytes(train_model(model_type=kind))
    check_equal(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"remove_extra_whitespaces": True, "byte_fallback": False},
        {"add_dummy_prefix": False, "user_defined_symbols": SYMBOLS},
        {"treat_whitespace_as_suffix": True},
        {"model_type": "unigram", "byte_fallback": False, "remove_extra_whitespaces": True},
        {"model_type": "unigram", "user_defined_symbols": SYMBOLS, "unk_surface": "?"},
    ],
    ids=["spaces", "symbols", "suffix", "unigram spaces", "unigram symbols"],
)
def test_sentencepiece_variants(tmp_path, options):
    (tmp_path / "tokenizer.model").write_bytes(train_model(**options))
    check_equal(tmp_path, SOME)


def test_sentencepiece_unused_pieces(tmp_path):
    """Those that merges go through are taken apart again."""
    from sentencepiece import sentencepiece_model_pb2 as pb2

    model = pb2.ModelProto.FromString(train_model())
    for piece in model.pieces[300::3]:
        piece.type = pb2.ModelProto.SentencePiece.UNUSED
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    check_equal(tmp_path, SOME)


def test_sentencepiece_added_tokens(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_model())
    size = Tokenizer.load(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size, "[X]": size + 5}))
    decoder = {str(size + 1): {"content": "<mask>", "special": True}}
    settings = {"legacy": False, "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    check_equal(tmp_path, SOME)


# ---- GGUF ---------------------------------------------------------------------------------------

CONFIG = tiny.BASE | {"vocab_size": 1024, "hidden_size": 16, "intermediate_size": 16}


def write_gguf(folder: Path, metadata: dict) -> Path:
    weights = tiny.make_weights(CONFIG, seed=1)
    return tiny_gguf.write(folder / "m.gguf", CONFIG, weights, metadata)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_byte_level(tmp_path: Path, pre: str):
    around = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True}
    check_equal(write_gguf(tmp_path, {"tokenizer.ggml.pre": pre, **around}), SOME)


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_sentencepiece(tmp_path: Path, prefix: bool):
    """The vocabulary of a model that sentencepiece trained gives its ids."""
    from sentencepiece import sentencepiece_model_pb2 as pb2

    trained = train_model(add_dummy_prefix=prefix)
    pieces = pb2.ModelProto.FromString(trained).pieces
    source = write_gguf(
        tmp_path,
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
            "tokenizer.ggml.scores": [piece.score for piece in pieces],
            "tokenizer.ggml.token_type": [piece.type for piece in pieces],
            "tokenizer.ggml.add_space_prefix": prefix,
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.eos_token_id": None,
        },
    )
    check_equal(source, SOME)
    model = sentencepiece.SentencePieceProcessor(model_proto=trained)
    plain = [text for text in SOME if "<" not in text]
    found = ask(source, [{"encode": text, "special": False} for text in plain])
    assert found == [model.encode(text) for text in plain]
