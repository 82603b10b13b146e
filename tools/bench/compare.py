"""Compares prefill and decode speed with peers, interleaved in one run, with the memory bandwidth.

usage: compare.py MODEL_FOLDER [--weights bf16 --weights graded,inputs=0.2] [--gguf FILE]...

Peers are those installed of transformers, CTranslate2 and, with GGUF files (see make_gguf.py),
llama.cpp. Each runner has its own process, which is suspended while others are measured, because
OpenMP threads keep spinning. Every round measures the read bandwidth and then all runners in turn.
Prints medians over the rounds, and for ratios the median of the rounds' ratios.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from tdaengine import Engine, __version__, measure_read_bandwidth
from tdaengine.options import parse_tda

PACKAGES = ("transformers", "torch", "ctranslate2", "llama-cpp-python")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm")
KINDS = {"F32": "f32", "BF16": "bf16", "F16": "bf16", "Q8": "int8", "Q4": "int4"}  # in GGUF names


class Measured(NamedTuple):
    prefill: float  # tokens/s
    decode: float  # tokens/s
    size: float  # bytes of weights, keys and values read per decoded token


Measure = Callable[[], Measured]


@dataclass(frozen=True)
class Task:
    """The interface of all runners. prompt, new: in tokens."""

    folder: str
    prompt: int
    new: int
    threads: int

    def config(self) -> dict:
        return json.loads((Path(self.folder) / "config.json").read_text())

    def ids(self) -> list[int]:
        return [(37 * i + 100) % self.config()["vocab_size"] for i in range(self.prompt)]

    def kv_size(self, element: int) -> float:
        """Bytes of keys and values read per token, halfway through; element: bytes of one."""
        config = self.config()
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        entry = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width
        return (self.prompt + self.new / 2) * entry * element


def tdaengine_runner(task: Task, weights: str, setting: str) -> Measure:
    engine = Engine(task.folder, threads=task.threads, weights=weights)
    prompt, tda = task.ids(), parse_tda(setting) if setting else None

    def measure() -> Measured:
        stats = engine.generate(prompt, max_new_tokens=task.new, ignore_eos=True, tda=tda).stats
        speed = task.prompt / stats.prefill_seconds
        return Measured(speed, stats.tokens_per_second, stats.bytes_per_token)

    return measure


def transformers_runner(task: Task, weights: str) -> Measure:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(task.threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[weights]
    model = AutoModelForCausalLM.from_pretrained(task.folder, dtype=dtype)
    prompt = torch.tensor([task.ids()])
    size = sum(p.nbytes for p in model.parameters()) + task.kv_size(dtype.itemsize)
    if not model.config.tie_word_embeddings:
        size -= model.get_input_embeddings().weight.nbytes

    @torch.inference_mode()
    def measure() -> Measured:
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(task.new):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        end = time.perf_counter()
        return Measured(task.prompt / (middle - start), task.new / (end - middle), size)

    return measure


def ctranslate2_runner(task: Task) -> Measure:
    import ctranslate2
    import torch

    class Numbers:
        """A tokenizer for the converter: every token's text is its id."""

        bos_token, eos_token, unk_token = "1", "2", "0"

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(config["vocab_size"])}

    class Converter(ctranslate2.converters.TransformersConverter):
        def load_tokenizer(self, *_: object, **__: object) -> Numbers:
            return Numbers()

    torch.set_num_threads(1)  # torch only loads here; more threads would keep spinning
    config, prompt = task.config(), [str(i) for i in task.ids()]
    with tempfile.TemporaryDirectory() as folder:
        Converter(task.folder).convert(folder, quantization="int8", force=True)
        size = (Path(folder) / "model.bin").stat().st_size + task.kv_size(4)
        generator = ctranslate2.Generator(
            folder, device="cpu", compute_type="int8", intra_threads=task.threads
        )
    if not config.get("tie_word_embeddings"):
        size -= config["vocab_size"] * config["hidden_size"]  # the embedding's int8

    def measure() -> Measured:
        times = [time.perf_counter()]
        generator.generate_batch(
            [prompt],
            min_length=task.new,
            max_length=task.new,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=lambda _: times.append(time.perf_counter()),
        )
        start, first, *_, last = times
        return Measured(task.prompt / (first - start), (len(times) - 2) / (last - first), size)

    return measure


def llamacpp_runner(task: Task, file: str) -> Measure:
    import ctypes

    os.environ["OMP_WAIT_POLICY"] = "active"  # read once by OpenMP; would slow CTranslate2 down
    import llama_cpp as api
    from gguf import GGUFReader

    @api.llama_log_callback
    def silent(*_: object) -> None: ...

    api.llama_log_set(silent, ctypes.c_void_p())
    api.llama_backend_init()
    model = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx = task.prompt + task.new
    params.n_batch = task.prompt
    params.n_threads = params.n_threads_batch = task.threads
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = api.llama_init_from_model(model, params) if model else None
    if not context:
        raise ValueError(f"{file}: does not load")
    prompt = (api.llama_token * task.prompt)(*task.ids())
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    size = sum(sizes.values()) + task.kv_size(2)

    def decode(tokens: ctypes.Array) -> None:
        if api.llama_decode(context, api.llama_batch_get_one(tokens, len(tokens))) != 0:
            raise ValueError(f"{file}: llama_decode failed")
        api.llama_synchronize(context)

    def measure() -> Measured:
        silent  # noqa: B018  must live as long as the model
        api.llama_memory_clear(api.llama_get_memory(context), True)
        start = time.perf_counter()
        decode(prompt)
        middle = time.perf_counter()
        for i in range(task.new):
            decode((api.llama_token * 1)(prompt[i % task.prompt]))
        end = time.perf_counter()
        return Measured(task.prompt / (middle - start), task.new / (end - middle), size)

    return measure


