"""Checks and measures device cuda on a machine that has a GPU; tools/bench/gpu.sh runs it.

    gpu.py tiny              runs every feature on a tiny model: for compute-sanitizer
    gpu.py check             compares CUDA with the CPU, and repeated runs with each other
    gpu.py bench [SHAPE]...  random weights of these shapes, with bandwidth and peers in one run

--device cpu tries all this without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "python"), str(ROOT / "tools")]

import random_model  # noqa: E402
import tiny  # noqa: E402

from tdaengine import TDA, Engine, GenerateOptions, OptionError  # noqa: E402

SHARES = (0.75, 0.5, 0.25)
LARGEST = {"f32": 1e-3, "bf16": 0.3}  # allowed differences of logits, which are about 3
TOKENS, SAME = 64, 100  # tokens compared with the CPU's; generations compared with each other


def prompt(engine: Engine, length: int) -> list[int]:
    return [(37 * i + 100) % engine.config.vocab_size for i in range(length)]


@contextmanager
def model_folder(shape: str, device: str, seed: int = 1) -> Iterator[tuple[Path, dict]]:
    """A checkpoint with random weights, and the weights, which are generated on the device because
    NumPy would take minutes."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    weights = {}

    def values(name: str, size: tuple[int, ...]) -> np.ndarray:
        made = torch.ones(size, device=device, dtype=torch.bfloat16)
        if len(size) > 1:
            made.normal_(0, random_model.STD, generator=generator)
        weights[name] = made
        return made.view(torch.int16).cpu().numpy()

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        model = Path(folder) / shape
        random_model.write_model(model, random_model.make_config(shape), values)
        yield model, weights


# ---- checks -------------------------------------------------------------------------------------


def scopes() -> dict[str, TDA | None]:
    return {
        "dense": None,
        "mask": TDA(active=0.5),
        "error": TDA(error=0.2),
        "refresh": TDA(active=0.5, refresh=4),
        "token": TDA(scope="token", active=0.5),
        "gate": TDA.cats(active=0.5),
    }


