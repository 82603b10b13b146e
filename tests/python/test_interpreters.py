"""Interpreters beside the main one."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PROGRAM = """
    import sys
    try:
        import _xxsubinterpreters as interpreters  # until Python 3.12
    except ImportError:
        import _interpreters as interpreters

    def run_in_another(code):
        other = interpreters.create()
        try:
            code = f"import sys; sys.path[:] = {sys.path}; {code}"
            error = interpreters.run_string(other, code)
            if error is not None:  # from Python 3.13 on
                return str(error.formatted)
        except interpreters.RunFailedError as error:
            return str(error)
        finally:
            interpreters.destroy(other)
        return "imported"

    print(run_in_another("import tdaengine"))
    print(run_in_another("import tdaengine._native"))
    import tdaengine
    print(run_in_another("import tdaengine._native"))
    print(tdaengine.TDA(active=0.5).active)
"""


def test_subinterpreters_are_refused_and_the_main_one_works():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *refused, active = done.stdout.splitlines()
    assert active == "0.5"
    assert len(refused) == 3
    for message in refused:
        assert "ImportError" in message
        assert "interpreter" in message
