"""Finds a checkpoint: a folder or GGUF file here, or a folder on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ._native import CheckpointError, OptionError

# What the engine reads; repositories often hold the weights in further formats.
NEEDED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def find(model: str | os.PathLike[str]) -> Path:
    """The checkpoint; a hub id ("owner/name") is downloaded first, once.

    Raises CheckpointError if there is no such thing.
    """
    if not isinstance(model, str | os.PathLike):
        raise OptionError(f"model: found {model!r}, expected a folder, a GGUF file or a hub id")
    path = Path(model)
    if not str(model):
        raise OptionError(f"model: found {model!r}, expected a folder, a GGUF file or a hub id")
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # too long a name, a null character
        raise CheckpointError(f"{model}: {getattr(error, 'strerror', error)}") from error
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)):
        raise CheckpointError(f"{model}: no such folder or file, nor is it a hub id (owner/name)")
    try:
        import huggingface_hub  # optional
    except ImportError as error:
        raise CheckpointError(
            f"{model}: no such folder or file; to fetch it from the hub: "
            "pip install 'tdaengine[hub]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=list(NEEDED)))
    except Exception as error:  # the hub's own, those of its HTTP library, OSError
        raise CheckpointError(
            f"{model}: no such folder or file, and not from the hub: {error}"
        ) from error
