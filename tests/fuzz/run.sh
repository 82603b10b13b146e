#!/usr/bin/env bash
# Builds the fuzz targets with clang and runs each for SECONDS from the kept corpus, two at a time.
# New inputs are kept in build/fuzz/grown/TARGET, failing ones in build/fuzz/TARGET-*.
#   tests/fuzz/run.sh [SECONDS=60] [TARGET...]
#   tests/fuzz/run.sh merge         adds the new inputs that increase coverage to the kept corpus
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD bin=$PWD/.venv/bin seconds=${1:-60}
shift || true
targets=(${@:-$(ls tests/fuzz/corpus)})
clang=$(command -v clang++-16 clang++-19 clang++ | head -1) ||
  { echo "clang++ not found: apt-get install clang-16 libclang-rt-16-dev"; exit 1; }

mkdir -p build/fuzz
"$bin/cmake" -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_CXX_COMPILER="$clang" \
  -DPython_EXECUTABLE="$bin/python" -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -gline-tables-only" \
  -DTDA_MAX_ISA=portable -DTDA_UNITY=OFF -DTDA_CUDA=OFF -DTDA_FUZZ=ON -DTDA_SANITIZE=address,undefined >build/fuzz/log
"$bin/cmake" --build build/fuzz "${targets[@]/#/--target=fuzz_}" >>build/fuzz/log || { cat build/fuzz/log; exit 1; }
cd build/fuzz

options=(-max_len=16384 -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=1024 -verbosity=0 -print_final_stats=1)
# The last two options: with their defaults they would take half the time.
export ASAN_OPTIONS=allocator_may_return_null=1:detect_stack_use_after_return=0:malloc_context_size=5
if [ "$seconds" = merge ]; then
  for target in "${targets[@]}"; do
    "./fuzz_$target" -merge=1 "${options[@]}" "$root/tests/fuzz/corpus/$target" "grown/$target"
  done
  exit
fi

run() {  # target
  mkdir -p "grown/$1"
  "./fuzz_$1" "${options[@]}" -max_total_time="$seconds" -artifact_prefix="$1-" \
    "grown/$1" "$root/tests/fuzz/corpus/$1" >"$1.log" 2>&1 || { cat "$1.log"; return 1; }
  echo "$1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$1.log") executions in $seconds s"
}
failed=0
for ((i = 0; i < ${#targets[@]}; i += 2)); do
  pids=()
  for target in "${targets[@]:i:2}"; do run "$target" & pids+=($!); done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
done
exit $failed
