"""Decode and prefill speed beside peers, interleaved in one run, with the memory read roof.

usage: compare.py MODEL_FOLDER [--threads N] [--rounds N]

Every round measures the roof, tdaengine and every peer that is installed, one after the other; what
is printed are medians over the rounds, and for ratios the median of the rounds' ratios.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

PROMPT, NEW = 128, 64
Measure = Callable[[], tuple[float, float]]  # -> prefill tokens/s, decode tokens/s


def tdaengine_runner(folder: str, threads: int, weights: str) -> Measure:
    from tdaengine import Engine

    engine = Engine(folder, threads=threads, weights=weights)
    prompt = prompt_ids(engine.config.vocab_size)

    def measure() -> tuple[float, float]:
        stats = engine.generate(prompt, max_new_tokens=NEW, ignore_eos=True).stats
        measure.bytes_per_token = stats.bytes_per_token  # the roof's share is computed from it
        return PROMPT / stats.prefill_seconds, stats.tokens_per_second

    return measure


def transformers_runner(folder: str, threads: int, weights: str) -> Measure:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[weights]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    prompt = torch.tensor([prompt_ids(model.config.vocab_size)])

    @torch.inference_mode()
    def measure() -> tuple[float, float]:
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(NEW):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return PROMPT / prefill, NEW / (time.perf_counter() - start)

    return measure


def prompt_ids(vocab_size: int) -> list[int]:
    return [(37 * i) % min(vocab_size, 20000) + 100 for i in range(PROMPT)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--weights", default="bf16", help="f32 or bf16")
    args = parser.parse_args()

    from tdaengine import measure_read_bandwidth

    runners = {"tdaengine": tdaengine_runner(args.model, args.threads, args.weights)}
    try:
        runners["transformers"] = transformers_runner(args.model, args.threads, args.weights)
    except ImportError as error:
        print(f"transformers: not installed ({error.name})")
    roofs, measured = [], {name: [] for name in runners}
    for _ in range(args.rounds + 1):  # the first one warms up
        roofs.append(measure_read_bandwidth(args.threads))
        for name, measure in runners.items():
            measured[name].append(measure())
    median = statistics.median
    ours = measured["tdaengine"][1:]
    print(f"{args.weights}, {args.threads} threads, {PROMPT} prompt + {NEW} new tokens")
    low, middle, high = (f(roofs[1:]) / 1e9 for f in (min, median, max))
    print(f"read roof {middle:.1f} GB/s ({low:.1f} to {high:.1f})")
    print(
        "| engine | prefill tokens/s | decode tokens/s | tdaengine is faster by: prefill, decode |"
    )
    print("|---|---|---|---|")
    for name, rounds in measured.items():
        rounds = rounds[1:]
        faster = [median(o[i] / r[i] for o, r in zip(ours, rounds, strict=True)) for i in (0, 1)]
        prefill, decode = (median(r[i] for r in rounds) for i in (0, 1))
        print(f"| {name} | {prefill:.0f} | {decode:.1f} | {faster[0]:.2f}, {faster[1]:.2f} |")
    size = runners["tdaengine"].bytes_per_token
    share = median(o[1] * size / roof for o, roof in zip(ours, roofs[1:], strict=True))
    print(f"tdaengine reads {size / 1e6:.1f} MB per decoded token: {share:.0%} of the read roof")


if __name__ == "__main__":
    main()
