"""The standard streams, which may be terminals, closed, full, or unable to encode a text."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO, cast

# What a terminal obeys or reorders text by, instead of showing it: C0 controls but for newline and
# tab, DEL and C1 controls, bidirectional embeddings and isolates, and raw bytes.
_CONTROLS = (range(0x20), range(0x7F, 0xA0), range(0x202A, 0x202F), range(0x2066, 0x206A))
_RAW_BYTES = range(0xD800, 0xE000)
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for codes in (*_CONTROLS, _RAW_BYTES)
    for code in codes
    if chr(code) not in "\n\t"
}


class Output(io.TextIOBase):
    """Writes every text to a stream: characters that its encoding lacks become escapes, as \\u20ac,
    and so do those that a terminal would obey, where the stream is one. As each character is
    judged by itself, a text may come in pieces.

    is_needed: if nothing can be written, that is an OSError; else what is written is lost.
    """

    def __init__(self, stream: TextIO, is_needed: bool = True, is_safe: bool = False) -> None:
        self._stream = stream
        self._is_needed = is_needed
        self._is_escaped = stream.isatty() and not is_safe
        self._error: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return self._stream.errors or "strict"

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        shown = text.translate(_ESCAPES) if self._is_escaped else text
        try:
            shown.encode(self.encoding, self.errors)
        except UnicodeEncodeError:
            shown = shown.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._attempt(self._stream.write, shown)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def unescaped(self) -> Output:
        """The same stream for those who move the cursor themselves."""
        return Output(self._stream, self._is_needed, is_safe=True)

    def _attempt(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            if self._error is None:
                action(*arguments)
        except OSError as error:
            # What is still in its buffer shall not fail again when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._error = error
        if self._error is None or not self._is_needed:
            return
        # Every time, for argparse swallows it.
        if isinstance(self._error, BrokenPipeError):
            raise self._error
        raise OSError(f"standard output: {self._error.strerror}") from self._error


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """While it lasts, all three standard streams are there and take every text.

    One that the process was started without is /dev/null, which keeps its number from going to the
    next file that is opened. Then messages are lost, standard input is at its end, and printing to
    standard output fails, as it does on a full disk.
    """
    with contextlib.ExitStack() as stack:
        # In the order of their numbers: open() gives the lowest that is free.
        if sys.stdin is None:
            sys.stdin = stack.enter_context(open(os.devnull))
            stack.callback(setattr, sys, "stdin", None)
        elif isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "strict":
            sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer will name such a text
        out = sys.stdout or os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
        err = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        stack.enter_context(contextlib.redirect_stdout(Output(out)))
        stack.enter_context(contextlib.redirect_stderr(Output(err, is_needed=False)))
        yield


def for_bars() -> TextIO:
    """Standard error for progress bars, which move the cursor."""
    err = sys.stderr
    return cast(TextIO, err.unescaped()) if isinstance(err, Output) else err
