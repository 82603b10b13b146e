#!/usr/bin/env bash
# Builds a program against the library from an empty folder and compares its tokens with Python's.
# usage: run.sh [KIND]..., of static and shared (installed first) and source (by add_subdirectory).
# From the repository's root, after `make build` and `make model`.
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
for kind in ${@:-static shared source}; do
  rm -rf "$work/prefix" "$work/program"
  if [ "$kind" = source ]; then
    where=-DTDA_SOURCE=$PWD
  else
    where=-DCMAKE_PREFIX_PATH=$work/prefix
    shared=$([ "$kind" = shared ] && echo ON || echo OFF)
    $configure -S . -B "$work/$kind" -DBUILD_SHARED_LIBS="$shared" -DCMAKE_INSTALL_PREFIX="$work/prefix"
    "$bin/cmake" --build "$work/$kind"
    "$bin/cmake" --install "$work/$kind"
  fi
  $configure -S tests/embed -B "$work/program" "$where"
  "$bin/cmake" --build "$work/program"
  found=$("$work/program/embed" "$model" $prompt)
  [ "${found% }" = "$expected" ] || { echo "$kind: found $found, expected $expected"; exit 1; }
  echo "$kind: the same tokens as Python: $expected"
done
