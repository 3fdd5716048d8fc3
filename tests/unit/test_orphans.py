"""Workers of a process that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from edgeseg.machine.orphans import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


SWEEP = """
import dataclasses, os, signal, sys, threading
from pathlib import Path
from edgeseg.cli.app import _terminate
from edgeseg.sweep import executors
from edgeseg.sweep.executors import Built, build_locally

executors._SECONDS_TO_END = 0.2 if sys.argv[1] == "deaf" else 60

@dataclasses.dataclass(frozen=True)
class Cell:
    name: str

def build(cell):
    try:
        Path(cell.name).touch()
        print(os.getpid(), flush=True)
        threading.Event().wait(60)
    except KeyboardInterrupt:
        threading.Event().wait(60 if sys.argv[1] == "deaf" else 0)
        raise
    finally:
        Path(cell.name).unlink()
    return Built(cell, 0.0)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    list(build_locally([Cell("a"), Cell("b")], 1, build))
"""


def is_running(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 20
        while is_running(worker):
            assert time.monotonic() < deadline, "the worker outlived its parent"
            time.sleep(0.02)


@pytest.mark.parametrize("library", ["plain", "deaf"])
def test_a_sweep_that_is_told_to_end_ends_what_it_builds(tmp_path: Path, library: str) -> None:
    """``kill`` and a service that stops tell the sweep alone: its builders clean up and end, and no other is started. A
    library that catches the interruption keeps nobody waiting."""
    (tmp_path / "sweep.py").write_text(SWEEP)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "sweep.py", library], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as sweep:
        assert sweep.stdout is not None
        builder = int(sweep.stdout.readline())
        sweep.send_signal(signal.SIGTERM)
        rest, _ = sweep.communicate(timeout=30)
    assert rest == "" and not is_running(builder)
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["a", "sweep.py"] if library == "deaf" else ["sweep.py"]
    )
