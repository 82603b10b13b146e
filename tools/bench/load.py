"""Many clients at once on a server with the OpenAI API: latencies, and whether anything is lost.

    tdaengine serve MODEL --port 8000 &
    python tools/bench/load.py --url http://127.0.0.1:8000 --pid $!

Most clients read an answer to its end, as a stream or as a whole. Some leave in the midst of a
stream, some before an answer begins, some send too much or what is no request. --url takes any
server of the kind, to compare; --pid shows the memory of one here. Exits with 1 if an answer was
lost, an honest request failed, or the server is not idle and well afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

# How often, relatively. Only the first two are answered to their end.
KINDS = {"stream": 10, "whole": 3, "leave": 3, "hang up": 2, "oversized": 1, "malformed": 1}
WORDS = ("sky", "sea", "blue", "deep", "bird", "sings", "of", "the", "river", "and", "May")
OVERSIZED = (5_000_000, 100_000)  # characters: beyond a usual limit of bodies, beyond a context
MALFORMED = (b"{", b'{"messages": 3}', b'{"messages": []}', b"[]", b"\xff")
PATIENCE = 600  # seconds
LOST_CONNECTION = (openai.APIConnectionError, http.client.HTTPException, OSError)


@dataclass
class Seen:
    """What all clients met."""

    asked: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to a stream's first text
    whole: list[float] = field(default_factory=list)  # seconds to the end of an answer
    tokens: int = 0


class Load:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.seen, self.chance = args, Seen(), random.Random(args.seed)
        self.client = openai.AsyncOpenAI(
            base_url=f"{args.url}/v1", api_key=args.key, max_retries=0, timeout=PATIENCE
        )

    async def run(self) -> float:
        """Returns how long it took."""
        if self.args.model is None:
            self.args.model = (await self.client.models.list()).data[0].id
        started = time.monotonic()
        end = started + self.args.seconds
        clients = (self._go_on(number, end) for number in range(self.args.clients))
        await asyncio.gather(*clients)
        return time.monotonic() - started

    async def _go_on(self, number: int, end: float) -> None:
        first = list(KINDS)[number % len(KINDS)]  # so that each kind occurs
        while (left := end - time.monotonic()) > 0:
            kind = first or self.chance.choices(list(KINDS), list(KINDS.values()))[0]
            first = ""
            self.seen.asked[kind] += 1
            try:
                await self._one(kind)
            except openai.RateLimitError as error:
                self.seen.outcomes["refused, 429"] += 1
                seconds = float(error.response.headers.get("Retry-After", 1))
                await asyncio.sleep(min(seconds, left))
            except openai.APIStatusError as error:
                self._note_status(kind, error.status_code)
            except LOST_CONNECTION:
                # A body that is too large may be answered, and the connection closed, before all of
                # it is sent.
                self._note(f"{kind}: connection closed", is_problem=kind != "oversized")

    async def _one(self, kind: str) -> None:
        if kind == "malformed":
            body = self.chance.choice(MALFORMED)
            status, _ = await asyncio.to_thread(self._send, "POST", "/v1/chat/completions", body)
            self._note_status(kind, status)
        elif kind == "oversized":
            await self._whole(self.chance.choice(OVERSIZED))
        elif kind == "whole":
            await self._whole()
        elif kind == "hang up":
            try:
                await asyncio.wait_for(self._whole(), self.chance.uniform(0.01, 1))
            except asyncio.TimeoutError:
                self.seen.outcomes["left before an answer"] += 1
        else:
            await self._stream(None if kind == "stream" else self.chance.randint(1, 10))

    def _asked(self, characters: int | None = None) -> dict[str, Any]:
        prompt = " ".join(self.chance.choices(WORDS, k=self.chance.randint(3, self.args.words)))
        if characters is not None:
            prompt = (prompt + " ") * (characters // len(prompt))
        messages = [{"role": "user", "content": prompt}]
        most = {"max_tokens": self.args.tokens, "temperature": 0}
        return {"model": self.args.model, "messages": messages, **most}

    async def _whole(self, characters: int | None = None) -> None:
        started = time.monotonic()
        answer = await self.client.chat.completions.create(**self._asked(characters))
        self._count(answer.choices[0].finish_reason, answer.usage, 0, started)

    async def _stream(self, most: int | None) -> None:
        """most: pieces, after which the client leaves."""
        started, pieces, reason, usage = time.monotonic(), 0, None, None
        options = {"include_usage": True}
        create = self.client.chat.completions.create
        async with await create(**self._asked(), stream=True, stream_options=options) as stream:
            async for event in stream:
                usage = getattr(event, "usage", None) or usage
                for choice in event.choices:
                    reason = choice.finish_reason or reason
                    pieces += bool(choice.delta.content)
                    if pieces == 1 and choice.delta.content:
                        self.seen.first.append(time.monotonic() - started)
                if most is not None and pieces >= most and not reason:
                    self.seen.outcomes["left in its midst"] += 1
                    self.seen.tokens += pieces
                    return
        self._count(reason, usage, pieces, started)

    def _count(self, reason: str | None, usage: Any, pieces: int, started: float) -> None:
        """An answer that has come to its end. Not every server counts the tokens of a stream."""
        self.seen.whole.append(time.monotonic() - started)
        self.seen.tokens += usage.completion_tokens if usage else pieces
        self._note("complete" if reason else "lost: no finish_reason", is_problem=not reason)
        if not usage:
            self._note("complete without usage", is_problem=False)

    def _note(self, outcome: str, is_problem: bool) -> None:
        self.seen.outcomes[outcome] += 1
        if is_problem:
            self.seen.problems[outcome] += 1

    def _note_status(self, kind: str, status: int) -> None:
        is_right = kind in ("oversized", "malformed") and 400 <= status < 500
        self._note(f"{kind}: status {status}", is_problem=not is_right)

    def _send(self, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
        """What no client library would. Returns status and text."""
        connection = http.client.HTTPConnection(urlsplit(self.args.url).netloc, timeout=PATIENCE)
        key = {"Authorization": f"Bearer {self.args.key}"}
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **key})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    async def check_afterwards(self) -> None:
        """That nothing runs or waits, if the server tells, and that it still answers."""
        try:
            end, busy = time.monotonic() + 10, True
            while busy and time.monotonic() < end:
                _, text = self._send("GET", "/metrics")
                counts = re.findall(r"^tdaengine_(?:running|queue_length) (.*)", text, re.MULTILINE)
                busy = any(float(count) for count in counts)
            if busy:
                self._note("answers under way after all clients had ended", is_problem=True)
            await self._whole()
        except (openai.APIStatusError, *LOST_CONNECTION) as error:
            self._note(f"no answer afterwards: {error}", is_problem=True)


def memory(pid: int) -> str:
    """Resident, of a process here."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return f"{int(kilobytes) / 1000:.0f}"


