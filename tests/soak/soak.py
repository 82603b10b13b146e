"""Runs thousands of short generations with changing options in one process: memory, file
descriptors and threads must not grow, and equal options must give equal results.

    python tests/soak/soak.py --generations 10000

Prints a line every thousand generations. Exits with 1 and names what grew or differed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

from checkpoints import write_checkpoint

from tdaengine import TDA, Engine

# Allowed growth in MiB after the first tenth of the run: 175 bytes for each of 10,000 generations.
GROWTH = 1.5
PROMPTS = ("The sky is", "A longer prompt, of which the mask is made. ", [1, 7, 30, 9] * 12)
ENGINES = (
    {"weights": "f32", "threads": 2},
    {"weights": "bf16", "threads": 2},
    {"weights": "int8", "threads": 2},
    {"weights": "int8", "kv": "int8", "threads": 1},
    {"weights": "int4", "threads": 2},
    {"weights": "graded", "threads": 2},
    {"weights": "bf16c", "threads": 2},
)
SAMPLING = (
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.2, "logit_bias": {40: 2.0}, "logprobs": 3},
    {"allowed_tokens": lambda ids: range(len(ids) % 3, 96, 3), "temperature": 0.9, "seed": 3},
)
STOPS = (None, "e", ["ab", "\x7f", "q!"])


def tda_settings(engine: Engine) -> Iterator[TDA | None]:
    yield None
    if engine.weights in ("graded", "int4"):
        yield TDA()
        yield TDA(inputs=0.1, active=0.3)
        yield TDA(loss=0.5, thresholds=engine.calibrate(["Some text.", "Some more."]))
        return
    yield TDA(error=0.2)
    yield TDA(active=0.5)
    yield TDA(active=0.4, refresh=4)
    yield TDA.griffin(0.5)
    yield TDA(scope="token", active=0.4)
    yield TDA(scope="token", error=0.2)
    yield TDA.cats(0.5)
    if engine.weights == "int8":
        yield TDA(scope="token", active=0.3)
    for scope in ("sequence", "token"):
        thresholds = engine.calibrate(["Some text.", "Some more."], error=0.2, scope=scope)
        yield TDA(scope=scope, thresholds=thresholds)


def resident() -> float:
    """This process's resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def held() -> tuple[int, int]:
    """How many file descriptors and threads are open."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


class Soak:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engines = [Engine(folder, **options) for options in ENGINES]
        self.settings = [
            (i, tda, *rest)
            for i, engine in enumerate(self.engines)
            for tda in tda_settings(engine)
            for rest in itertools.product(PROMPTS, SAMPLING, STOPS)
        ]
        self.first: dict[int, int] = {}  # setting -> hash of its result
        self.random = random.Random(0)

    def reload(self) -> None:
        """Loads one of the engines again. Reuses its tokenizer, because the `tokenizers` library
        never frees some KiB of each.
        """
        which = self.random.randrange(len(self.engines))
        tokenizer = self.engines[which].tokenizer
        self.engines[which] = Engine(self.folder, **ENGINES[which])
        self.engines[which].tokenizer = tokenizer

    def generate(self) -> None:
        key = self.random.randrange(len(self.settings))
        which, tda, prompt, sampling, stop = self.settings[key]
        options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, **sampling}
        stream = self.engines[which].stream(prompt, tda=tda, stop=stop, **options)
        if self.random.random() < 0.1:  # a reader that stops early
            next(stream, None)
            stream.cancel()
            return
        for _ in stream:
            pass
        out = stream.output
        result = hash((tuple(out.token_ids), out.text, out.finish_reason))
        if self.first.setdefault(key, result) != result:
            sys.exit(f"{self.settings[key]}: found {out}, expected the result of the first run")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=10_000)
    count = parser.parse_args().generations
    with tempfile.TemporaryDirectory() as temporary:
        soak = Soak(write_checkpoint(Path(temporary) / "llama"))
        start = 0.0
        for i in range(count + 1):
            if i == count // 10:
                start, at_start = resident(), held()
            if i % 1000 == 0 or i == count:
                files, threads = held()
                print(f"{i:6} generations: {resident():.1f} MiB, {files} files, {threads} threads")
            soak.generate()
            if i % 50 == 49:
                soak.reload()
        growth = resident() - start
    repeated = count - len(soak.first)
    print(f"{len(soak.first)} of {len(soak.settings)} settings seen, {repeated} times again")
    print(f"memory since generation {count // 10}: {growth:+.1f} MiB, allowed {GROWTH}")
    if growth > GROWTH or held() != at_start:
        print(f"files and threads: {at_start} became {held()}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
