"""Checkpoints about to be written anew, and those that lie in a folder."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ._native import Checkpoint, CheckpointError
from .files import read_json_object
from .tensors import Tensor, read_safetensors

PACKED = "tdaengine"  # what config.json of an engine folder has beside the checkpoint's own keys
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a folder may hold beside config.json and the weights and is copied as it is; folders of such
# names with all that is in them.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
)


@dataclass
class Source:
    config: dict[str, Any]
    tensors: list[Tensor]
    files: dict[str, bytes | Path]  # name, with "/" in folders -> content, or a file to copy
    dtype: str | None = None  # what "auto" stands for; None: each tensor keeps its own


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def read_folder(folder: Path) -> Source:
    """The checkpoint in a Hugging Face folder. Raises CheckpointError."""
    config = read_json_object(own_file(folder, folder / "config.json"))
    if PACKED in config:
        raise CheckpointError(
            f"{folder}: found an engine folder, expected a Hugging Face folder or a GGUF file"
        )
    quantized = config.pop("quantization_config", None) is not None
    tensors = _read_quantized(folder) if quantized else _read_shards(folder)
    # Buffers that some old checkpoints store; the engine computes them.
    tensors = [t for t in tensors if not t.name.endswith("rotary_emb.inv_freq")]
    return Source(config, tensors, {**copied_files(folder)}, "BF16" if quantized else None)


def copied_files(folder: Path) -> dict[str, Path]:
    """Name -> file of those that are copied as they are. Raises CheckpointError."""
    files = {}
    for pattern in COPIED:
        for path in sorted(folder.glob(pattern)):
            inside = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]
            for file in inside:
                if not file.is_dir() or file.is_symlink():
                    files[file.relative_to(folder).as_posix()] = own_file(folder, file)
    return files


def check_weights(folder: Path) -> None:
    """That config.json and weights are the folder's own; which are needed is not checked. Raises
    CheckpointError."""
    for pattern in ("config.json", "*.safetensors", INDEX):
        for path in folder.glob(pattern):
            own_file(folder, path)


def own_file(folder: Path, path: Path) -> Path:
    """Where the content of `path` is: in the folder's own tree or, in the Hugging Face cache, among
    the blobs of the same model. Raises CheckpointError if it is elsewhere, as a link in a folder of
    a stranger may lead to a private file, or no regular file."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path}: {error}, expected a file") from error
    top = folder.resolve()
    trees = [top]
    if top.parent.name == "snapshots":
        trees.append(top.parent.parent / "blobs")
    if not any(real.is_relative_to(tree) for tree in trees):
        raise CheckpointError(
            f"{path}: leads to {real}, expected a file of the folder's own; copy it there"
        )
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise CheckpointError(f"{path}: found {kind}, expected a regular file")
    return real


def _read_quantized(folder: Path) -> list[Tensor]:
    """As the native module's reader has them, with the weights of quantised layers."""
    check_weights(folder)
    checkpoint = Checkpoint(str(folder))
    return [
        Tensor(name, "F32", tuple(shape), Path(file), partial(checkpoint.read, name))
        for name, _, shape, file in checkpoint.tensors
    ]


def _read_shards(folder: Path) -> list[Tensor]:
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return list(_read_own(folder, WEIGHTS))
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: no weights found, expected {WEIGHTS}, or shards and {INDEX}"
        )
    weight_map = read_json_object(own_file(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty, expected names and files")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: weight_map holds {shard!r}, expected file names without folders"
            )
    shards = {shard: list(_read_own(folder, shard)) for shard in sorted(set(weight_map.values()))}
    found = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            raise CheckpointError(
                f'{folder / shard}: tensor "{name}" is missing, expected here by {index}'
            )
    tensors = [tensor for shard in shards.values() for tensor in shard]
    if len(found) != len(tensors):
        raise CheckpointError(f"{index}: a tensor is in two of its files, expected in one")
    return tensors


def _read_own(folder: Path, name: str) -> Iterator[Tensor]:
    own_file(folder, folder / name)
    return read_safetensors(folder / name)