class Runner:
    """A runner's process, suspended except while measuring. Runners of one kind are compared."""

    def __init__(self, name: str, kind: str | None, make: Callable, *arguments: object) -> None:
        self.name, self.kind, self.is_ours = name, kind, make is tdaengine_runner
        self.rounds: list[Measured] = []
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()
        self.error: str | None = self._receive()
        self._signal(signal.SIGSTOP)

    def measure(self) -> None:
        self._signal(signal.SIGCONT)
        self._pipe.send(None)
        self.rounds.append(self._receive())
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _receive(self) -> object:
        try:
            return self._pipe.recv()
        except EOFError:
            sys.exit(f"{self.name}: its process died")

    def _signal(self, number: signal.Signals) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, number)


def serve(pipe: Connection, make: Callable, arguments: tuple) -> None:
    try:
        measure = make(*arguments)
    except Exception as error:  # a peer that fails in any way is left out
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    with suppress(EOFError):  # the end
        while True:
            pipe.recv()
            pipe.send(measure())


def make_runners(args: argparse.Namespace, stack: ExitStack) -> list[Runner]:
    task = Task(args.model, args.prompt, args.new, args.threads)
    runners = []
    for each in args.weights:
        weights, _, setting = each.partition(",")
        kind = weights.removesuffix("c")  # bf16c holds bf16
        runners.append((f"tdaengine {each}", kind, tdaengine_runner, task, weights, setting))
    if "transformers" not in args.without:
        for weights in [w for w in args.weights if w in ("f32", "bf16")] or ["bf16"]:
            name = f"transformers {weights}"
            runners.append((name, weights, transformers_runner, task, weights))
    if "ctranslate2" not in args.without:
        runners.append(("CTranslate2 int8", "int8", ctranslate2_runner, task))
    for file in args.gguf:
        kind = next((KINDS[part] for part in KINDS if part in Path(file).name.upper()), None)
        runners.append((f"llama.cpp {Path(file).stem}", kind, llamacpp_runner, task, file))
    made = []
    for arguments in runners:
        print(f"loading {arguments[0]}", file=sys.stderr)
        runner = Runner(*arguments)
        stack.callback(runner.close)
        if runner.error:
            print(f"{runner.name}: left out ({runner.error})\n")
        else:
            made.append(runner)
    return made


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return sys.platform
    fields = dict(line.partition(":")[::2] for line in lines)
    fields = {name.strip().lower(): value.strip() for name, value in fields.items()}
    flags = (fields.get("flags") or fields.get("features", "")).split()
    return f"{fields.get('model name', 'unknown CPU')}, {', '.join(f for f in FLAGS if f in flags)}"


def versions() -> str:
    found = [f"tdaengine {__version__}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def report(runners: list[Runner], roofs: list[float]) -> None:
    median = statistics.median
    low, middle, high = (f(roofs) / 1e9 for f in (min, median, max))
    print(f"Read roof {middle:.1f} GB/s ({low:.1f} to {high:.1f}), {len(roofs)} rounds.\n")
    print("| engine, format | prefill tokens/s | decode tokens/s | MB per token | of read roof |")
    print("|---|---|---|---|---|")
    for runner in runners:
        prefill, decode, size = (median(values) for values in zip(*runner.rounds, strict=True))
        share = median(m.decode * m.size / r for m, r in zip(runner.rounds, roofs, strict=True))
        print(f"| {runner.name} | {prefill:.0f} | {decode:.1f} | {size / 1e6:.1f} | {share:.0%} |")
    pairs = [(o, p) for o in runners if o.is_ours for p in runners if is_peer(o, p)]
    if pairs:
        print("\n| faster by | than | prefill | decode |")
        print("|---|---|---|---|")
    for ours, peer in pairs:
        rounds = list(zip(ours.rounds, peer.rounds, strict=True))
        prefill, decode = (median(o[i] / p[i] for o, p in rounds) for i in (0, 1))
        print(f"| {ours.name} | {peer.name} | {prefill:.2f} | {decode:.2f} |")


def is_peer(ours: Runner, other: Runner) -> bool:
    return not other.is_ours and other.kind == ours.kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument(
        "--weights",
        action="append",
        metavar="FORMAT[,SETTING]",
        help="as Engine's, and of TDA, as graded,inputs=0.2; default bf16; repeatable",
    )
    parser.add_argument("--gguf", action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument(
        "--without", action="append", default=[], choices=("transformers", "ctranslate2")
    )
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--new", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    args.weights = args.weights or ["bf16"]

    with ExitStack() as stack:
        runners, roofs = make_runners(args, stack), []
        for i in range(args.rounds + 1):
            print(f"round {i} of {args.rounds}", file=sys.stderr)
            roofs.append(measure_read_bandwidth(args.threads))
            for runner in runners:
                runner.measure()
    for runner in runners:
        del runner.rounds[0]  # warm-up
    print(f"{Path(args.model).resolve().name}, {args.prompt} prompt + {args.new} new tokens")
    print(f"{machine()}; {os.cpu_count()} CPUs, {args.threads} threads")
    print(f"{versions()}\n")
    report(runners, roofs[1:])


if __name__ == "__main__":
    main()
