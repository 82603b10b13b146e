"""Threads, cancelling, Ctrl-C, fork, and the interpreter's end, on a tiny random model."""

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from checkpoints import write_tokenizer
from conftest import PROMPT

from tdaengine import TDA, ContextOverflow, Engine, OptionError

FOREVER = 400_000  # tokens; as a prompt, hours of work
OPTIONS = (
    {},
    {"tda": TDA(active=0.5)},
    {"tda": TDA(active=0.4, scope="token")},
    {"tda": TDA(error=0.2, refresh=8)},
    {"temperature": 1.0, "seed": 5},
)


@pytest.fixture(scope="module")
def two_threads(folder: Path) -> Engine:
    return Engine(folder, threads=2)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A context too long to be filled."""
    folder = tiny.write(tmp_path_factory.mktemp("checkpoints") / "llama", "llama")
    write_tokenizer(folder)
    return Engine(folder, threads=2, max_context=FOREVER)


def answers(engine: Engine) -> list[list[int]]:
    return [
        engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True, **options).token_ids
        for options in OPTIONS
    ]


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["f32", "bf16", "bf16c", "int8", "int4", "graded"])
def test_prompts_of_a_list_are_decoded_together(folder: Path, weights: str):
    prompts = [PROMPT[: 4 + i] for i in range(11)]
    options = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 0.9, "logprobs": 2}
    engine = Engine(folder, weights=weights, threads=2)
    settings = {"int4": [False, TDA(inputs=0.3)], "graded": [False, TDA(inputs=0.3)]}
    for tda in settings.get(weights, [False, TDA(active=0.5), TDA(active=0.5, scope="token")]):
        alone = [engine.generate(p, tda=tda, seed=i, **options) for i, p in enumerate(prompts)]
        together = engine.generate(prompts, tda=tda, seed=0, **options)
        assert [out.token_ids for out in together] == [out.token_ids for out in alone]
        assert [out.logprobs for out in together] == [out.logprobs for out in alone]
        assert [out.stats.ffn_bytes for out in together] == [out.stats.ffn_bytes for out in alone]
        assert all(out.stats.mean_batch == 1 for out in alone)
        assert all(1 <= out.stats.mean_batch <= 11 for out in together)


def test_at_most_max_batch_sequences_share_a_step(folder: Path):
    engine = Engine(folder, threads=1, max_batch=2)
    assert engine.max_batch == 2
    outs = engine.generate([PROMPT] * 6, max_new_tokens=20, ignore_eos=True)
    assert len({tuple(out.token_ids) for out in outs}) == 1
    assert all(1 <= out.stats.mean_batch <= 2 for out in outs)


def test_a_wrong_prompt_in_a_list_ends_the_others(endless: Engine):
    long = [1] * (FOREVER - 10)
    with pytest.raises(OptionError, match=r"prompt\[2\]: tokens\[0\]: found -1"):
        endless.generate([[1, 2], [3, 4], [-1]], max_new_tokens=FOREVER - 10, ignore_eos=True)
    with pytest.raises(ContextOverflow, match=r"prompt\[1\]"):
        endless.generate([[1], long], max_new_tokens=FOREVER - 10, ignore_eos=True)


def test_threads_share_an_engine(two_threads):
    alone = answers(two_threads)
    ids = [5, *two_threads.tokenizer.encode(PROMPT)]
    scores = two_threads.score(ids, 3).tolist()
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(answers, two_threads) for _ in range(8)]
        scored = [pool.submit(two_threads.score, ids, 3) for _ in range(8)]
        assert all(run.result() == alone for run in runs)
        assert all(score.result().tolist() == scores for score in scored)


def test_threads_cannot_break_one_stream(endless, two_threads):
    """Each piece goes to one of them, in order; whoever comes at the same time is told."""
    expected = endless.generate(PROMPT, max_new_tokens=300, ignore_eos=True).token_ids
    stream = endless.stream(PROMPT, max_new_tokens=300, ignore_eos=True)
    refused = []

    def take() -> None:
        while True:
            try:
                for _ in stream:
                    assert stream.output.stats.new_tokens >= 1
                return
            except OptionError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stream.output.token_ids == expected
    assert set(refused) <= {"stream: found it in use by another thread, expected one at a time"}


def test_a_session_is_one_threads_at_a_time(endless):
    session = endless.session(8000)
    refused = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except OptionError as error:
            refused.append(str(error))

    worker = threading.Thread(target=attempt, args=(lambda: session.prefill([5] * 8000),))
    worker.start()
    while worker.is_alive():
        attempt(lambda: session.set_mask(0, [1]))
    assert set(refused) == {"session: found it in use by another thread, expected one at a time"}


# ---- cancelling ---------------------------------------------------------------------------------


def test_cancel_between_tokens(endless):
    stream = endless.stream(PROMPT, max_new_tokens=300_000, ignore_eos=True)
    pieces, several = [], threading.Event()

    def take() -> None:
        for piece in stream:
            pieces.append(piece)
            if len(pieces) == 3:
                several.set()

    thread = threading.Thread(target=take)
    thread.start()
    several.wait()
    assert stream.output.finish_reason is None
    stream.cancel()
    thread.join()
    out = stream.output
    assert out.finish_reason == "cancelled"
    assert out.text == "".join(pieces)
    assert 3 <= len(out.token_ids) == out.stats.new_tokens < 300_000
    assert next(stream, "ended") == "ended"
    assert out.token_ids[:3] == endless.generate(PROMPT, max_new_tokens=3).token_ids


def test_cancel_in_the_midst_of_a_prompt(endless):
    stream = endless.stream([5] * (FOREVER - 10), max_new_tokens=10)
    timer = threading.Timer(0.2, stream.cancel)
    timer.start()
    assert list(stream) == []
    assert stream.output.finish_reason == "cancelled"


def test_cancelling_what_has_ended_changes_nothing(engine):
    stream = engine.stream(PROMPT, max_new_tokens=3, ignore_eos=True)
    assert len(list(stream)) == 3
    stream.cancel()
    assert next(stream, None) is None
    assert stream.output.finish_reason == "length"


class Alarm(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[Callable[[], object]]:
    """Called, it sends a signal soon, whose handler raises, as Ctrl-C's does."""

    def ring(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "work",
    [
        lambda engine: engine.generate([5] * (FOREVER - 10), max_new_tokens=10),
        lambda engine: engine.generate([5], max_new_tokens=FOREVER - 1, ignore_eos=True),
        lambda engine: engine.score([5] * FOREVER, prompt_tokens=1),
        lambda engine: engine.logits([5] * FOREVER),
        lambda engine: engine.calibrate([[5] * FOREVER], max_tokens=FOREVER),
        lambda engine: engine.session(FOREVER).prefill([5] * FOREVER),
    ],
    ids=["prompt", "generate", "score", "logits", "calibrate", "session"],
)
def test_a_signal_ends_the_work(endless, alarm, work):
    with pytest.raises(Alarm):
        alarm()
        work(endless)
    assert len(endless.generate(PROMPT, max_new_tokens=3, ignore_eos=True).token_ids) == 3


