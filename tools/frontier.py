"""Quality against bytes and speed: graded and one-threshold token TDA, sequence TDA, GRIFFIN, CATS.

usage: frontier.py MODEL_FOLDER --data texts.jsonl [--weights int8] [--texts N] [--plot FILE.png]

Every text is scored under every setting, one after the other (see tdaengine.evaluate); prints one
markdown table, and draws perplexity over FFN bytes if asked to (needs matplotlib).
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from tdaengine import TDA, Engine
from tdaengine.evaluate import DENSE, evaluate

SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
GRADED = ((0.45, 0.45), (0.35, 0.5), (0.3, 0.5), (0.3, 0.4), (0.2, 0.5), (0.1, 0.5))
ERRORS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)


def families(weights: str) -> dict[str, dict[str, TDA]]:
    """Family -> its settings by name."""
    token = {f"token {a:g}": TDA(scope="token", active=a) for a in SHARES}
    graded = {f"graded {a:g} + {c:g}": TDA(scope="token", active=a, coarse=c) for a, c in GRADED}
    return {
        **({"graded": graded} if weights == "int8" else {}),
        "one threshold": token,
        "sequence TDA": {f"sequence, error {e:g}": TDA(error=e) for e in ERRORS},
        "GRIFFIN": {f"GRIFFIN {a:g}": TDA.griffin(active=a) for a in SHARES},
        "CATS": {f"CATS {a:g}": TDA.cats(active=a) for a in SHARES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, type=Path, help='JSONL with a field "text"')
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--texts", type=int, help="only the first so many")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--score-tokens", type=int, default=256)
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()

    texts = [json.loads(line)["text"] for line in args.data.read_text().splitlines() if line]
    groups = families(args.weights)
    with tqdm(total=len(texts[: args.texts]), unit="text") as bar:
        results = evaluate(
            Engine(args.model, weights=args.weights),
            texts[: args.texts],
            {name: tda for group in groups.values() for name, tda in group.items()},
            prompt_tokens=args.prompt_tokens,
            score_tokens=args.score_tokens,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    dense = results[DENSE]["perplexity"]
    print("| setting | exact | coarse | FFN bytes | perplexity | | top-1 as dense | speed-up |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in results.items():
        print(
            f"| {name} | {row['active'] - row['coarse']:.2f} | {row['coarse']:.2f} "
            f"| {row['ffn_bytes']:.3f} | {row['perplexity']:.2f} "
            f"| {row['perplexity'] / dense - 1:+.1%} | {row['top1_agreement']:.2f} "
            f"| {row['speedup']:.2f} |"
        )
    if args.plot:
        plot(args.plot, groups, results)


def plot(path: str, groups: dict[str, dict[str, TDA]], results: dict[str, dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    dense = results[DENSE]["perplexity"]
    for family, group in groups.items():
        points = sorted((results[name]["ffn_bytes"], results[name]["perplexity"]) for name in group)
        axes.plot(*zip(*points, strict=True), marker="o", label=family)
    axes.axhline(dense, color="grey", linewidth=0.8, label="dense")
    axes.set(xlabel="FFN bytes read per token, relative to dense", ylabel="perplexity")
    axes.set_ylim(dense * 0.98, dense * 1.6)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
