"""Files that are no regular files, endless, huge, hostile, or not to be replaced."""

import errno
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from checkpoints import write_checkpoint
from conftest import MESSAGES, PROMPT

from tdaengine import CheckpointError, Engine, OptionError, Thresholds, cli
from tdaengine.convert import convert
from tdaengine.evaluate import evaluate
from tdaengine.files import MAX_JSON_DEPTH, parse_json, write
from tdaengine.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Nothing here may wait for the other end of a pipe."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    """A terabyte, without a byte on the disk."""
    with path.open("wb") as file:
        file.truncate(2**40)


def folder_there(path: Path) -> None:
    path.mkdir()


def looped(path: Path) -> None:
    path.symlink_to(path.name)


IRREGULAR = {
    pipe: "a pipe|not a regular file",
    endless: "a device|not a regular file",
    huge: "1099511627776 bytes|more than 10000000 bytes",
    folder_there: "a folder",
    looped: "Too many levels of symbolic links",
}
READ_BY_ENGINE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@pytest.mark.parametrize("name", READ_BY_ENGINE)
@pytest.mark.parametrize("make", IRREGULAR, ids=lambda make: make.__name__)
def test_checkpoints_are_regular_files(tmp_path: Path, name: str, make: Callable):
    checkpoint = write_checkpoint(tmp_path / "llama")
    path = checkpoint / name
    path.unlink(missing_ok=True)
    if name == "added_tokens.json":  # is read beside a model alone
        write_sentencepiece(checkpoint)
    if name == "tokenizer.model":
        (checkpoint / "tokenizer.json").unlink()
    make(path)
    with pytest.raises(CheckpointError, match=IRREGULAR[make]) as error:
        Engine(checkpoint, threads=1).chat(MESSAGES, max_new_tokens=2)
    assert str(error.value).startswith(f"{path}: ")


def write_sentencepiece(folder: Path) -> None:
    import sentencepiece

    (folder / "tokenizer.json").unlink()
    (folder / "corpus").write_text("The sky is blue. A few words more.\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=3,
    )


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("make", IRREGULAR, ids=lambda make: make.__name__)
def test_conversion_reads_regular_files(tmp_path: Path, name: str, make: Callable):
    checkpoint = write_checkpoint(tmp_path / "llama")
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1.safetensors")
    if name == "model.safetensors":  # its own check is of shards, one of which it may be
        name = "model-1.safetensors"
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    path = checkpoint / name
    path.unlink()
    make(path)
    with pytest.raises(CheckpointError) as error:
        convert(checkpoint, tmp_path / "new")
    assert str(checkpoint) in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("make", IRREGULAR, ids=lambda make: make.__name__)
def test_texts_are_regular_files(tmp_path: Path, capsys, folder: Path, make: Callable):
    path = tmp_path / "texts.jsonl"
    make(path)
    for command in (["calibrate", "-o", "out"], ["evaluate"]):
        code = cli.main([command[0], str(folder), *command[1:], "--data", str(path)])
        assert code == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: ")


def test_texts_beyond_the_limit(tmp_path: Path, capsys, folder: Path, monkeypatch):
    monkeypatch.setattr("tdaengine.files.MAX_DATA", 100)
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "Some text."}\n' * 5)
    arguments = ["calibrate", str(folder), "--data", str(path), "-o", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {path}: found more than 100 bytes of texts\n"


# ---- outputs ------------------------------------------------------------------------------------


def null(path: Path) -> None:
    path.symlink_to("/dev/null")


def read_only(path: Path) -> None:
    path.write_text("precious")
    path.chmod(0o444)


NO_OUTPUTS = {
    pipe: "found a pipe, expected a regular file or none",
    null: "found a device, expected a regular file or none",
    folder_there: "found a folder, expected a regular file or none",
    read_only: "found a read-only file",
    looped: "Too many levels of symbolic links",
}


@pytest.mark.parametrize("make", NO_OUTPUTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("option", ["calibrate", "evaluate", "--plot"])
def test_outputs_replace_regular_files_only(tmp_path, capsys, folder, make, option):
    data, path = tmp_path / "texts.jsonl", tmp_path / "out.png"
    data.write_text(json.dumps({"text": PROMPT * 3}))
    make(path)
    before = path.lstat()
    lengths = ["--prompt-tokens", "8", "--score-tokens", "8"]
    command = {
        "calibrate": ["calibrate", "-o"],
        "evaluate": ["evaluate", *lengths, "-o"],
        "--plot": ["analyze", *lengths, "--plot"],
    }[option]
    arguments = [command[0], str(folder), "--data", str(data), *command[1:], str(path)]
    assert cli.main(arguments) == 2
    assert f"{path}: cannot be written: {NO_OUTPUTS[make]}" in capsys.readouterr().err
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert sorted(os.listdir(tmp_path)) == ["out.png", "texts.jsonl"]


@pytest.mark.parametrize("make", [pipe, null, read_only], ids=lambda make: make.__name__)
def test_thresholds_replace_regular_files_only(tmp_path, engine: Engine, make: Callable):
    path = tmp_path / "out"
    make(path)
    mode = path.lstat().st_mode
    with pytest.raises(CheckpointError, match=f"{path}: cannot be written: found "):
        engine.calibrate([PROMPT], error=0.3).save(str(path))
    assert path.lstat().st_mode == mode
    assert os.listdir(tmp_path) == ["out"]


def test_symbolic_links_to_outputs_stay(tmp_path: Path, folder: Path, engine: Engine):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    link.symlink_to("there/target")
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": PROMPT}))
    arguments = ["calibrate", str(folder), "--error", "0.3", "--data", str(data), "-o", str(link)]
    for _ in range(2):  # first it is made, then replaced
        assert cli.main(arguments) == 0
        assert link.is_symlink()
        assert Thresholds.load(str(target)).error == 0.3
        assert os.listdir(tmp_path / "there") == ["target"]
    target.unlink()
    evaluate(engine, [PROMPT * 3], {}, prompt_tokens=8, score_tokens=8, output=link)
    assert len(target.read_text().splitlines()) == 2
    assert link.is_symlink()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to("file")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "fsync", full)
        write(link, b"new")
    assert path.read_text() == "old"
    write(link, b"new")
    assert (path.read_text(), link.is_symlink()) == ("new", True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_file_keeps_its_permissions(tmp_path: Path, engine: Engine):
    path = tmp_path / "out"
    path.touch(0o600)
    engine.calibrate([PROMPT], error=0.3).save(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Thresholds.load(str(path)).error == 0.3


# ---- hostile contents ---------------------------------------------------------------------------


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def test_depth_of_json():
    assert parse_json(deep(MAX_JSON_DEPTH)) is not None
    for levels in (MAX_JSON_DEPTH + 1, 900, 200_000):
        with pytest.raises(ValueError, match="more than 64 levels"):
            parse_json(deep(levels))


@pytest.mark.parametrize("name", READ_BY_ENGINE[:3] + READ_BY_ENGINE[4:7])
def test_deep_json(tmp_path: Path, name: str):
    checkpoint = write_checkpoint(tmp_path / "llama")
    if name == "added_tokens.json":
        write_sentencepiece(checkpoint)
    if name == "tokenizer.model":
        return
    for levels in (900, 200_000):
        (checkpoint / name).write_text(f'{{"bos_token": {deep(levels)}}}')
        with pytest.raises(CheckpointError) as error:
            Engine(checkpoint, threads=1).chat(MESSAGES, max_new_tokens=2)
        assert str(error.value).startswith(f"{checkpoint / name}: ")


def test_deep_json_in_texts_and_results(tmp_path: Path, capsys, folder: Path, engine: Engine):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": {deep(200_000)}}}')
    assert cli.main(["calibrate", str(folder), "--data", str(path), "-o", "out"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}, line 1: JSON has more than 64 ")
    path.write_text(deep(200_000) + "\n")
    with pytest.raises(OptionError, match="found something else than results of evaluate"):
        evaluate(engine, [PROMPT * 3], {}, prompt_tokens=8, score_tokens=8, output=path)


VOCABULARY = {chr(code): code - 32 for code in range(32, 127)}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(token: str) -> dict:
    pieces = [
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}


# What `tokenizers` finds in reading, or only once there is a text; by Exception or by panic.
HOSTILE = {
    "invalid regex": {"pre_tokenizer": split("(((")},
    "deep regex": {"pre_tokenizer": split("(" * 100_000 + ")" * 100_000)},
    "exploding regex": {"pre_tokenizer": split("(a+)+$")},
    "exploding normalizer": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    },
    "no unknown token": {
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
    },
    "unknown token outside": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "[UNK]"}
    },
    "id of a wrong type": {"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}},
    "merge outside": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
    "template outside": {"post_processor": template("<none>")},
    "character map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "words of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tokenizers(tmp_path: Path, case: str):
    path = tmp_path / "tokenizer.json"
    good = {"version": "1.0", "model": {"type": "BPE", "vocab": VOCABULARY, "merges": []}}
    path.write_text(json.dumps(good))
    assert len(Tokenizer.load(tmp_path).encode("aab")) == 3
    path.write_text(json.dumps(good | HOSTILE[case]))
    with pytest.raises(CheckpointError) as error:
        Tokenizer.load(tmp_path).encode("a" * 30 + "b")
    assert str(error.value).startswith(f"{path}: ")


def test_interrupts_pass_through(tmp_path: Path, folder: Path, monkeypatch):
    tokenizer = Tokenizer.load(folder)

    class Interrupted:
        def encode(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_tokenizer", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udcff"])
def test_names_that_no_file_has(name: str, folder: Path):
    with pytest.raises(CheckpointError):
        Engine(name)
    with pytest.raises(CheckpointError):
        Tokenizer.load(Path(name))


def test_a_tiny_checkpoint_is_fine(tmp_path: Path):
    """What the tests above change is what makes them fail."""
    checkpoint = tiny.write(tmp_path / "llama", "llama")
    assert Engine(checkpoint, threads=1).generate([5], max_new_tokens=2).token_ids
