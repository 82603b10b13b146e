#!/usr/bin/env bash
# Line coverage of cpp/checkpoint, and of the file and JSON code under it, by its C++ tests and the
# kept corpus: prints a table and the lines missed, and fails below 95 per cent.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$PWD/.venv/bin build=build/coverage
tests=(test_{checkpoint,config,ggml_types,gguf,load,pack,thresholds} $(ls tests/fuzz/corpus | sed 's/^/fuzz_/'))

mkdir -p $build
"$bin/cmake" -S . -B $build -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DPython_EXECUTABLE="$bin/python" \
  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O0 --coverage" -DTDA_MAX_ISA=portable -DTDA_UNITY=OFF -DTDA_CUDA=OFF -DTDA_TESTS=ON >$build/log
"$bin/cmake" --build $build "${tests[@]/#/--target=}" >>$build/log || { cat $build/log; exit 1; }
find $build -name '*.gcda' -delete
"$bin/ctest" --test-dir $build -R '^(checkpoint|config|ggml_types|gguf|load|pack|thresholds|fuzz_.*)$' >>$build/log ||
  { cat $build/log; exit 1; }

# A line of a header counts as covered if any source file covers it.
gcov -t -r -s "$PWD" $build/CMakeFiles/tdaengine.dir/cpp/{base,checkpoint}/*.gcda 2>/dev/null | awk -F: '
  $2 + 0 == 0 && $3 == "Source" { file = $4 }
  file ~ /^cpp\/(checkpoint\/|base\/(file|atomic_file|json|size))/ && $2 + 0 > 0 && $1 !~ /-$/ {
    key = file ":" $2 + 0
    if (!(key in run)) { run[key] = 0; lines[file]++ }
    if ($1 !~ /#|=/ && !run[key]) { run[key] = 1; good[file]++ }
  }
  END {
    for (file in lines) {
      printf "%-32s %4d of %4d lines  %5.1f%%\n", file, good[file], lines[file], 100 * good[file] / lines[file] | "sort"
      all += lines[file]; allgood += good[file]
    }
    close("sort")
    printf "%-32s %4d of %4d lines  %5.1f%%\n", "all", allgood, all, 100 * allgood / all
    for (key in run) if (!run[key]) print "not run: " key | "sort -t: -k2,2 -k3,3n"
    close("sort -t: -k2,2 -k3,3n")
    exit all == 0 || allgood < 0.95 * all
  }'
