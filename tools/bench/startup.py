"""Measures time to first token and memory use, each in a fresh process.

    python tools/bench/startup.py MODEL [--weights int8] [--prompt-tokens 32] [--rounds 5]

Both are counted from after the import of the package. The prompt is token ids, so no tokenizer is
loaded. Finally two processes hold the model at the same time, and the script prints how much of the
file's pages each has for itself and how much they share.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ONE = """
import json, sys, time
from tdaengine import Engine

def resident(name):  # in bytes
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

model, weights, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = resident("VmRSS")
start = time.perf_counter()
engine = Engine(model, weights=weights)
loaded = time.perf_counter()
engine.session(tokens + 1).prefill([1] * tokens).argmax()
done = time.perf_counter()
maps, inside = {"Rss": 0, "Shared_Clean": 0, "Private_Clean": 0, "Private_Dirty": 0}, False
print(json.dumps({
    "load_ms": (loaded - start) * 1e3, "first_token_ms": (done - start) * 1e3,
    "weight_bytes": engine.weight_bytes, "peak_bytes": resident("VmHWM") - before,
}), flush=True)
sys.stdin.readline()
for line in open("/proc/self/smaps"):
    field, _, value = line.partition(":")
    if "-" in field.split()[0]:
        inside = line.rstrip().endswith("model.safetensors")
    elif inside and field in maps:
        maps[field] += int(value.split()[0]) * 1024
print(json.dumps(maps), flush=True)
"""


def start(arguments: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ONE, str(arguments.model), arguments.weights]
    return subprocess.Popen(
        [*command, str(arguments.prompt_tokens)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit("the model could not be run, see above")
    return json.loads(line)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    result = answer(process)
    process.communicate()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    runs = []
    for _ in range(arguments.rounds):
        process = start(arguments)
        runs.append(answer(process))
        finish(process)
    for name in ("load_ms", "first_token_ms"):
        values = sorted(run[name] for run in runs)
        print(f"{name}: {statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})")
    peak, weights = max(run["peak_bytes"] for run in runs), runs[0]["weight_bytes"]
    print(f"peak memory: {peak / 1e6:.1f} MB, {peak / weights:.3f} of the weights")
    both = [start(arguments), start(arguments)]
    for process in both:
        answer(process)
    for process in both:
        # The first process ends last, so that sharing is measured while both hold the model.
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        mapped = answer(process)
        own = mapped["Private_Clean"] + mapped["Private_Dirty"]
        print(
            f"beside another: {mapped['Rss'] / 1e6:.1f} MB of the file, "
            f"{mapped['Shared_Clean'] / 1e6:.1f} MB shared, {own / 1e6:.1f} MB of its own"
        )
    for process in both:
        process.communicate()


if __name__ == "__main__":
    main()
