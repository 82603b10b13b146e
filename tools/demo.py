"""A real model answers a question in int8, dense and with both scopes of TDA, side by side.

usage: demo.py MODEL_FOLDER
"""

import statistics
import sys

from tdaengine import TDA, Engine, measure_read_bandwidth

QUESTION = "Explain in three sentences why the sky is blue."
SETTINGS = {
    "dense": None,
    "TDA, each token": TDA(scope="token", active=0.3, coarse=0.5, head=1e-5),
    "TDA, one mask": TDA(scope="sequence", active=0.75, compact=True),
}
ROUNDS = 5


def main() -> None:
    engine = Engine(sys.argv[1], weights="int8")
    messages = [{"role": "user", "content": QUESTION}]
    print(f"{sys.argv[1]}: {engine.weights} on {engine.device}, {engine.threads} threads\n")
    for name, tda in SETTINGS.items():
        out = engine.chat(messages, max_new_tokens=128, tda=tda)
        print(f"[{name}] {QUESTION}\n{out.text}\n")

    # Speed by itself, always over the same number of tokens, in turn; the roof beside it.
    runs = {name: [] for name in SETTINGS}
    roofs = []
    for _ in range(ROUNDS):
        roofs.append(measure_read_bandwidth(engine.threads))
        for name, tda in SETTINGS.items():
            out = engine.chat(messages, max_new_tokens=128, ignore_eos=True, tda=tda)
            runs[name].append(out.stats)

    print(f"{'':16} {'tokens/s':>9} {'x dense':>8} {'MB/token':>9} {'read roof':>10}")
    for name, stats in runs.items():
        speeds = [s.tokens_per_second for s in stats]
        ratios = [a / b.tokens_per_second for a, b in zip(speeds, runs["dense"], strict=True)]
        shares = [
            s.tokens_per_second * s.bytes_per_token / roof
            for s, roof in zip(stats, roofs, strict=True)
        ]
        print(
            f"{name:16} {statistics.median(speeds):9.1f} {statistics.median(ratios):8.2f} "
            f"{stats[0].bytes_per_token / 1e6:9.1f} {statistics.median(shares):10.0%}"
        )
    print(
        f"\nMedians of {ROUNDS} rounds. Read roof: share of the measured memory bandwidth.\n"
        "A model this small loses much quality under one mask for all tokens: read the answers,\n"
        "and the README's tables."
    )


if __name__ == "__main__":
    main()
