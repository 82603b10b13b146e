"""From the command line to a server that runs, and back."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from .._native import OptionError
from ..commands import open_engine, print_json
from ..prefix_cache import size
from .app import Service, Settings, make_app
from .gate import Rules
from .logs import log, set_up

KEY_VARIABLE = "TDAENGINE_API_KEY"
LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))


def serve(args: argparse.Namespace) -> None:
    """Until SIGTERM or Ctrl-C. Raises OptionError, CheckpointError or DeviceError before."""
    key = _api_key(args)
    _check_limits(args)
    cache_memory = _cache_memory(args)
    with contextlib.closing(_bind(args.host, args.port)) as listener:
        set_up()
        address, port = listener.getsockname()[:2]
        engine = open_engine(args, cache_memory=cache_memory)
        is_loopback = address in ("127.0.0.1", "::1")
        settings = Settings(
            model=args.name or _name(args.model),
            rules=Rules(
                api_key=key,
                most_bytes=args.max_body,
                hosts=LOOPBACK | {args.host} if is_loopback and key is None else None,
            ),
            parallel=args.parallel,
            queue=args.queue,
            cors=tuple(args.cors),
        )
        app = make_app(Service(engine, settings), settings)
        if not is_loopback and key is None:
            log("warning", message="no API key: whoever reaches this machine may use the server")
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=args.drain,
            )
        )
        shown = f"[{address}]" if ":" in address else address
        url = f"http://{shown}:{port}"
        log("listening", url=url, model=settings.model, weights=engine.weights)
        if args.json:
            print_json({"url": url, "model": settings.model})
            sys.stdout.flush()
        with _ended_by_sigterm():
            server.run(sockets=[listener])
        log("ended")


def _api_key(args: argparse.Namespace) -> str | None:
    name, key = "--api-key", args.api_key
    if key is None:
        name, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key or not all("!" <= character <= "~" for character in key):
        raise OptionError(f"{name}: expected one or more ASCII characters without spaces")
    return str(key)


def _check_limits(args: argparse.Namespace) -> None:
    for name, least, most in (
        ("port", 0, 65535),
        ("parallel", 1, 256),
        ("queue", 0, 100_000),
        ("max_body", 1, 1 << 30),
        ("drain", 0, 86_400),
    ):
        value = getattr(args, name)
        if not least <= value <= most:
            raise OptionError(
                f"--{name.replace('_', '-')}: found {value}, expected {least} to {most}"
            )


def _cache_memory(args: argparse.Namespace) -> int | None:
    return None if args.cache_memory is None else size(args.cache_memory, "--cache-memory")


def _bind(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that a port in use is known at once."""
    try:
        family, kind, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise OptionError(f"--host {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Else two servers that only bound would both get here.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OptionError(f"--host {host} --port {port}: {error.strerror}") from error
    return listener


def _name(model: str) -> str:
    """A hub id is the name itself."""
    return Path(model).resolve().name if Path(model).exists() else model


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A server that has drained ends as if it was asked to: uvicorn raises the signal once more."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
