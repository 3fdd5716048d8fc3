"""``edgeseg compile`` of a folder that carries several graphs which meet a goal: the device builds, times and chooses."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgeseg.backends import get_backend
from edgeseg.backends.compile import compile_folder
from edgeseg.errors import BuildError
from edgeseg.evaluate.latency.protocol import measure_sessions
from edgeseg.progress import Reporter, SilentReporter, stage
from edgeseg.store.atomic import scratch_folder
from edgeseg.store.documents import write_json
from edgeseg.store.engine import Engine, check_engine_folder, engine_folder, open_engine, read_manifest
from edgeseg.store.manifest import MANIFEST_NAME, Manifest


def compile_fastest(
    folder: Path,
    *,
    target: str | None = None,
    options: Mapping[str, Any] | None = None,
    output: Path | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Engine:
    """Build this machine's engine of each graph the folder carries, time them in turns, and keep the fastest.

    A folder with one graph, or whose engines cannot run here, is compiled as it is. Arguments and errors are those of
    :func:`~edgeseg.backends.compile.compile_folder`; a graph of several that cannot be built is left out, with a note.
    """
    reporter = reporter or SilentReporter()
    manifest = read_manifest(folder)
    indices = carried_candidates(manifest)
    name = target or manifest.target
    if len(indices) < 2 or name != manifest.target or not get_backend(name).status().available:
        return compile_folder(folder, target=target, options=options, output=output, force=force, reporter=reporter)
    place, force = output or folder, force or output is None
    check_engine_folder(place, force=force)
    # Beside the result, where there is room for engines.
    with scratch_folder(place.absolute().parent) as scratch:
        engines: dict[int, Engine] = {}
        for index in indices:
            try:
                engines[index] = compile_folder(
                    folder, options=options, output=scratch / str(index), candidate=index, reporter=reporter
                )
            except BuildError as exc:
                if index == indices[-1] and not engines:
                    raise
                reporter.note(f"candidate {index} is left out: {exc}")
        with stage(reporter, "measure") as said:
            with ExitStack() as opened:
                sessions = {
                    str(index): opened.enter_context(get_backend(name).load(engine))
                    for index, engine in engines.items()
                }
                measured = measure_sessions(sessions, manifest.spec)
            medians = {index: samples.median_ms for index, samples in measured.items()}
            said.append(", ".join(f"{ms:.1f} ms" for ms in medians.values()))
        best = min(engines, key=lambda index: medians[str(index)])
        chosen = engines[best].manifest
        assert chosen.search is not None  # it is the folder's
        timed = tuple(
            dataclasses.replace(candidate, median_ms=medians.get(str(index)))
            for index, candidate in enumerate(chosen.search.candidates)
        )
        with engine_folder(place, force=force) as result:
            for file in chosen.files:
                shutil.copyfile(engines[best].folder / file.name, result / file.name)
            search = dataclasses.replace(chosen.search, candidates=timed)
            write_json(result / MANIFEST_NAME, dataclasses.replace(chosen, name=place.name, search=search))
    return open_engine(place)


def carried_candidates(manifest: Manifest) -> list[int]:
    """Which of a search's candidates the folder has a graph of."""
    candidates = () if manifest.search is None else manifest.search.candidates
    return [index for index, candidate in enumerate(candidates) if candidate.graph is not None]
