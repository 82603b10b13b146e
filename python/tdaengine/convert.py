"""Converts a checkpoint to a Hugging Face folder of one file, or to an engine folder."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import _native
from ._native import CheckpointError, OptionError
from .gguf import read_gguf
from .new_folder import check_destination, publish, working_folder
from .source import WEIGHTS, Source, check_weights, copied_files, json_bytes, read_folder
from .tensors import write_safetensors
from .tokenizer import Tokenizer

Progress = Callable[[int, int], None]

# The dtype option -> the name in safetensors -> the name in config.json.
DTYPES = {"f32": "F32", "bf16": "BF16"}
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16"}


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: str = "auto",
    weights: str | None = None,
    progress: Progress | None = None,
    *,
    texts: Sequence[str] | None = None,
) -> None:
    """Writes the checkpoint `source` (a Hugging Face folder, or a GGUF file, of several the first)
    to the new folder `destination`: config.json, generation_config.json, model.safetensors, the
    tokenizer and its chat template, and checksums.sha256, which `tdaengine info --verify` checks.

    dtype: "f32", "bf16", or "auto": as stored; for GGUF bf16, or f32 if it holds f32 matrices.
    weights: an engine folder instead, for tdaengine alone: the weights packed in this format (see
    Engine), which Engine maps and uses in place. Then dtype must be "auto".
    texts: for weights "int4", texts like those the model will see: weights of 16 bits or more are
    rounded so that its products on these texts change least. Some 10,000 tokens are enough; their
    order and ends do not matter. It takes minutes.
    progress(done, total) counts the bytes of the weights.
    The folder appears complete or not at all, and all of it is read back before. Raises
    CheckpointError or OptionError.
    """
    source, destination = Path(source), Path(destination)
    if dtype not in ("auto", *DTYPES):
        raise OptionError(f'dtype is "{dtype}", expected auto, {", ".join(DTYPES)}')
    if weights is not None and dtype != "auto":
        raise OptionError(f'dtype "{dtype}" and weights "{weights}": expected one of the two')
    if texts is not None:
        if weights != "int4":
            raise OptionError(f"texts: found weights {weights!r}, expected 'int4'")
        if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) == 0:
            raise OptionError(f"texts: found {texts!r}, expected a list of texts, or None")
    check_destination(destination)
    try:
        with working_folder(destination) as work:
            folder = work / "complete"
            if weights is None:
                sums = _write(_read(source), folder, DTYPES.get(dtype), progress)
            else:
                sums = _pack(source, folder, weights, texts, progress)
            publish(folder, destination, sums)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written: {error}") from error


def _read(source: Path) -> Source:
    if source.is_dir():
        return read_folder(source)
    if source.is_file():
        return read_gguf(source)
    found = "neither a file nor a folder" if source.exists() else "not found"
    raise CheckpointError(f"{source}: {found}, expected a checkpoint folder or a GGUF file")


def _write(
    checkpoint: Source, folder: Path, dtype: str | None, progress: Progress | None
) -> dict[str, str]:
    """Returns the checksums of what is written, by name."""
    folder.mkdir()
    stored = dtype or checkpoint.dtype
    if stored is not None:
        key = "dtype" if "dtype" in checkpoint.config else "torch_dtype"
        checkpoint.config[key] = TORCH_NAMES[stored]
    sums = {
        WEIGHTS: write_safetensors(folder / WEIGHTS, checkpoint.tensors, stored, progress),
    }
    files = checkpoint.files | {"config.json": json_bytes(checkpoint.config)}
    return sums | {name: _write_file(folder / name, content) for name, content in files.items()}


def _pack(
    source: Path,
    folder: Path,
    weights: str,
    texts: Sequence[str] | None,
    progress: Progress | None,
) -> dict[str, str]:
    files: dict[str, Any] = {}
    if source.is_dir():
        check_weights(source)
        files |= copied_files(source)
    else:
        files |= _native.GgufModel(str(source)).tokenizer_files()
    ids = [] if texts is None else _encoded(Tokenizer.load(source), texts)
    folder.mkdir()
    for notice in _native.pack_checkpoint(str(source), str(folder), weights, progress, ids):
        warnings.warn(notice, stacklevel=3)
    return {name: _write_file(folder / name, content) for name, content in files.items()}


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    encoded = [ids for ids in map(tokenizer.encode, texts) if ids]
    if not encoded:
        raise OptionError("texts: found no tokens in them")
    return encoded


def _write_file(path: Path, content: bytes | Path) -> str:
    data = content.read_bytes() if isinstance(content, Path) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
