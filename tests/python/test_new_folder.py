"""What convert writes: complete or not at all, by one process at a time, as its checksums say, and
from the model's own files alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from converting import refused

from tdaengine import CheckpointError, OptionError, cli, new_folder
from tdaengine.convert import convert
from tdaengine.new_folder import CHECKSUMS, verify

WAITS = """
import signal, sys, time
from tdaengine.convert import convert
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs begin with it ignored
def wait(done, total):
    print("begun", flush=True)
    time.sleep(600)
convert(sys.argv[1], sys.argv[2], weights=sys.argv[3] or None, progress=wait)
"""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(params=["", "int8"])
def writer(folder: Path, tmp_path: Path, request: pytest.FixtureRequest):
    """A process in the midst of converting to tmp_path / "out"."""
    command = [sys.executable, "-c", WAITS, folder, tmp_path / "out", request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        yield process
        process.kill()


# ---- killed, and two at a time


def test_after_a_kill_all_is_as_if_nothing_had_been(folder: Path, tmp_path: Path, writer):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not (tmp_path / "out").exists()
    assert names(tmp_path) == [".out.lock", ".out.partial"]
    convert(folder, tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert verify(tmp_path / "out") == 4


def test_two_writers(folder: Path, tmp_path: Path, writer):
    with pytest.raises(CheckpointError, match=r"out: another process is writing it"):
        convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "other")
    assert names(tmp_path) == [".out.lock", ".out.partial", "other"]
    writer.send_signal(signal.SIGINT)
    assert writer.wait() != 0
    assert names(tmp_path) == ["other"]
    convert(folder, tmp_path / "out")


def test_many_writers_at_once(folder: Path, tmp_path: Path):
    """One of them writes the folder, and nobody sees a part of it."""
    code = "import sys; from tdaengine.convert import convert; convert(*sys.argv[1:])"
    command = [sys.executable, "-c", code, folder, tmp_path / "out"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    while any(process.poll() is None for process in processes):
        if (tmp_path / "out").exists():
            assert verify(tmp_path / "out") == 4
        time.sleep(0.001)
    errors = [process.communicate()[1].decode() for process in processes]
    assert [p.returncode for p in processes].count(0) == 1
    for process, error in zip(processes, errors, strict=True):
        said = ("another process is writing it", "not empty")
        assert process.returncode == 0 or any(part in error for part in said), error
    assert names(tmp_path) == ["out"]


def test_what_lies_in_the_way(folder: Path, tmp_path: Path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "file").write_text("kept")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "private")
    convert(folder, tmp_path / "out")
    assert names(tmp_path) == ["out", "private"]
    (tmp_path / ".next.lock").symlink_to(tmp_path / "private" / "file")
    with pytest.raises(CheckpointError, match="next: cannot be written"):
        convert(folder, tmp_path / "next")
    assert (tmp_path / "private" / "file").read_text() == "kept"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="dangling: found a file"):
        convert(folder, tmp_path / "dangling")


def test_the_folder_one_is_in(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match=r"\.: cannot be written"):
        convert(folder, ".")
    assert names(tmp_path) == ["here"] and names(Path()) == []
    convert(folder, "./out")
    assert names(Path()) == ["out"]


# ---- checksums


@pytest.fixture(params=[None, "int8"])
def converted(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    convert(folder, tmp_path / "out", weights=request.param)
    return tmp_path / "out"


def test_checksums_are_those_of_sha256sum(converted: Path):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    done = subprocess.run(["sha256sum", "--strict", "-c", CHECKSUMS], cwd=converted, check=True)
    assert done.returncode == 0
    listed = [line.split("  ")[1] for line in (converted / CHECKSUMS).read_text().splitlines()]
    assert sorted([*listed, CHECKSUMS]) == names(converted)


def test_every_flipped_bit_is_found(converted: Path):
    for path in sorted(converted.iterdir()):
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 9)):
            flipped = bytearray(data)
            flipped[at] ^= 1 << at % 8
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=str(converted)):
                verify(converted)
        path.write_bytes(data)
    assert verify(converted) == 4


def test_verify_names_what_differs(converted: Path):
    (converted / "config.json").unlink()
    with (converted / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"config.json, model.safetensors is not as"):
        verify(converted)
    for line in ("", "0123  config.json\n", "../x\n"):
        (converted / CHECKSUMS).write_text(line)
        with pytest.raises(CheckpointError, match=CHECKSUMS):
            verify(converted)


def test_info_verifies(converted: Path, folder: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["info", str(converted), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified_files"] == 4
    assert cli.main(["info", str(folder), "--verify"]) == 2
    assert f"no {CHECKSUMS}, expected the one that convert writes" in capsys.readouterr().err
    with (converted / "tokenizer.json").open("r+b") as file:
        file.write(b" ")
    assert cli.main(["info", str(converted), "--verify"]) == 2
    assert "tokenizer.json is not as checksums.sha256 says" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_convert_reads_back_what_it_wrote(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """A disk that keeps something else is noticed."""
    flush = new_folder._fsync

    def forget(path: Path) -> None:
        flush(path)
        if path.name == name:
            with path.open("r+b") as file:
                file.seek(-9, os.SEEK_END)
                file.write(b"~")

    monkeypatch.setattr(new_folder, "_fsync", forget)
    parts = (f"{name} read back differs from what was written",)
    refused(folder, tmp_path / "parent", CheckpointError, *parts)


# ---- strangers' folders


@pytest.fixture
def strange(folder: Path, tmp_path: Path) -> Path:
    """A copy, and a private file beside it."""
    shutil.copytree(folder, tmp_path / "strange")
    (tmp_path / "private").write_text('{"secret": 1}')
    return tmp_path / "strange"


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "chat_template.jinja",
        "tokenizer/vocab.txt",
        "additional_chat_templates/a.jinja",
    ],
)
def test_links_to_elsewhere_are_refused(strange: Path, tmp_path: Path, name: str, weights):
    file = strange / name
    file.parent.mkdir(exist_ok=True)
    target = tmp_path / "private"
    if name == "model.safetensors":
        target = tmp_path / "weights"
        file.rename(target)
    file.unlink(missing_ok=True)
    file.symlink_to(target)
    parts = (str(file), f"leads to {target}", "of the folder's own")
    refused(strange, tmp_path / "parent", CheckpointError, *parts, weights=weights)


def test_other_ways_out_are_refused(strange: Path, tmp_path: Path):
    parent = tmp_path / "parent"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("secret")
    way = strange / "tokenizer"
    for target, part in (
        (tmp_path / "folder", "leads to"),
        (strange / "nowhere", "No such file"),
        (way, "link"),
        (strange, "found a folder"),
        (Path("/dev/zero"), "leads to /dev/zero"),
    ):
        way.symlink_to(target)
        refused(strange, parent, CheckpointError, str(way), part)
        way.unlink()
    os.mkfifo(way)
    refused(strange, parent, CheckpointError, str(way), "no regular file")
    refused(way, parent, CheckpointError, str(way), "neither a file nor a folder")
    way.unlink()
    source = tiny.write(tmp_path / "shards", "llama_sharded")
    shard = min(source.glob("*-of-*"))
    shard.rename(tmp_path / "shard")
    shard.symlink_to(tmp_path / "shard")
    for weights in (None, "int8"):
        refused(source, parent, CheckpointError, str(shard), "leads to", weights=weights)


def test_links_within_the_folder_and_to_it(strange: Path, tmp_path: Path):
    (strange / "files").mkdir()
    (strange / "tokenizer.json").rename(strange / "files" / "t")
    (strange / "tokenizer.json").symlink_to("files/t")
    (tmp_path / "link").symlink_to(strange)
    convert(tmp_path / "link", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    expected = (strange / "files" / "t").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == expected


@pytest.mark.parametrize("weights", [None, "int8"])
def test_the_hub_cache(folder: Path, tmp_path: Path, weights: str | None):
    model = tmp_path / "hub" / "models--a--b"
    snapshot = model / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, model / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    convert(snapshot, tmp_path / "out", weights=weights)
    assert verify(tmp_path / "out") == 4
    # Blobs that are somewhere else are not the model's own.
    (model / "blobs").rename(tmp_path / "blobs")
    (model / "blobs").symlink_to(tmp_path / "blobs")
    refused(snapshot, tmp_path / "parent", CheckpointError, "leads to", weights=weights)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_subfolders_of_the_tokenizer(strange: Path, tmp_path: Path, weights: str | None):
    files = {
        "tokenizer/tokenizer.json": "{}",
        "tokenizer/more/vocab.txt": "a",
        "additional_chat_templates/rag.jinja": "{{ x }}",
        "other/file": "not copied",
    }
    for name, content in files.items():
        (strange / name).parent.mkdir(parents=True, exist_ok=True)
        (strange / name).write_text(content)
    convert(strange, tmp_path / "out", weights=weights)
    del files["other/file"]
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_text() == content
    assert not (tmp_path / "out" / "other").exists()
    assert verify(tmp_path / "out") == 7
