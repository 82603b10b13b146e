"""Folders whose tokenizer files agree, disagree or are silent in many ways.

tests/golden/tokenizer_files.json holds what `AutoTokenizer` of transformers 5.24 makes of each:
tests/live/test_live_tokenizer.py, run as a program, writes it.
"""

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer_files.json"
TEXTS = ["dog <end> dog", "dog<end>dog  <end>", "dog</s>dog", "<s> <w>x<w> x</s>", " dog"]
PIECES = ["▁", *map(chr, range(33, 127)), "do", "dog", "▁dog"]
SIZE = 3 + 256 + len(PIECES)  # the id of the first token that is added


def token(content: str, **flags: bool) -> dict:
    names = ("lstrip", "rstrip", "single_word", "normalized")
    return {"content": content, **dict.fromkeys(names, False), "special": True, **flags}


def json_file() -> dict:
    """In the shape of Llama 2's, with <end> as an added token that is not special, and <s> before
    every text."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    merges = [("d", "o"), ("do", "g"), ("▁", "dog")]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(tokenizer.to_str())


def json_file_with_end() -> dict:
    tokenizer = Tokenizer.from_str(json.dumps(json_file()))
    tokenizer.add_tokens([AddedToken("<end>", normalized=False)])
    return json.loads(tokenizer.to_str())


def model_file() -> bytes:
    model = pb2.ModelProto()
    kinds = pb2.ModelProto.SentencePiece
    for name, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=name, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=kinds.BYTE)
    for rank, piece in enumerate(PIECES):
        model.pieces.add(piece=piece, score=-float(rank))
    model.trainer_spec.model_type = pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


END, W = str(SIZE), str(SIZE + 1)
# tokenizer_config.json, and the other files.
COMPANIONS: dict[str, tuple[dict, dict]] = {
    "nothing": ({}, {}),
    "declared": ({"added_tokens_decoder": {END: token("<end>")}}, {}),
    "declared, flags": (
        {
            "added_tokens_decoder": {
                END: token("<end>", lstrip=True, rstrip=True),
                W: token("<w>", single_word=True, normalized=True, special=False),
            }
        },
        {},
    ),
    "declared, rstrip": ({"added_tokens_decoder": {END: token("<end>", rstrip=True)}}, {}),
    "added_tokens.json": ({}, {"added_tokens.json": {"<end>": SIZE, "<w>": SIZE + 1}}),
    "added_tokens.json, role": (
        {"pad_token": "<w>"},
        {"added_tokens.json": {"<end>": SIZE, "<w>": SIZE + 1}},
    ),
    "only declared": (
        {"added_tokens_decoder": {}},
        {"added_tokens.json": {"<end>": SIZE}, "special_tokens_map.json": {"pad_token": "<end>"}},
    ),
    "pad_token": ({"pad_token": "<end>"}, {}),
    "map": ({}, {"special_tokens_map.json": {"pad_token": token("<end>", lstrip=True)}}),
    "map against config": (
        {"pad_token": "<w>"},
        {"special_tokens_map.json": {"pad_token": "<end>"}},
    ),
    "extra list": ({"extra_special_tokens": ["<w>", "<end>"]}, {}),
    "extra dict": ({"extra_special_tokens": {"z_token": "<end>", "a_token": "<w>"}}, {}),
    "additional": ({"additional_special_tokens": ["<w>", "<end>"]}, {}),
    "additional and extra": (
        {"additional_special_tokens": ["<w>"], "extra_special_tokens": ["<end>"]},
        {},
    ),
    "other roles": ({"z_token": "<end>", "image_token": "<w>"}, {}),
    "eos_token": ({"eos_token": "<end>"}, {}),
    "eos_token, map": ({}, {"special_tokens_map.json": {"eos_token": "<end>"}}),
    "eos_token, declared": (
        {"eos_token": "<end>", "added_tokens_decoder": {END: token("<end>", special=False)}},
        {},
    ),
    "eos_token of the vocabulary": ({"eos_token": "dog"}, {}),
    "no longer special": ({"added_tokens_decoder": {"2": token("</s>", special=False)}}, {}),
    "split_special_tokens": ({"split_special_tokens": True, "pad_token": "<end>"}, {}),
    "empty": (
        {
            "added_tokens_decoder": {END: token("")},
            "pad_token": "",
            "extra_special_tokens": [""],
        },
        {},
    ),
}
AROUND = {
    "add_eos_token false": {"add_eos_token": False},
    "add_eos_token true": {"add_eos_token": True},
    "add_bos_token false": {"add_bos_token": False},
    "add_bos_token, another": {"add_bos_token": True, "bos_token": "</s>"},
    "legacy": {"legacy": True},
    "not legacy": {"legacy": False},
    "no prefix space": {"add_prefix_space": False},
}
CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast")


def make_cases() -> dict[str, dict]:
    """Name -> file name -> content."""
    cases: dict[str, dict] = {}

    def add(name: str, kind: str, content: object, config: dict, more: dict, model: str) -> None:
        cases[name] = {
            f"tokenizer.{kind}": content,
            "config.json": {"model_type": model},
            "tokenizer_config.json": config,
            **more,
        }

    for class_name in CLASSES[:2]:
        for name, (config, more) in COMPANIONS.items():
            config = {"tokenizer_class": class_name, **config}
            add(f"json, {class_name}, {name}", "json", json_file(), config, more, "llama")
            with_end = json_file_with_end()
            add(f"json with <end>, {class_name}, {name}", "json", with_end, config, more, "llama")
            # transformers leaves <s> out of a tokenizer.model unless it is told to write it.
            config = {"add_bos_token": True, **config}
            add(f"model, {class_name}, {name}", "model", model_file(), config, more, "llama")
    for class_name in CLASSES:
        for name, config in AROUND.items():
            config = {"tokenizer_class": class_name, **config}
            add(f"json, {class_name}, {name}", "json", json_file(), config, {}, "llama")
            config = {"add_bos_token": True, **config}
            add(f"model, {class_name}, {name}", "model", model_file(), config, {}, "llama")
    # Mistral's tokenizers take tokenizer.json as it is, whatever class it names.
    config = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<end>"}
    add("json, mistral", "json", json_file(), config, {}, "mistral")
    return cases


def write(folder: Path, files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    return folder
