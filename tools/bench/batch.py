"""Tokens per second of several sequences decoded together, beside one alone and beside llama.cpp.

Rounds are interleaved: each measures every number of sequences once, of ours and, with --llama, of
llama.cpp (the package llama_cpp) on a GGUF file. Round 0 warms up. A sequence has a prompt of its
own; what is timed is decoding all but the first token of all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tdaengine import Engine, GenerateOptions
from tdaengine.options import parse_tda

KEPT = []  # callbacks that llama.cpp calls to the end


def ours(engine: Engine, setting: str | None, prompt: int, new: int) -> Callable[[int], float]:
    tda = parse_tda(setting) if setting else None
    options = GenerateOptions(max_new_tokens=new, ignore_eos=True)

    def tokens_per_second(sequences: int) -> float:
        generations = [engine.start(ids(k, prompt), options, tda) for k in range(sequences)]

        def finish(generation: object) -> None:
            while generation.next() is not None:
                pass

        with ThreadPoolExecutor(sequences) as threads:
            list(threads.map(lambda generation: generation.next(), generations))
            start = time.perf_counter()
            list(threads.map(finish, generations))
            return sequences * (new - 1) / (time.perf_counter() - start)

    return tokens_per_second


def llama(path: str, threads: int, prompt: int, new: int, most: int) -> Callable[[int], float]:
    import llama_cpp

    @llama_cpp.llama_log_callback
    def silent(*_: object) -> None: ...

    KEPT.append(silent)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model_options = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = (prompt + new) * most
    options.n_batch = options.n_ubatch = 512
    options.n_seq_max = most
    options.kv_unified = True
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """rows: token, position, sequence, whether logits are wanted; the likeliest next tokens."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = is_wanted
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        chosen = [
            int(
                np.argmax(
                    np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (size,))
                )
            )
            for i, row in enumerate(rows)
            if row[3]
        ]
        llama_cpp.llama_batch_free(batch)
        return chosen

    def tokens_per_second(sequences: int) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        last = []
        for k in range(sequences):
            tokens = ids(k, prompt)
            rows = [(token, i, k, i + 1 == prompt) for i, token in enumerate(tokens)]
            last += decode(rows)
        start = time.perf_counter()
        for step in range(new - 1):
            last = decode([(token, prompt + step, k, True) for k, token in enumerate(last)])
        return sequences * (new - 1) / (time.perf_counter() - start)

    return tokens_per_second


def ids(sequence: int, count: int) -> list[int]:
    return [1000 + sequence + i for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tda", action="append", default=[], help="also with this setting")
    parser.add_argument("--llama", help="a GGUF file of the same format, for llama.cpp")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    engine = Engine(args.model, weights=args.weights, threads=args.threads)
    runs = {"dense": ours(engine, None, args.prompt, args.new)}
    runs |= {setting: ours(engine, setting, args.prompt, args.new) for setting in args.tda}
    if args.llama:
        most = max(args.sequences)
        runs["llama.cpp"] = llama(args.llama, args.threads, args.prompt, args.new, most)
    speeds: dict[tuple[str, int], list[float]] = {}
    for round_ in range(args.rounds + 1):
        for count in args.sequences:
            for name, run in runs.items():
                speed = run(count)
                if round_ > 0:
                    speeds.setdefault((name, count), []).append(speed)

    print(f"{engine.weights}, {engine.device}, {engine.threads} threads; tokens/s, medians of")
    print(f"{args.rounds} rounds, and times that of one sequence\n")
    print(f"| sequences | {' | '.join(runs)} |")
    print(f"|---{'|---' * len(runs)}|")
    for count in args.sequences:
        cells = []
        for name in runs:
            speed = statistics.median(speeds[name, count])
            times = speed / statistics.median(speeds[name, args.sequences[0]])
            cells.append(f"{speed:.0f} ({times:.2f})")
        print(f"| {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
