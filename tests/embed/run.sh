#!/usr/bin/env bash
# Builds the README's C++ program in an empty folder with find_package and with pkg-config, against
# the installed shared and static library, and with add_subdirectory, and compares its text with
# Python's. Per library it also does so for the same program with ids instead of text.
# TDA_MAX_ISA: as the CMake option, for quicker builds.
# From the repository's root, after `make build`, `make model` and `.venv/bin/pip install pkgconf`.
set -euo pipefail
bin=$PWD/.venv/bin
work=$PWD/build/embed
configure="$bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$bin/ninja -DPython_EXECUTABLE=$bin/python -DTDA_MAX_ISA=${TDA_MAX_ISA:-}"
{ read -r expected_ids; expected=$(cat); } < <("$bin/python" - <<'PYTHON'
from tdaengine import TDA, Engine

engine = Engine("models/SmolLM2-135M-Instruct", weights="graded")
out = engine.generate("One, two, three, four,", max_new_tokens=7, tda=TDA())
print(*out.token_ids)
print(out.text)
PYTHON
)
ids='s/text\.push(token)/token << " "/; s/text\.flush()/""/'

sed -n '/^```cpp$/,/^```$/{/^```/d;p}' README.md | diff - tests/embed/main.cpp

check() {  # how, program, what, Python's result
  found=$("$2" | sed 's/ *$//')
  [ "$found" = "$4" ] || { printf '%s: found %s\nexpected %s\n' "$1" "$found" "$4"; exit 1; }
  echo "$1: the same $3 as Python"
}

project() {  # how, what replaces find_package in CMakeLists.txt or "", options for cmake
  rm -rf "$work/program"
  mkdir -p "$work/program"
  cp tests/embed/main.cpp "$work/program"
  sed "s|^find_package.*|${2:-&}|" tests/embed/CMakeLists.txt >"$work/program/CMakeLists.txt"
  $configure -S "$work/program" -B "$work/program/build" "${@:3}"
  "$bin/cmake" --build "$work/program/build"
  check "$1" "$work/program/build/embed" text "$expected"
}

installed() {  # shared or static
  prefix=$work/prefix-$1
  project "find_package, $1" "" -DCMAKE_PREFIX_PATH="$prefix"
  pc=$(find "$prefix" -name tdaengine.pc)
  flags=$("$bin/pkgconf" --cflags --libs $([ "$1" = static ] && echo --static) "$pc")
  for what in text ids; do
    sed "$([ $what = text ] || echo "$ids")" tests/embed/main.cpp |
      c++ -std=c++20 -x c++ - -x none $flags -o "$work/$what" -Wl,-rpath,"$prefix/lib"
  done
  check "pkg-config, $1" "$work/text" text "$expected"
  check "pkg-config, $1" "$work/ids" ids "$expected_ids"
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
