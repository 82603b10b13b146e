#!/usr/bin/env bash
# Builds the sdist and from it the wheel, checks their contents against git's list of files, installs
# the wheel in an empty environment, and runs the README's Python example and mypy --strict there.
# Needs the demo model. TDA_MAX_ISA: as the CMake option, for a quicker build.
set -euo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
bin=$place/venv/bin
"$bin/pip" install -q --disable-pip-version-check build

"$bin/python" -m build -C cmake.define.TDA_CUDA=OFF -C "cmake.define.TDA_MAX_ISA=${TDA_MAX_ISA:-}" --outdir "$place/dist" "$source"
tar -tf "$place"/dist/*.tar.gz | sed 's,^[^/]*/,,' | sort >"$place/sdist"
(cd "$source" && git ls-files CMakeLists.txt LICENSE README.md pyproject.toml cpp cuda python &&
  echo PKG-INFO) | sort | diff - "$place/sdist"
python3 -m zipfile -l "$place"/dist/*.whl | awk 'NR > 1 { print $1 }' | grep -v dist-info/ | sort >"$place/wheel"
(cd "$source/python" && git ls-files tdaengine && echo tdaengine/_native.pyi) | sort |
  diff - <(grep -v '\.so$' "$place/wheel")

"$bin/pip" install -q --disable-pip-version-check "$place"/dist/*.whl
mkdir "$place/user"
cd "$place/user"
ln -s "$source/models" models
python3 "$source/tests/packaging/readme_snippet.py" >snippet.py
"$bin/python" snippet.py | tee said
grep -q 'capital of Japan is Tokyo' said
grep -q 'six, seven, eight' said
"$bin/tdaengine" info models/SmolLM2-135M-Instruct
"$bin/python" "$source/tests/typing/sample.py" models/SmolLM2-135M-Instruct

"$bin/pip" install -q --disable-pip-version-check mypy types-tqdm "$(echo "$place"/dist/*.whl)[plot,server]"
"$bin/mypy" --strict "$source/tests/typing/sample.py"
"$bin/mypy" --strict -p tdaengine
