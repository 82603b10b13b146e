"""Converts a checkpoint to a Hugging Face folder of one file, or to an engine folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _native
from ._native import CheckpointError, OptionError
from .files import read_json_object
from .tensors import Tensor, read_safetensors, write_safetensors

# The dtype option -> the name in safetensors -> the name in config.json.
DTYPES = {"f32": "F32", "bf16": "BF16"}
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16"}

PACKED = "tdaengine"  # what config.json of an engine folder has beside the checkpoint's own keys
# What a folder may hold beside config.json and the weights and is copied as it is.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)


@dataclass
class Source:
    """A checkpoint about to be written."""

    config: dict[str, Any]
    tensors: list[Tensor]
    files: dict[str, bytes | Path]  # name -> content, or a file to copy
    dtype: str | None = None  # what "auto" stands for; None: each tensor keeps its own


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: str = "auto",
    weights: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the checkpoint `source` (a Hugging Face folder, or a GGUF file) to the new folder
    `destination`: config.json, generation_config.json, model.safetensors, the tokenizer and its
    chat template.

    dtype: "f32", "bf16", or "auto": as stored; for GGUF bf16, or f32 if it holds f32 matrices.
    weights: an engine folder instead, for tdaengine alone: the weights packed in this format (see
    Engine), which Engine maps and uses in place. Then dtype must be "auto".
    progress(done, total) counts the bytes of the weights.
    The folder appears complete or not at all. Raises CheckpointError or OptionError.
    """
    source, destination = Path(source), Path(destination)
    if dtype not in ("auto", *DTYPES):
        raise OptionError(f'dtype is "{dtype}", expected auto, {", ".join(DTYPES)}')
    _check_destination(destination)
    if weights is not None:
        if dtype != "auto":
            raise OptionError(f'dtype "{dtype}" and weights "{weights}": expected one of the two')
        _pack(source, destination, weights, progress)
        return
    if source.is_dir():
        checkpoint = _read_folder(source)
    elif source.is_file():
        from .gguf import read_gguf  # optional: needs the package gguf

        checkpoint = read_gguf(source)
    else:
        raise CheckpointError(f"{source}: not found, expected a checkpoint folder or a GGUF file")

    stored = DTYPES.get(dtype, checkpoint.dtype)
    if stored is not None:
        key = "dtype" if "dtype" in checkpoint.config else "torch_dtype"
        checkpoint.config[key] = TORCH_NAMES[stored]
    try:
        with _complete_or_absent(destination) as folder:
            write_safetensors(folder / "model.safetensors", checkpoint.tensors, stored, progress)
            checkpoint.files["config.json"] = json_bytes(checkpoint.config)
            for name, content in checkpoint.files.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, folder / name)
                else:
                    (folder / name).write_bytes(content)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written: {error}") from error


def _pack(
    source: Path, destination: Path, weights: str, progress: Callable[[int, int], None] | None
) -> None:
    try:
        with contextlib.ExitStack() as stack:
            if source.is_file():
                unpacked = Path(stack.enter_context(_temporary_folder(destination))) / "unpacked"
                convert(source, unpacked, progress=progress)
                source = unpacked
            folder = stack.enter_context(_complete_or_absent(destination))
            _native.pack_checkpoint(str(source), str(folder), weights, progress)
            for pattern in COPIED_FILES:
                for path in source.glob(pattern):
                    shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written: {error}") from error


def _temporary_folder(destination: Path) -> tempfile.TemporaryDirectory[str]:
    """Beside the destination, for it is where there is room."""
    return tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _check_destination(destination: Path) -> None:
    if not destination.parent.is_dir():
        raise OptionError(f"{destination}: {destination.parent} is not a folder, expected one")
    if destination.is_dir():
        if any(destination.iterdir()):
            raise OptionError(f"{destination}: the folder is not empty, expected a new one")
    elif destination.exists():
        raise OptionError(f"{destination}: found a file, expected a new folder")


@contextlib.contextmanager
def _complete_or_absent(destination: Path) -> Iterator[Path]:
    """A folder beside the destination that becomes the destination if all goes well and vanishes
    if not."""
    partial = destination.parent / f".{destination.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            _fsync(path)
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _fsync(destination.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_folder(folder: Path) -> Source:
    config = read_json_object(folder / "config.json")
    if PACKED in config:
        raise CheckpointError(
            f"{folder}: found an engine folder, expected a Hugging Face folder or a GGUF file"
        )
    # Buffers that some old checkpoints store; the engine computes them.
    tensors = [t for t in _read_shards(folder) if not t.name.endswith("rotary_emb.inv_freq")]
    files = {path.name: path for pattern in COPIED_FILES for path in folder.glob(pattern)}
    return Source(config, tensors, {**files})


def _read_shards(folder: Path) -> list[Tensor]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return list(read_safetensors(single))
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: no weights found, expected model.safetensors, or shards and {index.name}"
        )
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty, expected names and files")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: weight_map holds {shard!r}, expected file names without folders"
            )
    tensors = [
        tensor
        for shard in sorted(set(weight_map.values()))
        for tensor in read_safetensors(folder / shard)
    ]
    found = {tensor.name: tensor.file.name for tensor in tensors}
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            raise CheckpointError(
                f'{folder / shard}: tensor "{name}" is missing, expected here by {index}'
            )
    if len(found) != len(tensors):
        raise CheckpointError(f"{index}: a tensor is in two of its files, expected in one")
    return tensors
