#!/usr/bin/env bash
# All checks and measurements that need a GPU, in under 9 minutes, on a machine with nvcc, PyTorch, a
# GPU and no network: builds, runs the tests and compute-sanitizer on device cuda, compares with the
# CPU, measures speed, read bandwidth and peers. From the repository's root:
#   tools/bench/gpu.sh --prepare [3.12]   first, with network: wheels for that Python, build/wheels
#   tools/bench/gpu.sh [SHAPE]...         on the GPU machine; shapes of tools/random_model.py
#   tools/bench/gpu.sh --rehearse         without a GPU: the build in .venv, device cpu, tiny shapes
# Writes logs and results.md to $OUT (default build/gpu). LIMIT: the seconds it may take; BENCH:
# options for gpu.py bench.
set -uo pipefail
out=${OUT:-build/gpu}
limit=${LIMIT:-540}  # seconds in total
failed=0
device=cuda
mkdir -p "$out"

step() {  # name, seconds at most, command: its log is $out/name.log
  local name=$1 most=$2 begin=$SECONDS result=ok
  shift 2
  ((most > limit - SECONDS)) && most=$((limit - SECONDS))
  if ((most < 5)); then
    result="not run: out of time"
  else
    timeout "$most" "$@" >"$out/$name.log" 2>&1 || result="failed ($?)"
  fi
  [ "$result" = ok ] || failed=1
  echo "| $name | $result | $((SECONDS - begin)) |" | tee -a "$out/steps.md"
  [ "$result" = ok ] || tail -5 "$out/$name.log" 2>/dev/null
}

# Build and test requirements; PyTorch and NumPy are the machine's.
packages="scikit-build-core nanobind nlohmann_json cmake ninja numpy safetensors tokenizers
          sentencepiece jinja2 tqdm pytest pytest-xdist gguf protobuf"
case ${1:-} in
  --prepare)
    exec python3 -m pip download -q -d build/wheels --only-binary=:all: \
      --python-version "${2:-3.12}" $packages
    ;;
  --rehearse)
    shift
    device=cpu
    bin=.venv/bin
    tests="-k test_device_without_a_gpu"
    shapes="tiny"
    bench="--new 8 --rounds 2 --roof-gigabytes 0.05 --context 32"
    ;;
  -*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
  *)
    bin=build/gpu-venv/bin
    tests="--without-model"
    shapes="${*:-llama3.2-1b llama3-8b llama2-7b}"
    bench=${BENCH:-"--context 32 --context 1024"}
    ;;
esac
printf '| step | result | seconds |\n|---|---|---|\n' | tee "$out/steps.md"

if [ "$device" = cuda ]; then
  step driver 20 bash -c "PATH=\$PATH:/usr/local/cuda/bin; c++ --version; nvcc --version; python3 --version
    nvidia-smi"
  ((failed)) && echo "this needs a GPU; without one: tools/bench/gpu.sh --rehearse" && exit 1
  # Make python3's packages, PyTorch above all, visible in the environment; python3 may be one itself.
  step environment 60 bash -c "python3 -m venv build/gpu-venv &&
    python3 -c 'import site; print(*site.getsitepackages(), sep=\"\\n\")' \
      >\$(echo build/gpu-venv/lib/python3*/site-packages)/outer.pth &&
    $bin/pip install -q --no-index --find-links build/wheels $(echo $packages)"
  ((failed)) && exit 1
  step build 240 env PATH="$PWD/$bin:/usr/local/cuda/bin:$PATH" "$bin/pip" install -q --no-deps \
    --no-build-isolation -C build-dir=build -C cmake.define.TDA_TESTS=ON \
    -C cmake.define.TDA_EXAMPLES=ON -C cmake.define.TDA_CUDA=ON \
    -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native .
  ((failed)) && exit 1
  step suite-cpp 40 env PATH="$PWD/$bin:$PATH" TDA_DEVICE=cuda ctest --test-dir build --output-on-failure \
    -R '^engine$'
  "$bin/python" -c 'import xdist' 2>"$out/xdist.log" && tests="$tests -n 8"
fi
# None of these measures time, so they run at once.
checks=()
step suite-python 150 "$bin/python" -m pytest -q tests/python --device "$device" $tests &
checks+=($!)
for tool in memcheck racecheck synccheck initcheck; do
  sanitizer="compute-sanitizer --tool $tool --error-exitcode 1"
  [ "$device" = cuda ] || sanitizer=
  PATH="$PATH:/usr/local/cuda/bin" step "$tool" 100 $sanitizer "$bin/python" tools/bench/gpu.py \
    tiny --device "$device" &
  checks+=($!)
done
shape=smollm2-135m
[ "$device" = cuda ] || shape=tiny
step check 90 "$bin/python" tools/bench/gpu.py check "$shape" --device "$device" &
checks+=($!)
wait "${checks[@]}"
grep -q failed "$out/steps.md" && failed=1  # background jobs cannot set our variable
step bench "$limit" "$bin/python" tools/bench/gpu.py bench $shapes --device "$device" $bench \
  --seconds "$((limit - SECONDS - 30))"

{
  echo "# Device cuda, measured"
  echo
  cat "$out/bench.log"
  printf '\n## Checks\n\n'
  cat "$out/steps.md"
  printf '\n```\n'
  cat "$out/check.log"
  echo '```'
} >"$out/results.md"
echo "$out/results.md"
exit "$failed"
