"""A real model answers a question, dense and with sequence TDA, side by side.

usage: demo.py MODEL_FOLDER
"""

import sys

from tdaengine import TDA, Engine, measure_read_bandwidth

QUESTION = "Explain in three sentences why the sky is blue."
SETTINGS = {
    "dense": None,
    "TDA error 0.1": TDA(error=0.1),
    "TDA active 0.75": TDA(active=0.75),
}


def main() -> None:
    engine = Engine(sys.argv[1])
    messages = [{"role": "user", "content": QUESTION}]
    print(f"{sys.argv[1]}: {engine.weights} on {engine.device}, {engine.threads} threads\n")
    rows = []
    for name, tda in SETTINGS.items():
        out = engine.chat(messages, max_new_tokens=128, tda=tda)
        print(f"[{name}] {QUESTION}\n{out.text}\n")
        # Speed by itself, always over the same number of tokens; the roof beside it.
        timed = engine.chat(messages, max_new_tokens=128, ignore_eos=True, tda=tda).stats
        roof = measure_read_bandwidth(engine.threads)
        share = timed.tokens_per_second * timed.bytes_per_token / roof
        rows.append((name, timed, share))

    dense = rows[0][1].tokens_per_second
    print(
        f"{'':16} {'tokens/s':>9} {'x dense':>8} {'active':>7} {'FFN bytes':>10} {'read roof':>10}"
    )
    for name, stats, share in rows:
        print(
            f"{name:16} {stats.tokens_per_second:9.1f} {stats.tokens_per_second / dense:8.2f} "
            f"{stats.ffn_active:7.0%} {stats.ffn_bytes_fraction:10.0%} {share:10.0%}"
        )
    print(
        "\nread roof: share of the memory bandwidth measured in the same minute. A model this\n"
        "small loses much quality under a prompt mask: read the answers, and the README's table."
    )


if __name__ == "__main__":
    main()
