"""Seconds to the first token of each turn of a chat, with and without a prefix cache.

Rounds are interleaved, and each is a conversation of its own: at every turn both prefill the same
prompt, and what they generate is checked to be the same.
"""

from __future__ import annotations

import argparse
import statistics
import time

from tdaengine import Engine, GenerateOptions, PrefixCache
from tdaengine.options import parse_tda

QUESTIONS = [
    "Explain in a few sentences how a steam engine works.",
    "Who made the first one, and what was it used for?",
    "Why did later ones need so much less coal?",
    "What did that change for people who lived in towns?",
    "And for those who lived in the country?",
    "Compare that with what electricity did a hundred years later.",
    "Which of the two mattered more, and why?",
    "Write a short poem about it.",
    "Now the same without rhymes.",
    "Sum up all we have said in three sentences.",
]


def answer(engine: Engine, prompt: list[int], options: GenerateOptions, tda) -> tuple[list, float]:
    """Token ids, and seconds to the first of them."""
    start = time.perf_counter()
    first = 0.0
    for _ in (stream := engine.stream(prompt, options, tda=tda)):
        first = first or time.perf_counter() - start
    return stream.output.token_ids, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tda", type=parse_tda, default=False, help="a setting, as of generate")
    parser.add_argument("--answer", type=int, default=100, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    engine = Engine(args.model, weights=args.weights, threads=args.threads)
    seconds: dict[tuple[int, bool], list[float]] = {}
    lengths = []
    for round_ in range(args.rounds):
        cache = PrefixCache()
        messages = []
        for turn, question in enumerate(QUESTIONS):
            messages.append({"role": "user", "content": question})
            prompt = engine.chat_prompt(messages)
            common = {"max_new_tokens": args.answer, "temperature": 0.7, "seed": round_}
            kept = GenerateOptions(**common, prefix_cache=cache)
            order = [(False, GenerateOptions(**common)), (True, kept)]
            outs = {}
            for with_cache, options in order[:: 1 if turn % 2 else -1]:
                outs[with_cache], first = answer(engine, prompt, options, args.tda)
                seconds.setdefault((turn, with_cache), []).append(first)
            if outs[False] != outs[True]:
                raise SystemExit(f"turn {turn + 1}: other tokens with the cache than without")
            messages.append({"role": "assistant", "content": engine.tokenizer.decode(outs[True])})
            if round_ == 0:
                lengths.append(len(prompt))
    print("| turn | prompt tokens | without | with | ratio |")
    print("|---|---|---|---|---|")
    for turn, length in enumerate(lengths):
        without, with_ = (statistics.median(seconds[turn, kept]) for kept in (False, True))
        print(
            f"| {turn + 1} | {length} | {without:.2f} s | {with_:.2f} s | {without / with_:.1f} |"
        )
    print(f"{engine.device}, {engine.threads} threads, {args.weights}, {args.tda or 'dense'}")


if __name__ == "__main__":
    main()
