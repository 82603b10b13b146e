"""A small real model answers a question: dense in int8, and with TDA, which reads 4 or 8 bits."""

import argparse
import statistics

from tdaengine import TDA, Engine, GenerationStats, measure_read_bandwidth

QUESTION = "What is the capital of France?"
SETTINGS = {"dense": ("int8", None), "TDA": ("graded", TDA())}
ROUNDS = 3
NEW_TOKENS = 64
# Of the read roof: dense decode above one share is bound by memory, below the other by computing.
# A setting that reads scattered rows can't keep up with a stream at the roof.
AT_THE_ROOF, COMPUTING = 0.75, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder or a GGUF file")
    model = parser.parse_args().model
    messages = [{"role": "user", "content": QUESTION}]
    engines = {}
    for name, (weights, tda) in SETTINGS.items():
        engine = engines[name] = Engine(model, weights=weights)
        out = engine.chat(messages, max_new_tokens=NEW_TOKENS, tda=tda)
        print(f"[{name}, {weights} weights] {QUESTION}\n{out}\n")
    print(f"{model} on {engine.device}, {engine.threads} threads:\n")

    # Speed by itself, always over the same number of tokens, in turn; the roof beside it.
    runs: dict[str, list[GenerationStats]] = {name: [] for name in SETTINGS}
    roofs = []
    for _ in range(ROUNDS):
        roofs.append(measure_read_bandwidth(engine.threads, megabytes=256))
        for name, (_, tda) in SETTINGS.items():
            out = engines[name].chat(messages, max_new_tokens=NEW_TOKENS, ignore_eos=True, tda=tda)
            runs[name].append(out.stats)
    report(runs, roofs)


def report(runs: dict[str, list[GenerationStats]], roofs: list[float]) -> None:
    shares = {}
    print(f"{'':6} {'tokens/s':>9} {'MB per token':>13} {'of the read roof':>17}")
    for name, stats in runs.items():
        speed = statistics.median(s.tokens_per_second for s in stats)
        shares[name] = statistics.median(
            s.tokens_per_second * s.bytes_per_token / roof
            for s, roof in zip(stats, roofs, strict=True)
        )
        size = stats[0].bytes_per_token / 1e6
        print(f"{name:6} {speed:9.1f} {size:13.1f} {shares[name]:17.0%}")
    ratio = statistics.median(
        tda.tokens_per_second / dense.tokens_per_second
        for dense, tda in zip(runs["dense"], runs["TDA"], strict=True)
    )
    print(f"\nTDA: {runs['TDA'][0].tda}; {ratio:.2f} times as fast as dense here.")
    print(why(ratio, shares["dense"]))


def why(ratio: float, dense_share: float) -> str:
    """One sentence on the speed."""
    share = f"dense decode reads at {dense_share:.0%} of what this memory gives"
    if ratio > 1.02:
        return f"Fewer bytes per token win; {share}."
    if dense_share < COMPUTING:
        return f"No speed is won because {share}: computing is what it waits for, not memory."
    if dense_share > AT_THE_ROOF:
        return f"No speed is won because {share}, in one stream, and scattered rows come slower."
    return f"No speed is won because {share}: it waits for computing as much as for memory."


if __name__ == "__main__":
    main()
