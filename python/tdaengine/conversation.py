"""`tdaengine chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ._native import CheckpointError, Error, OptionError
from .commands import answer, open_engine, read_prompt, sampling
from .engine import Engine
from .files import check_output, read_json_object, write

# Where generation_config.json says nothing.
TEMPERATURE, TOP_P = 0.7, 0.9
# What transformers takes for a field that a checkpoint with do_sample leaves out.
DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}

HELP = """\
/help         show this list
/reset        begin anew, with the same system prompt
/system TEXT  change the system prompt; without TEXT remove it
/save FILE    write the conversation as JSON: a list of messages, as Engine.chat takes it
/exit         end, as Ctrl-D does
Ctrl-C stops an answer."""

Message = dict[str, str]


def chat_sampling(
    folder: Path, temperature: float = TEMPERATURE, top_p: float = TOP_P
) -> dict[str, Any]:
    """How an answer is sampled unless the user says otherwise: as generation_config.json says.
    do_sample false means greedy there, and true the defaults of transformers for what is left out;
    without do_sample what is left out is `temperature` and `top_p`. Raises CheckpointError."""
    path = folder / "generation_config.json"
    config = read_json_object(path, optional=True)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: config[name] for name in names if config.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: {name}: found {value!r}, expected a number")
    do_sample = config.get("do_sample")
    if do_sample is None:
        return {"temperature": temperature, "top_p": top_p, **given}
    if do_sample:
        return {**DEFAULTS, **given}
    return {name: given[name] for name in given.keys() & {"repetition_penalty"}}


class Conversation:
    """All that was said, and how much of it the model still sees."""

    def __init__(self, engine: Engine, system: str | None) -> None:
        self.engine = engine
        self.system = system
        self.turns: list[Message] = []
        self._dropped = 0  # of the turns, which come in pairs

    @property
    def messages(self) -> list[Message]:
        return self._with_system(self.turns)

    def _with_system(self, turns: list[Message]) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *turns]

    def reset(self) -> None:
        self.turns = []
        self._dropped = 0

    def prompt(self, question: str, options: Mapping[str, Any]) -> tuple[list[int], int]:
        """Token ids of the conversation with the question behind it, and how many turns had to be
        left out now so that an answer fits."""
        room = options.get("max_new_tokens", min(256, self.engine.max_context // 4))
        turns = [*self.turns, {"role": "user", "content": question}]
        first = self._dropped
        while True:
            ids = self.engine.chat_prompt(self._with_system(turns[first:]))
            if len(ids) + room <= self.engine.max_context or first + 2 > len(self.turns):
                break
            first += 2
        dropped, self._dropped = first - self._dropped, first
        return ids, dropped

    def ask(self, question: str, options: Mapping[str, Any], as_json: bool = False) -> None:
        ids, dropped = self.prompt(question, options)
        if dropped:
            print(f"context full: the oldest {dropped} messages are left out", file=sys.stderr)
        left = {"max_new_tokens": max(1, self.engine.max_context - len(ids))}
        stream = self.engine.stream(ids, **{**left, **options})
        with contextlib.suppress(KeyboardInterrupt) if not as_json else contextlib.nullcontext():
            answer(stream, as_json)  # Ctrl-C stops the answer, not the chat
        self.turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": stream.output.text or ""},
        ]

    def save(self, path: str) -> None:
        check_output(path)
        text = json.dumps(self.messages, ensure_ascii=False, indent=2)
        # What is no Unicode becomes an escape, as JSON writes it.
        write(Path(path), (text + "\n").encode("utf-8", "backslashreplace"))


def run_chat(args: argparse.Namespace) -> None:
    message = args.message
    if message is not None or args.file is not None:
        message = read_prompt(message, args.file, "--message")
    elif args.json:
        raise OptionError("--json: needs --message or --file")
    engine = open_engine(args)
    options = {**chat_sampling(engine.path), **sampling(args)}
    conversation = Conversation(engine, args.system)
    if message is not None:
        conversation.ask(message, options, args.json)
        return
    for line in _lines():
        try:
            if line.startswith("/") and "/" not in line.split()[0][1:]:
                _command(conversation, *line.split(maxsplit=1))
            else:
                conversation.ask(line, options)
        except (Error, OSError) as error:
            print(f"error: {error}", file=sys.stderr)


def _command(conversation: Conversation, name: str, rest: str = "") -> None:
    if name == "/help":
        print(HELP)
    elif name == "/reset":
        conversation.reset()
    elif name == "/system":
        conversation.system = rest or None
    elif name == "/save":
        if not rest:
            raise OptionError("/save: expected /save FILE")
        conversation.save(rest)
    else:
        raise OptionError(f"{name}: no such command, /help lists them")


def _lines() -> Iterator[str]:
    """What the user types, until /exit or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() editing and history
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line