def test_what_a_signal_raises_is_no_fault_of_a_tokenizer(endless, alarm):
    text = "all work and no play " * 5000
    ids = endless.tokenizer.encode(text)
    for work in (lambda: endless.tokenizer.encode(text), lambda: endless.tokenizer.decode(ids)):
        with pytest.raises(Alarm):
            alarm()
            while True:
                work()


def test_a_stream_that_a_signal_ended_stays_ended(endless, alarm):
    stream = endless.stream(PROMPT, max_new_tokens=300_000, ignore_eos=True)
    with pytest.raises(Alarm):
        alarm()
        for _ in stream:
            pass
    before = stream.output.token_ids
    stream.cancel()
    list(stream)
    assert stream.output.finish_reason == "cancelled"
    assert stream.output.token_ids == before


# ---- processes ----------------------------------------------------------------------------------


def in_child(engine: Engine, expected: list[list[int]]) -> None:
    same = answers(engine) == expected
    threads = len(os.listdir("/proc/self/task"))  # a pool of its own
    os._exit(0 if same and threads >= engine.threads == 2 else 1)


def from_folder(folder: Path, expected: list[list[int]]) -> None:
    in_child(Engine(folder, threads=2), expected)


def run_child(method: str, target: object, *arguments: object) -> int | None:
    child = multiprocessing.get_context(method).Process(target=target, args=arguments)
    child.start()
    child.join(100)
    if child.exitcode is None:
        child.kill()
    return child.exitcode


def test_fork(folder):  # CUDA does not survive it
    engine = Engine(folder, device="cpu", threads=2)
    expected = answers(engine)
    assert run_child("fork", in_child, engine, expected) == 0
    assert answers(engine) == expected


def test_fork_while_another_thread_computes(folder):
    """The child has neither that thread nor what it holds."""
    engine = Engine(folder, device="cpu", threads=2, max_context=FOREVER)
    expected = answers(engine)
    stream = engine.stream([5] * 50_000, max_new_tokens=FOREVER - 50_000, ignore_eos=True)
    thread = threading.Thread(target=list, args=(stream,))
    thread.start()
    try:
        codes = [run_child("fork", in_child, engine, expected) for _ in range(5)]
    finally:
        stream.cancel()
        thread.join()
    assert codes == [0] * 5


def test_a_child_ends_without_waiting_for_threads_it_has_not_got(folder):
    engines = [Engine(folder, threads=2)]
    assert run_child("fork", engines.clear) == 0


def test_spawn(folder, two_threads):
    assert run_child("spawn", from_folder, folder, answers(two_threads)) == 0
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(two_threads)


# ---- ends ---------------------------------------------------------------------------------------


def test_a_stream_outlives_its_engine(folder, dense):
    stream = Engine(folder, threads=2).stream(PROMPT, max_new_tokens=40, ignore_eos=True)
    first = next(stream)
    gc.collect()
    assert first + "".join(stream) == dense.text


EXIT = """
import sys, threading, time
from tdaengine import Engine, TDA

engine = Engine(sys.argv[1], threads=2, max_context=400_000)
if sys.argv[2] == "main":
    stream = engine.stream([5], max_new_tokens=100, ignore_eos=True)
    next(stream)
    sys.exit(7)
prompt = [5] * (100_000 if sys.argv[2] == "prompt" else 10)
started = threading.Event()

def take():
    started.set()
    for piece in engine.stream(prompt, max_new_tokens=300_000, ignore_eos=True):
        pass

for _ in range(3):
    threading.Thread(target=take, daemon=True).start()
started.wait()
time.sleep(0.2)
sys.exit(7)
"""


@pytest.mark.parametrize("where", ["main", "prompt", "tokens"])
def test_interpreter_exit_while_streaming(tmp_path, where):
    folder = tiny.write(tmp_path / "llama", "llama")
    write_tokenizer(folder)
    for _ in range(1 if where == "main" else 3):
        child = subprocess.run(
            [sys.executable, "-c", EXIT, str(folder), where],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (child.returncode, child.stdout, child.stderr) == (7, "", "")
