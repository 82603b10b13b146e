"""Tables of errors in Markdown, whose rows tests run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def fill_in(table: Path, parse: Callable[[str], Any], run: Callable[[Any], Any]) -> None:
    """Writes what `run` finds into the rows that do not agree with it. `parse` gives None for lines
    that are no rows."""
    lines = []
    for line in table.read_text().splitlines():
        row = parse(line)
        if row:
            found = run(row)
            row = row if row.agrees(found) else found
        lines.append(str(row) if row else line)
    table.write_text("\n".join(lines) + "\n")
