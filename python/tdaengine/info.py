"""What a checkpoint holds and how it is loaded, as numbers and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._native import GgufModel, RopeConfig
from .contents import Contents
from .engine import Engine

# The sections of a description: what each line says of `info`.
ENGINE = ("weights", "weight_bytes", "kv", "max_context", "device", "threads")
MATRIX = ("matrices", "format", "layers", "bits_per_weight")


def info(engine: Engine) -> dict[str, Any]:
    names = ("fingerprint", "parameters", *ENGINE)
    return {
        "path": str(engine.path),
        **{name: getattr(engine, name) for name in names},
        "bits_per_weight": 8 * engine.weight_bytes / engine.parameters,
        "calibration_tokens": _calibration_tokens(engine.path),
        "matrices": [dict(zip(MATRIX, each, strict=True)) for each in engine.matrices],
        "config": fields_of(engine.config),
        "files": file_sizes(engine.path),
    }


def _calibration_tokens(checkpoint: Path) -> int | None:
    """Of the texts that convert rounded an engine folder's weights by."""
    packed = Contents.of(checkpoint).json_object("config.json").get("tdaengine", {})
    tokens: int | None = packed.get("calibration_tokens")
    return tokens


def describe(values: Mapping[str, Any]) -> str:
    """`info` in sections of aligned lines."""
    config = {**values["config"], "sliding_window": window(values["config"]["sliding_window"])}
    others = [str(i) for i, other in enumerate(config.pop("uses_other_rope")) if other]
    other = config.pop("other_rope")
    config["rope"] = _rope(config.pop("rope"))
    if other is not None:
        config["other_rope"] = f"{_rope(other)}, in layers {', '.join(others)}"
    sections = {
        "model": {name: values[name] for name in ("path", "fingerprint", "parameters")},
        "engine": {name: values[name] for name in ENGINE},
        "weights": _matrices(values),
        "architecture": config,
        "files": {name: f"{size:,} bytes" for name, size in values["files"].items()},
    }
    lines = []
    for title, section in sections.items():
        lines += ["", title]
        lines += [f"  {name:24} {_shown(value)}" for name, value in section.items()]
    return "\n".join(lines[1:])


def _matrices(values: Mapping[str, Any]) -> dict[str, str]:
    """A line for each kind of matrix, whatever types it has in different layers."""
    lines: dict[str, list[str]] = {}
    for each in values["matrices"]:
        text = f"{each['format']}, {each['bits_per_weight']:.2f} bits per weight"
        if sum(other["matrices"] == each["matrices"] for other in values["matrices"]) > 1:
            text += f" in {each['layers']} layers"
        lines.setdefault(each["matrices"], []).append(text)
    if tokens := values["calibration_tokens"]:
        lines["rounded by"] = [f"{tokens:,} tokens of text"]
    total = f"{values['bits_per_weight']:.2f} bits per weight"
    return {name: "; ".join(texts) for name, texts in lines.items()} | {"all": total}


def window(layers: Sequence[int]) -> str:
    """The sliding window of every layer in one phrase; 0 is full attention."""
    sizes = sorted(set(layers))
    if sizes == [0]:
        return "none"
    if len(sizes) == 1:
        return f"{sizes[0]:,} tokens"
    phrases = []
    for size in sizes:
        which = [str(i) for i, each in enumerate(layers) if each == size]
        name = f"{size:,} tokens" if size else "none"
        phrases.append(f"{name} in layers {', '.join(which)}")
    return "; ".join(phrases)


def _rope(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) else f"{value}"


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Name -> bytes, of a folder's files or of those of a GGUF model."""
    if checkpoint.is_dir():
        paths = sorted(path for path in checkpoint.iterdir() if path.is_file())
    else:
        paths = [Path(file) for file in GgufModel(str(checkpoint)).files]
    return {path.name: path.stat().st_size for path in paths}


def fields_of(value: Any) -> dict[str, Any]:
    """The properties of an object of the native module, and of those inside it."""
    names = [name for name, kind in vars(type(value)).items() if isinstance(kind, property)]
    fields = {name: getattr(value, name) for name in names}
    return {name: fields_of(v) if isinstance(v, RopeConfig) else v for name, v in fields.items()}