def spread(values: list[float]) -> list[str]:
    """p50 and p95."""
    if len(values) < 2:
        return ["too few", "too few"]
    parts = statistics.quantiles(values, n=20)
    return [f"{parts[9]:.2f}", f"{parts[18]:.2f}"]


def show(load: Load, seconds: float, rows: dict[str, Any]) -> None:
    seen = load.seen
    first, whole = spread(seen.first), spread(seen.whole)
    rows = {
        "requests": sum(seen.asked.values()),
        **dict(sorted(seen.outcomes.items())),
        "tokens/s": f"{seen.tokens / seconds:.1f}",
        "seconds to the first text, p50": first[0],
        "seconds to the first text, p95": first[1],
        "seconds to the end, p50": whole[0],
        "seconds to the end, p95": whole[1],
        **rows,
    }
    print(f"{load.args.clients} clients, {seconds:.0f} s\n\n| | {load.args.name} |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


async def measure(args: argparse.Namespace) -> int:
    load = Load(args)
    rows = {} if args.pid is None else {"MB resident, before": memory(args.pid)}
    seconds = await load.run()
    if args.pid is not None:
        rows["MB resident, after"] = memory(args.pid)
    show(load, seconds, rows)
    await load.check_afterwards()
    await load.client.close()
    for problem, count in load.seen.problems.items():
        print(f"problem: {problem} ({count})", file=sys.stderr)
    return 1 if load.seen.problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--name", default="server", help="of the server, in the table")
    parser.add_argument("--key", default="none")
    parser.add_argument("--model", help="default: the server's first")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most")
    parser.add_argument("--words", type=int, default=100, help="of a prompt at most")
    parser.add_argument("--seed", type=int, default=1, help="of what is asked")
    parser.add_argument("--pid", type=int, help="of the server, to see its memory")
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
