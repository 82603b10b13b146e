"""A GGUF model on its way to a Hugging Face folder. The reader is the native module's; what its
keys and types mean, and which are refused, is said there."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from ._native import GgufModel
from .source import Source
from .tensors import Tensor


def read_gguf(path: Path) -> Source:
    """The checkpoint in a GGUF file, or in several that it is the first of. Raises
    CheckpointError."""
    model = GgufModel(str(path))
    tensors = [
        Tensor(name, "F32", tuple(shape), Path(file), partial(model.read, name))
        for name, _, shape, file in model.tensors
    ]
    full = any(kind == "F32" and len(shape) == 2 for _, kind, shape, _ in model.tensors)
    files: dict[str, bytes | Path] = {**model.tokenizer_files()}
    return Source(json.loads(model.config), tensors, files, "F32" if full else "BF16")
