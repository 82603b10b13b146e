"""What the tests of convert share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tdaengine.convert import convert


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def refused(source: Path, parent: Path, error: type, *parts: str, **options) -> None:
    """convert raises the error, its message has the parts, and nothing is left behind."""
    parent.mkdir(exist_ok=True)
    before = sorted(parent.rglob("*"))
    with pytest.raises(error) as info:
        convert(source, parent / "out", **options)
    for part in parts:
        assert part in str(info.value)
    assert sorted(parent.rglob("*")) == before
