"""Prints the Python examples of README.md, which tests/packaging/run.sh runs as they stand."""

import re
from pathlib import Path

readme = Path(__file__).parents[2] / "README.md"
examples = re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
print(*examples, sep="\n", end="")
