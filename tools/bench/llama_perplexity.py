"""Compares the perplexity of GGUF files here and in llama.cpp, on the same tokens.

usage: llama_perplexity.py --tokenizer FOLDER --data TEXTS.jsonl FILE.gguf... [--texts 20]

Needs `pip install llama-cpp-python`. Each text's first tokens are the prompt, those after it are
scored. Differences are paired by text; the standard error is that of their mean over the texts.
"""

import argparse
import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

from tdaengine import Engine
from tdaengine.files import read_texts


@llama_cpp.llama_log_callback
def silent(*_: object) -> None: ...


def theirs(path: Path, texts: list[list[int]], prompt: int, threads: int) -> np.ndarray:
    """The mean -log p of each text's scored tokens."""
    length = len(texts[0])
    model = llama_cpp.Llama(
        str(path),
        n_ctx=length,
        n_batch=length,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    result = []
    for ids in texts:
        model.reset()
        model.eval(ids[:-1])
        logits = model.scores[prompt - 1 : length - 1].astype(np.float64)
        top = logits.max(-1)
        totals = top + np.log(np.exp(logits - top[:, None]).sum(-1))
        result.append((totals - logits[np.arange(length - prompt), ids[prompt:]]).mean())
    model.close()
    return np.array(result)


def ours(engine: Engine, texts: list[list[int]], prompt: int) -> np.ndarray:
    return np.array([-engine.score(ids, prompt_tokens=prompt).mean() for ids in texts])


def change(one: np.ndarray, other: np.ndarray) -> str:
    """Of perplexity from `other` to `one`, in per cent, and its standard error."""
    difference = one - other
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return f"{np.expm1(difference.mean()):+.2%} ± {error:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with the same")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--score-tokens", type=int, default=240)
    parser.add_argument("--weights", action="append", help="here, default auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    length = args.prompt_tokens + args.score_tokens
    tokenizer = Engine(args.tokenizer).tokenizer
    encoded = (tokenizer.encode(text) for text in read_texts(args.data))
    texts = [ids[:length] for ids in encoded if len(ids) >= length][: args.texts]
    print(
        f"{len(texts)} texts, {args.prompt_tokens} tokens of prompt, {args.score_tokens} scored\n"
    )
    print("| file | MB | llama.cpp | weights here | bits | perplexity | against llama.cpp |")
    print("|---|---|---|---|---|---|---|")
    for path in args.files:
        reference = theirs(path, texts, args.prompt_tokens, args.threads)
        for weights in args.weights or ["auto"]:
            engine = Engine(path, weights=weights, threads=args.threads)
            found = ours(engine, texts, args.prompt_tokens)
            bits = 8 * engine.weight_bytes / engine.parameters
            print(
                f"| {path.name} | {path.stat().st_size / 1e6:.0f} | "
                f"{np.exp(reference.mean()):.3f} | {engine.weights} | {bits:.2f} | "
                f"{np.exp(found.mean()):.3f} | {change(found, reference)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
