"""Servers for tests: real processes on the loopback device."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import openai

PATIENCE = 60  # seconds, far beyond what anything here takes
# Generates for minutes unless it is stopped.
ENDLESS = {"max_tokens": 150_000, "temperature": 0, "extra_body": {"ignore_eos": True}}


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    def __init__(self, process: subprocess.Popen, log: Path, key: str) -> None:
        self.process, self._log, self.key = process, log, key
        line = process.stdout.readline()
        assert line, log.read_text()
        self.url = json.loads(line)["url"]
        self.model = json.loads(line)["model"]
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE
        )

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """body: bytes as they are, an iterable of bytes in chunks, else as JSON."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE)
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        sent = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, body, sent | (headers or {}))
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        text = self.ask("GET", "/metrics").body.decode()
        found = re.findall(rf"^tdaengine_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def wait_for(self, name: str, value: float, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {found}, expected {value}"
            time.sleep(0.02)

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def stop(self) -> int:
        """Its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def serving(model: Path, *options: str, key: str = "") -> Iterator[Server]:
    """A server with one thread that computes; with a key it takes that from its environment."""
    command = [sys.executable, "-m", "tdaengine", "serve", str(model), "--port", "0", "--json"]
    environment = {**os.environ, **({"TDAENGINE_API_KEY": key} if key else {})}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, "--threads", "1", *options],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        try:
            yield Server(process, log, key or "none")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
