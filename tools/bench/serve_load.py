"""Many clients at once on a server with the OpenAI API: latencies, and whether anything is lost.

    tdaengine serve MODEL --port 8000 --queue 64 &
    python tools/bench/serve_load.py --url http://127.0.0.1:8000 --clients 64 --seconds 120 --pid $!

Of the requests some are streams, some are whole, some clients leave in the midst, some send too
much. --url takes any server of the kind, to compare; --pid shows the memory of one here.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import openai

KINDS = {"stream": 12, "whole": 4, "leave": 3, "oversized": 1}  # how often, relatively
WORDS = ("sky", "sea", "blue", "deep", "bird", "sings", "of", "the", "river", "and", "May")


@dataclass
class Seen:
    """What all clients met."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to the first piece of a stream
    whole: list[float] = field(default_factory=list)  # seconds to the end of any answer
    tokens: int = 0


async def one(client: openai.AsyncOpenAI, args: argparse.Namespace, seen: Seen) -> None:
    kind = random.choices(list(KINDS), list(KINDS.values()))[0]
    prompt = " ".join(random.choices(WORDS, k=random.randint(5, args.words)))
    if kind == "oversized":
        prompt *= 10_000_000 // len(prompt)
    started = time.monotonic()
    asked = {
        "model": args.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": args.tokens,
        "temperature": 0,
    }
    try:
        if kind in ("whole", "oversized"):
            answer = await client.chat.completions.create(**asked)
            seen.tokens += answer.usage.completion_tokens
        else:
            count = 0
            async with await client.chat.completions.create(**asked, stream=True) as stream:
                async for _ in stream:
                    count += 1
                    if count == 1:
                        seen.first.append(time.monotonic() - started)
                    if kind == "leave" and count > 3:
                        break
            seen.tokens += count
        seen.whole.append(time.monotonic() - started)
        seen.outcomes[f"{kind}: answered"] += 1
    except openai.RateLimitError as error:
        seen.outcomes[f"{kind}: told to come back"] += 1
        await asyncio.sleep(float(error.response.headers.get("Retry-After", 1)))
    except openai.APIStatusError as error:
        seen.outcomes[f"{kind}: status {error.status_code}"] += 1
    except openai.APIConnectionError:
        seen.outcomes[f"{kind}: connection lost"] += 1


async def load(args: argparse.Namespace) -> Seen:
    seen, end = Seen(), time.monotonic() + args.seconds
    client = openai.AsyncOpenAI(
        base_url=f"{args.url}/v1", api_key=args.key, max_retries=0, timeout=600
    )
    if args.model is None:
        args.model = (await client.models.list()).data[0].id

    async def go_on() -> None:
        while time.monotonic() < end:
            await one(client, args, seen)

    await asyncio.gather(*(go_on() for _ in range(args.clients)))
    await client.close()
    return seen


def memory(pid: int | None) -> str:
    """Resident, of a process here."""
    if pid is None:
        return "not asked for"
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return f"{int(kilobytes) / 1000:.0f} MB"


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return "too few | too few"
    parts = statistics.quantiles(values, n=20)
    return f"{parts[9]:.2f} | {parts[18]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    parser.add_argument("--model", help="default: the server's first")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most")
    parser.add_argument("--words", type=int, default=100, help="of a prompt at most")
    parser.add_argument("--pid", type=int, help="of the server, to see its memory")
    args = parser.parse_args()
    random.seed(1)
    before, started = memory(args.pid), time.monotonic()
    seen = asyncio.run(load(args))
    seconds = time.monotonic() - started
    print(f"{args.clients} clients, {seconds:.0f} s, {seen.tokens / seconds:.1f} tokens/s")
    print(f"memory before {before}, after {memory(args.pid)}\n")
    print("| seconds to | p50 | p95 |\n|---|---|---|")
    print(f"| the first piece | {spread(seen.first)} |")
    print(f"| the end | {spread(seen.whole)} |\n")
    for outcome, count in sorted(seen.outcomes.items()):
        print(f"{count:6} {outcome}")


if __name__ == "__main__":
    main()
