#!/usr/bin/env bash
# Installs the library (static, then shared), builds a program against each from an empty folder and
# compares its tokens with Python's. From the repository's root, after `make build` and `make model`.
set -euo pipefail
bin=$PWD/.venv/bin
model=$PWD/models/SmolLM2-135M-Instruct
work=$PWD/build/embed
prompt="504 3575 282 4649 314"
configure="$bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$bin/ninja -DPython_EXECUTABLE=$bin/python"
expected=$("$bin/python" - "$model" $prompt <<'PYTHON'
import sys
from tdaengine import Engine

prompt = [int(token) for token in sys.argv[2:]]
print(*Engine(sys.argv[1]).generate(prompt, max_new_tokens=16).token_ids)
PYTHON
)
for shared in ${1:-OFF ON}; do
  rm -rf "$work/prefix" "$work/program"
  $configure -S . -B "$work/$shared" -DBUILD_SHARED_LIBS="$shared" -DCMAKE_INSTALL_PREFIX="$work/prefix"
  "$bin/cmake" --build "$work/$shared" -j2
  "$bin/cmake" --install "$work/$shared"
  $configure -S tests/embed -B "$work/program" -DCMAKE_PREFIX_PATH="$work/prefix"
  "$bin/cmake" --build "$work/program"
  found=$("$work/program/embed" "$model" $prompt)
  [ "${found% }" = "$expected" ] || { echo "shared=$shared: found $found, expected $expected"; exit 1; }
  echo "shared=$shared: the same tokens as Python: $expected"
done
