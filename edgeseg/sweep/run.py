"""A sweep from its config to its results: build what is missing, measure what has not been, put it together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from edgeseg.arguments import words_of
from edgeseg.decide.entries import Run, read_runs
from edgeseg.errors import ArtifactError, BuildError, SpecError, typed
from edgeseg.evaluate.results import read_report
from edgeseg.evaluate.tables import counted
from edgeseg.store.atomic import HeldError, lock
from edgeseg.store.engine import open_engine
from edgeseg.sweep.config import Cell, SweepConfig, expand
from edgeseg.sweep.executors import Built, build_locally, build_on_ray
from edgeseg.sweep.state import UNFINISHED, CellState, bench_key, cell_key, check_ours, is_done, remember

_TAIL_BYTES = 8192
Say = Callable[[str], None]
Bench = Callable[[Sequence[str]], "str | None"]
"""Runs ``edgeseg`` with these arguments; returns why it failed, or ``None``."""


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep: the measured runs, and the cells that failed, each with its reason."""

    runs: tuple[Run, ...]
    failures: tuple[tuple[str, str], ...]


def run_sweep(
    config: SweepConfig,
    *,
    jobs: int = 1,
    executor: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    reports: Sequence[Path] = (),
    force: bool = False,
    say: Say,
    build: Callable[[Sequence[Cell]], Iterator[Built]] | None = None,
    bench: Bench | None = None,
) -> SweepResult:
    """Build and measure every combination of ``config``; what was done before with the same inputs is reused.

    Building may go on in parallel; measuring is one process after another, when no build runs.

    Args:
        config: what to do.
        jobs: local processes that build.
        executor: where to build.
        ray_address: of the cluster, for the executor ``ray``.
        reports: files in the sweep's folder that the caller will write from the result.
        force: replace engine folders and reports in the sweep's folder that no sweep wrote.
        say: gets a line of progress at a time.
        build: replaces the executor (tests bring their own).
        bench: replaces the measuring process (tests bring their own).

    Raises:
        SpecError: the config cannot be, see :func:`edgeseg.sweep.config.expand`, or its data is not there.
        OutputExistsError: see :func:`edgeseg.sweep.state.check_ours`.
        ArtifactError: another sweep works in the same folder, or something is in the way of an engine folder.
        BuildError: not one cell could be built and measured.
    """
    if jobs < 1:
        raise SpecError(f"{jobs} jobs for the sweep; give 1 or more")
    cells = expand(config)
    data = config.data
    if data is not None and not data.exists():  # said before hours of building, not after
        raise SpecError(f"bench.data {data} of the sweep is not there; give images, or demo, or leave it out")
    check_ours(cells, reports, force=force)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with lock(output / ".lock", timeout_s=0):
            keys = {cell.name: cell_key(cell) for cell in cells}
            todo = [cell for cell in cells if not is_done(cell, keys[cell.name])]
            say(f"{counted(len(cells), 'cell')}, {len(cells) - len(todo)} built before")
            for cell in todo:  # should the sweep be killed, the folders that appear are known as its own
                remember(cell, CellState(cell.name, keys[cell.name], 0.0, UNFINISHED))
            on_ray, here = partial(build_on_ray, address=ray_address), partial(build_locally, jobs=jobs)
            chosen = build or (on_ray if executor == "ray" else here)
            failures = list(_build(todo, keys, chosen, say))
            failed = {name for name, _ in failures}
            runs, unmeasured = _measure(
                config, tuple(cell for cell in cells if cell.name not in failed), bench or run_edgeseg, say
            )
    except HeldError as exc:
        raise ArtifactError(f"another sweep is working in {output}; wait for it or give another output") from exc
    failures += unmeasured
    if not runs:
        raise BuildError(
            f"none of {counted(len(cells), 'cell')} gave a result; {': '.join(failures[0])}"
            + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else "")
        )
    return SweepResult(runs, tuple(failures))


def _build(
    cells: Sequence[Cell], keys: dict[str, str], build: Callable[[Sequence[Cell]], Iterator[Built]], say: Say
) -> Iterator[tuple[str, str]]:
    if not cells:
        return
    for done, built in enumerate(build(cells), start=1):
        name = built.cell.name
        remember(built.cell, CellState(name, keys[name], built.seconds, built.reason))
        outcome = "built" if built.reason is None else f"failed: {built.reason}"
        say(f"[{done}/{len(cells)}] {name} {outcome} ({built.seconds:.0f} s)")
        if built.reason is not None:
            yield name, built.reason


def _measure(
    config: SweepConfig, cells: tuple[Cell, ...], bench: Bench, say: Say
) -> tuple[tuple[Run, ...], list[tuple[str, str]]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault("all" if config.bench.get("together", "all") == "all" else cell.model, []).append(cell)
    runs: list[Run] = []
    failures: list[tuple[str, str]] = []
    for name, built in groups.items():
        members = [cell for cell in built if open_engine(cell.folder).manifest.engine is not None]
        # Measuring them could only fail, today as well as in the next run.
        failures += [
            (cell.name, f"built, not measured: it holds a portable graph only; run: {typed('compile', cell.folder)}")
            for cell in built
            if cell not in members
        ]
        if not members:
            continue
        options = bench_options(config)
        key = bench_key(tuple(members), options, config.data)
        path = Path(config.output) / "results" / f"{name.replace('/', '-')}-{key[:12]}.json"
        # What failed is tried again, and with it all others: engines compare only when measured in turns.
        if path.is_file() and not read_report(path).failed:
            say(f"{counted(len(members), 'engine')} measured before: {path}")
        else:
            say(f"measuring {counted(len(members), 'engine')} in turns")
            path.unlink(missing_ok=True)
            folders = [str(cell.folder) for cell in members]
            reason = bench(["bench", *folders, *options, "--json", str(path)])
            if not path.is_file():
                failures += [(cell.name, f"not measured: {reason}") for cell in members]
                continue
        runs += read_runs([path])
    return tuple(runs), failures


def bench_options(config: SweepConfig) -> tuple[str, ...]:
    """The options of ``edgeseg bench`` that the config's ``[bench]`` stands for."""
    speed, accuracy = config.measuring()
    return tuple(
        word for request in (speed, accuracy)[: 1 + (accuracy.data is not None)] for word in words_of(request) or ()
    )


def run_edgeseg(arguments: Sequence[str]) -> str | None:
    """Run ``edgeseg`` in a process of its own, so that nothing of the builds is left in the one that measures.

    What it says is passed on as it comes; returns its error, ``None`` when it ended well.
    """
    environment = dict(os.environ)
    if sys.stderr.isatty():
        environment["FORCE_COLOR"] = "1"  # a pipe is no terminal, but what goes through it ends on one: show the bar
    command = [sys.executable, "-m", "edgeseg", *arguments]
    said = b""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, bufsize=0
    ) as process:
        assert process.stderr is not None  # asked for as a pipe
        try:
            while part := process.stderr.read(4096):
                sys.stderr.write(part.decode(errors="replace"))
                sys.stderr.flush()
                said = (said + part)[-_TAIL_BYTES:]
        except BaseException:
            process.terminate()
            raise
    if process.returncode == 0:
        return None
    errors = [line for line in said.decode(errors="replace").splitlines() if line.startswith("edgeseg: ")]
    return errors[-1].removeprefix("edgeseg: ") if errors else f"edgeseg bench ended with code {process.returncode}"
