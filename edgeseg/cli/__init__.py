"""The ``edgeseg`` command: one module per verb, errors mapped to exit codes in :mod:`edgeseg.cli.app`."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Entry point of a process that is ``edgeseg`` and nothing else: :func:`edgeseg.cli.app.main`, and an end that does not
    wait."""
    code: list[int] = []
    # Registered first, so called last: threads, workers and scratch folders have ended by then.
    atexit.register(_end_at_once, code)
    try:
        from edgeseg.cli import app  # most of the time until the command begins

        app.main()
    except SystemExit as end:
        code.append(int(end.code or 0))
        raise
    except KeyboardInterrupt:  # before or after what the command says itself
        code.append(130)
        sys.stderr.write("edgeseg: interrupted\n")
        sys.exit(130)


def _end_at_once(code: list[int]) -> None:
    """Leave the half a million objects of torch to the system: Python takes more than a second to free them one by one.

    After an interruption that compiled code met first, Python would end itself by the signal, whatever the code is.
    """
    if code and ("torch" in sys.modules or code[0] == 130):
        os._exit(code[0])
