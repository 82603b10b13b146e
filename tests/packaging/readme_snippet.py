"""Prints the first Python example of README.md, which tests/packaging/run.sh runs unchanged."""

import re
from pathlib import Path

readme = Path(__file__).parents[2] / "README.md"
(snippet,) = re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
print(snippet, end="")
