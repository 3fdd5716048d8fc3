"""Typing ``edgeseg`` commands in this process: a program of its own would first import all that is imported already."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys

import pytest


def imported(words: list[str], heavy: set[str], code: int = 0) -> str:
    """What ``edgeseg WORDS`` prints in a process of its own; it ends with this code and has imported nothing ``heavy``."""
    program = (
        f"import sys; sys.argv = {['edgeseg', *words]!r}\n"
        "from edgeseg.cli import main\n"
        "try: main()\n"
        f"except SystemExit as e: assert e.code == {code}, e.code\n"
        f"assert not {heavy!r} & set(sys.modules), {heavy!r} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def typed(*words: object) -> subprocess.CompletedProcess[str]:
    """Run ``edgeseg WORDS`` as the program does, to its exit code; what it printed is in the result."""
    from edgeseg.cli.app import main

    printed, said = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    command = ["edgeseg", *map(str, words)]
    on_term = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
    signal.signal(signal.SIGTERM, on_term)
    out, err = (stream.buffer.getvalue().decode() for stream in (printed, said))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(command, int(ended.value.code or 0), out, err)