def run_tiny(device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("llama", "qwen3", "mistral_sliding"):
            model = tiny.write(Path(folder) / name, name)
            for weights in ("f32", "bf16"):
                engine = Engine(model, device=device, weights=weights)
                for tda in scopes().values():
                    options = {"max_new_tokens": 8, "ignore_eos": True, "tda": tda}
                    engine.generate(tiny.tokens(name, 20), **options)
                engine.generate(tiny.tokens(name, 20), max_new_tokens=8, temperature=1.0)
                engine.logits(tiny.tokens(name))
    print("tiny: every scope ran in f32 and bf16")


def largest_difference(model: Path, device: str, weights: str, tokens: list[int]) -> float:
    """The largest difference between logits, prefilled and decoded."""
    rows = []
    for on in (device, "cpu"):
        engine = Engine(model, device=on, weights=weights, max_context=tiny.CONTEXT)
        session = engine.session(len(tokens))
        session.prefill(tokens[: len(tokens) // 2])
        decoded = [session.decode(token) for token in tokens[len(tokens) // 2 :]]
        rows.append(np.concatenate([engine.logits(tokens), decoded]))
    return float(np.abs(rows[0] - rows[1]).max())


def run_check(device: str, shape: str) -> None:
    failures = []

    def report(what: str, holds: bool) -> None:
        print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)
        if not holds:
            failures.append(what)

    with tempfile.TemporaryDirectory() as folder:
        worst = dict.fromkeys(LARGEST, 0.0)
        for name in tiny.VARIANTS:
            model = tiny.write(Path(folder) / name, name)
            for weights in worst:
                found = largest_difference(model, device, weights, tiny.tokens(name))
                worst[weights] = max(worst[weights], found)
        for weights, most in LARGEST.items():
            what = f"logits in {weights} on {device} and cpu differ by {worst[weights]:.2g}"
            report(f"{what}, at most {most}", worst[weights] <= most)

        engine = Engine(Path(folder) / "llama", device=device, weights="bf16")
        for name, tda in scopes().items():
            scores = {engine.score(tiny.tokens("llama"), 24, tda).tobytes() for _ in range(SAME)}
            report(f"{SAME} scores, {name}: {len(scores)} different", len(scores) == 1)

    random = random_model.random_values(seed=3)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / shape
        random_model.write_model(model, random_model.make_config(shape), random)
        engines = [Engine(model, device=on, weights="f32") for on in (device, "cpu")]
        for how, sampling in (("greedy", {}), ("sampled", {"temperature": 0.8, "seed": 1})):
            options = {"max_new_tokens": TOKENS, "ignore_eos": True, **sampling}
            texts = [e.generate(prompt(e, 40), **options).token_ids for e in engines]
            report(f"{TOKENS} {how} tokens of {shape} in f32 are the CPU's", texts[0] == texts[1])
    if failures:
        sys.exit(f"{len(failures)} checks failed")


# ---- speed --------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: str) -> float:
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def read_roof(device: str, gigabytes: float) -> float:
    """Bytes per second of a sum over a large tensor."""
    import torch

    data = torch.ones(int(gigabytes * 2**30 / 4), device=device)
    data.sum()
    return data.numel() * 4 / min(seconds(data.sum, device) for _ in range(3))


class Bench:
    """The measurements at one shape: per name tokens/s of each round, and bytes per token."""

    def __init__(self, args: argparse.Namespace, deadline: float) -> None:
        self.device, self.new, self.rounds = args.device, args.new, args.rounds
        self.contexts, self.roof_gigabytes = args.context, args.roof_gigabytes
        self.deadline = deadline
        self.speeds: dict[str, list[float]] = {}
        self.bytes: dict[str, int] = {}
        self.roofs: list[float] = []
        self.notes: list[str] = []

    def run(self, shape: str, with_transformers: bool) -> None:
        import torch_peers

        with model_folder(shape, self.device) as (folder, weights):
            config = json.loads((folder / "config.json").read_text())
            engine = Engine(folder, device=self.device, weights="bf16")
            length = max(self.contexts) + self.new
            peers = torch_peers.make(config, weights, self.device, length, with_transformers)
            self._gate(engine, peers["torch, compiled"])
            for round_ in range(self.rounds + 1):
                if time.monotonic() > self.deadline:
                    self.notes.append(f"stopped after {max(0, round_ - 1)} rounds: out of time")
                    break
                measured = self._round(engine, peers)
                if round_ > 0:  # the first warms up
                    self.roofs.append(read_roof(self.device, self.roof_gigabytes))
                    for name, speed in measured.items():
                        self.speeds.setdefault(name, []).append(speed)

    def _gate(self, engine: Engine, peer: object) -> None:
        """Speeds are comparable only if the results agree: both in bf16, with the same weights."""
        tokens = prompt(engine, 32)
        ours, theirs = engine.logits(tokens)[-1], peer.logits(tokens)
        difference, size = np.abs(ours - theirs).max(), np.abs(theirs).max()
        if not difference <= 0.1 * size:
            raise SystemExit(f"logits differ from torch's by {difference:.3g} of {size:.3g}")
        self.notes.append(f"logits of size {size:.2g} differ from torch's by {difference:.2g}")

    def _round(self, engine: Engine, peers: dict) -> dict[str, float]:
        measured = {}
        settings = {"dense": None} | {f"mask {share:.0%}": TDA(active=share) for share in SHARES}
        for context in self.contexts:
            for setting, tda in settings.items():
                options = GenerateOptions(max_new_tokens=self.new, ignore_eos=True)
                try:
                    generation = engine.start(prompt(engine, context), options, tda)
                except OptionError as error:
                    sys.exit(f"{setting}: {error}")
                while generation.next() is not None:
                    pass
                name = f"tdaengine {setting}, context {context}"
                measured[name] = generation.stats.tokens_per_second
                self.bytes[name] = generation.stats.bytes_per_token
            for peer_name, peer in list(peers.items()):
                name = f"{peer_name}, context {context}"
                try:
                    work = peer.decode_loop(context, self.new)
                    measured[name] = self.new / seconds(work, self.device)
                except Exception as error:  # a peer that fails in any way is left out
                    del peers[peer_name]
                    self.notes.append(f"{peer_name} left out: {type(error).__name__}: {error}")
                    continue
                self.bytes[name] = peer.bytes_per_token(context)
        return measured

    def table(self, shape: str) -> str:
        lines = [f"### {shape}, bf16, {self.new} new tokens, {len(self.roofs)} rounds", ""]
        if not self.roofs:
            return "\n".join([*lines, "not measured", *self.notes])
        roof = statistics.median(self.roofs)
        lines += [
            f"Read roof {roof / 1e9:.0f} GB/s ({min(self.roofs) / 1e9:.0f} to "
            f"{max(self.roofs) / 1e9:.0f}). {' '.join(note + '.' for note in self.notes)}",
            "",
            "| what | tokens/s (least, most) | MB per token | GB/s | of roof | of own dense |",
            "|---|---|---|---|---|---|",
        ]
        for name, speeds in self.speeds.items():
            speed = statistics.median(speeds)
            rate = speed * self.bytes[name]
            own = ""
            if name.startswith("tdaengine"):
                dense = self.speeds[f"tdaengine dense, {name.rpartition(', ')[2]}"]
                ratios = [s / d for s, d in zip(speeds, dense, strict=True)]
                own = f"{statistics.median(ratios):.2f}"
            lines.append(
                f"| {name} | {speed:.1f} ({min(speeds):.1f}, {max(speeds):.1f}) "
                f"| {self.bytes[name] / 1e6:.1f} | {rate / 1e9:.0f} | {rate / roof:.0%} | {own} |"
            )
        return "\n".join(lines)


def machine(device: str) -> str:
    import torch

    if device != "cuda":
        return "rehearsal on device cpu: no figure here says anything about a GPU"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    return f"{card[0] if card else 'unknown GPU'}; torch {torch.__version__}"


def run_bench(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + args.seconds
    print(f"{machine(args.device)}\n\nMade by `tools/bench/gpu.sh`.\n", flush=True)
    for shape in args.shapes:
        bench = Bench(args, deadline)
        if time.monotonic() > deadline:
            bench.notes.append("out of time")
        else:
            first = shape == args.shapes[0]
            bench.run(shape, with_transformers=first and not args.without_transformers)
        print(bench.table(shape) + "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("tiny", "check", "bench"))
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", default=["llama3.2-1b"])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--context", type=int, action="append", help="default 32; repeatable")
    parser.add_argument("--new", type=int, default=256, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240, help="to spend on rounds")
    parser.add_argument("--roof-gigabytes", type=float, default=8)
    parser.add_argument("--without-transformers", action="store_true", help="they compile for long")
    args = parser.parse_args()
    args.context = args.context or [32]
    if args.what == "tiny":
        run_tiny(args.device)
    elif args.what == "check":
        run_check(args.device, args.shapes[0])
    else:
        run_bench(args)


if __name__ == "__main__":
    main()
