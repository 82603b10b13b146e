"""`tdaengine serve`: the server, where its extra is installed."""

from __future__ import annotations

import argparse

from ._native import OptionError


def run_serve(args: argparse.Namespace) -> None:
    try:
        from .server.run import serve
    except ImportError as error:
        raise OptionError(f"serve needs {error.name}: pip install 'tdaengine[server]'") from error
    serve(args)
