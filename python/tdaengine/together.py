"""Several generations at once: each in a thread, while the engine computes their steps together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from .checks import naming
from .stream import Output, Stream, whole


def outputs(start: Callable[[int], Stream], count: int, at_once: int) -> list[Output]:
    """The outputs of the streams start(0) ... start(count - 1), each of which starts when there is
    room for it. An error, named by its prompt, ends all."""
    futures: list[Future[Output]] = []
    running: dict[Future[Output], Stream] = {}
    with ThreadPoolExecutor(at_once, "tdaengine-generate") as threads:
        try:
            for i in range(count):
                if len(running) == at_once:
                    _collect(running)
                with naming(f"prompt[{i}]"):
                    stream = start(i)
                futures.append(threads.submit(_output, stream, i))
                running[futures[-1]] = stream
            while running:
                _collect(running)
        finally:
            for stream in running.values():
                stream.cancel()
    return [future.result() for future in futures]


def _collect(running: dict[Future[Output], Stream]) -> None:
    """Waits until one has ended; raises what it raised."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        del running[future]
        future.result()


def _output(stream: Stream, i: int) -> Output:
    with naming(f"prompt[{i}]"):
        return whole(stream)
