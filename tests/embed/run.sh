#!/usr/bin/env bash
# Builds the README's C++ program in an empty folder, by find_package and pkg-config against the
# installed shared and static library and by add_subdirectory, and compares its text with Python's.
# From the repository's root, after `make build`, `make model` and `.venv/bin/pip install pkgconf`.
set -euo pipefail
bin=$PWD/.venv/bin
work=$PWD/build/embed
configure="$bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$bin/ninja -DPython_EXECUTABLE=$bin/python"
expected=$("$bin/python" - <<'PYTHON'
from tdaengine import TDA, Engine

engine = Engine("models/SmolLM2-135M-Instruct")
print(engine.generate("The capital of France", max_new_tokens=32, tda=TDA(error=0.1)).text)
PYTHON
)

sed -n '/^```cpp$/,/^```$/{/^```/d;p}' README.md | diff - tests/embed/main.cpp

check() {  # how, program
  found=$("$2")
  [ "$found" = "$expected" ] || { printf '%s: found %s\nexpected %s\n' "$1" "$found" "$expected"; exit 1; }
  echo "$1: the same text as Python"
}

project() {  # how, what CMakeLists.txt has in place of find_package or "", options for cmake
  rm -rf "$work/program"
  mkdir -p "$work/program"
  cp tests/embed/main.cpp "$work/program"
  sed "s|^find_package.*|${2:-&}|" tests/embed/CMakeLists.txt >"$work/program/CMakeLists.txt"
  $configure -S "$work/program" -B "$work/program/build" "${@:3}"
  "$bin/cmake" --build "$work/program/build"
  check "$1" "$work/program/build/embed"
}

installed() {  # shared or static
  prefix=$work/prefix-$1
  project "find_package, $1" "" -DCMAKE_PREFIX_PATH="$prefix"
  pc=$(find "$prefix" -name tdaengine.pc)
  flags=$("$bin/pkgconf" --cflags --libs $([ "$1" = static ] && echo --static) "$pc")
  c++ -std=c++20 tests/embed/main.cpp $flags -o "$work/pkg-config" -Wl,-rpath,"$prefix/lib"
  check "pkg-config, $1" "$work/pkg-config"
  [ "$("$bin/pkgconf" --modversion "$pc")" = "$("$bin/tdaengine" --version)" ]
}

rm -rf "$work"/prefix-*
$configure -S . -B "$work/shared" -DBUILD_SHARED_LIBS=ON
"$bin/cmake" --build "$work/shared"
"$bin/cmake" --install "$work/shared" --prefix "$work/prefix-shared"
installed shared

# Each public header compiles alone, with nothing but the prefix to include from.
for header in "$work"/prefix-shared/include/tda/*.h; do
  echo "#include <tda/$(basename "$header")>" |
    c++ -std=c++20 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -I"$work/prefix-shared/include" -x c++ -
done

project "add_subdirectory" "add_subdirectory($PWD tdaengine)" -DCMAKE_BUILD_TYPE=Release -DTDA_CUDA=OFF
"$bin/cmake" --install "$work/program/build" --prefix "$work/prefix-static"
installed static
