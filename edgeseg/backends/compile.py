"""``edgeseg compile``: a device's own engine from the portable graph, without PyTorch."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from edgeseg.backends import BACKENDS, Backend, require_builder
from edgeseg.backends.base import BuildContext
from edgeseg.backends.portable import awaits_calibration, builds_here, check_options
from edgeseg.backends.signature import check_graph
from edgeseg.errors import ArtifactError, BuildError, SpecError, typed
from edgeseg.machine.cpu import this_cpu
from edgeseg.progress import Reporter, SilentReporter, stage
from edgeseg.store.atomic import lock
from edgeseg.store.documents import write_json
from edgeseg.store.engine import (
    Engine,
    check_engine_folder,
    check_file,
    engine_folder,
    engine_paths,
    open_engine,
    read_manifest,
)
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import MANIFEST_NAME, MIN_INT8_SHARE, Manifest, OnnxGraph


def recompile(engine: Engine) -> Engine:
    """Build a stale engine again, in its folder, for this machine and with the options it was built with.

    Where several processes find the same engine stale (the services of a device after an update), one builds it, and the
    others wait and take that.

    Raises:
        ArtifactError, BuildError, SpecError: see :func:`compile_folder`; also when nothing can be written where it is.
    """
    manifest = engine.manifest
    options: dict[str, Any] = {}
    if manifest.target == "tensorrt-rtx" and (asked := manifest.options_given.get("sm")):
        from edgeseg.backends.tensorrt.rtx import backend as rtx

        # It is to run here, whatever else it is for.
        options["sm"] = tuple(dict.fromkeys((*asked, *rtx().own_sm())))
    with _turn(engine.folder):
        if read_manifest(engine.folder) != manifest:
            return open_engine(engine.folder)
        return compile_folder(engine.folder, options=options)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold the lock of those who compile ``folder`` again, waiting for it."""
    folder = Path(os.path.realpath(folder))
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder.parent / f".{folder.name}.recompile.lock"))
        except OSError as exc:
            raise ArtifactError(
                f"{folder} was built for another device or version, and cannot be compiled again where it is "
                f"({exc.strerror}); run: {typed('compile', folder, '--output', 'FOLDER')}"
            ) from exc
        yield


def engine_folders(folders: Sequence[Path]) -> list[Path]:
    """The engine folders in each of ``folders``, by name. Raises ``ArtifactError`` for one that holds none."""
    chosen = []
    for folder in folders:
        try:
            inside = sorted(path for path in folder.iterdir() if (path / MANIFEST_NAME).is_file())
        except OSError as exc:
            raise ArtifactError(
                f"cannot list {folder}: {exc.strerror}; give a folder that holds engine folders"
            ) from exc
        if not inside:
            raise ArtifactError(f"{folder} holds no engine folders; give one that does, or leave --all out")
        chosen += inside
    return chosen


def compile_folder(
    folder: Path,
    *,
    target: str | None = None,
    options: Mapping[str, Any] | None = None,
    output: Path | None = None,
    force: bool = False,
    candidate: int | None = None,
    reporter: Reporter | None = None,
) -> Engine:
    """Build an engine for this machine from the portable graph of ``folder``.

    Args:
        folder: an engine folder; only its graph and calibration table need to be intact.
        target: backend; default the one the folder was built for.
        options: backend settings, over those the folder was built with for the same backend; ``None`` as a value asks for
            the default again.
        output: folder to write; default ``folder`` itself, replaced when the new engine is complete.
        force: replace an engine folder that is at ``output``.
        candidate: take the graph of this candidate of the folder's search instead.
        reporter: told about progress; default silent.

    Raises:
        ArtifactError: the folder's manifest or graph is damaged, or the graph is not of the manifest's contract.
        OutputExistsError: ``output`` exists.
        BuildError: the graph's scheme is not one this backend runs fast here, or the build failed.
        SpecError: a wrong option, or one kept from the folder that cannot be had here.
    """
    target_folder = output or folder
    old = read_manifest(folder)
    if candidate is not None:
        old = _with_candidate(old, candidate)
    check_engine_folder(target_folder, force=force or output is None)
    check_file(folder, old.graph)
    backend = require_builder(target or old.target)
    if not builds_here(backend, old.scheme):
        cpu = this_cpu()
        raise BuildError(
            f"{folder} is quantized for another CPU than this one ({old.scheme}; {cpu.name} takes {backend.scheme}), which "
            "would compute it wrongly or slowly; compile it on its device, or make one for this CPU: "
            f"edgeseg build ... --scheme {backend.scheme}"
        )
    graph = _graph_of(folder, old)
    kept = old.options_given if backend.name == old.target else {}
    asked = options or {}
    with _naming_kept(kept.keys() - asked.keys(), folder):
        given = check_options(backend.name, {**kept, **asked})
    check_graph(graph.path, graph.spec)  # an engine of another one could not be loaded, and may replace one that can
    reporter = reporter or SilentReporter()
    with engine_folder(target_folder, force=force or output is None) as scratch:
        shutil.copyfile(graph.path, scratch / old.graph.name)
        if old.calibration is not None:
            check_file(folder, old.calibration)
            shutil.copyfile(folder / old.calibration.name, scratch / old.calibration.name)
        for other in old.search.graphs if old.search is not None else ():
            check_file(folder, other)
            shutil.copyfile(folder / other.name, scratch / other.name)
        copied = dataclasses.replace(graph, path=scratch / old.graph.name)
        with stage(reporter, "compile") as said:
            with _naming_kept(kept.keys() - asked.keys(), folder):
                built = backend.build(copied, scratch, given, BuildContext(reporter.progress, scratch.parent))
            for note in built.notes:
                reporter.note(note)
            share = built.precision.mac_share.get(built.precision.requested, 0.0)
            said.append(f"{backend.name}: {share:.1%} of MACs in {built.precision.requested}")
        if built.precision.requested == "int8" and share < MIN_INT8_SHARE and old.search is None:
            reporter.note(_says_float(folder, old.scheme, backend, share))
        assert built.path is not None  # a backend that can build here does
        manifest = dataclasses.replace(
            old,
            name=target_folder.name,
            target=backend.name,
            precision=built.precision,
            engine=FileRef.of(built.path),
            extra_files=tuple(FileRef.of(path) for path in built.extra_files),
            options=dict(built.options),
            options_given=given,
            # What made the graph stays; the backend that made the engine before is none of this one's.
            versions={name: v for name, v in old.versions.items() if name not in BACKENDS} | dict(built.versions),
            device=dict(built.device),
            candidates={},
            search=old.search and old.search.untimed(),
            command=old.command if (backend.name, given) == (old.target, old.options_given) else None,
        )
        if manifest.engine_key != old.engine_key:
            manifest = dataclasses.replace(manifest, verification=None)
        write_json(scratch / MANIFEST_NAME, manifest)
    return open_engine(target_folder)


def _with_candidate(manifest: Manifest, index: int) -> Manifest:
    """The manifest of the folder with another of its graphs as the one that counts."""
    search = manifest.search
    assert search is not None  # the caller read the index there
    chosen = search.candidates[index]
    assert chosen.graph is not None
    return dataclasses.replace(
        manifest,
        graph=chosen.graph,
        scheme=chosen.scheme,
        precision=dataclasses.replace(manifest.precision, requested=chosen.precision),
        search=dataclasses.replace(search, chosen=index),
    )


def write_graph_for_tensorrt_8(folder: Path, output: Path, *, force: bool = False) -> tuple[str, ...]:
    """Write the portable graph of ``folder``, in opset 17, as TensorRT 8's own ``trtexec`` takes it (8.5 and 8.6).

    Args:
        folder: an engine folder; only its graph needs to be intact.
        output: the ONNX file to write.
        force: replace a file that is there.

    Returns:
        what ``trtexec`` needs to be told beside ``--onnx``: precisions, and shapes where they are dynamic.

    Raises:
        ArtifactError: the folder's manifest or graph is damaged, or ``output`` cannot be written.
        OutputExistsError: ``output`` exists.
        SpecError: a graph quantized for another target.
        BuildError: the graph has something that cannot be written so.
    """
    from edgeseg.backends.tensorrt.graph import ParsedGraph
    from edgeseg.backends.tensorrt.options import profile_shapes
    from edgeseg.store.files import check_outputs
    from edgeseg.store.onnx_file import write_onnx

    manifest = read_manifest(folder)
    check_outputs([output], force=force, inputs=engine_paths(folder))
    check_file(folder, manifest.graph)
    graph = _graph_of(folder, manifest)
    float_graph = awaits_calibration(manifest.precision, manifest.options)
    parsed = ParsedGraph.read(graph, graph.precision)
    parsed.require_fits(implicit=float_graph)
    write_onnx(parsed.for_parser(opset_17=True, has_normalization=False).model, output)
    flags = {"fp32": (), "fp16": ("--fp16",), "int8": ("--int8", "--fp16")}["fp32" if float_graph else graph.precision]
    shapes = profile_shapes(manifest.spec.input, None, None)
    if shapes is None:
        return flags
    named = zip(("min", "opt", "max"), shapes, strict=True)
    return (*flags, *(f"--{name}Shapes=image:{'x'.join(map(str, shape))}" for name, shape in named))


def _graph_of(folder: Path, manifest: Manifest) -> OnnxGraph:
    return OnnxGraph(
        path=folder / manifest.graph.name,
        sha256=manifest.graph.sha256,
        precision=manifest.precision.requested,
        spec=manifest.spec,
        weights_sha256=manifest.inputs_sha256.get("weights", ""),
        scheme=manifest.scheme,
    )


def _says_float(folder: Path, scheme: str | None, backend: Backend, share: float) -> str:
    said = f"int8 was asked for, but {backend.name} executes only {share:.1%} of the multiply-accumulates in int8"
    if scheme == backend.scheme:
        return said
    return (
        f"{said}: {folder} is quantized for {scheme}; for an engine that is int8, build it for this target: "
        f"edgeseg build ... --target {backend.name}"
    )


@contextmanager
def _naming_kept(kept: Collection[str], folder: Path) -> Iterator[None]:
    """An error about an option nobody gave now says where it comes from and how to be rid of it."""
    try:
        yield
    except SpecError as exc:
        # Messages speak of "implicit calibration" as well as of implicit_calibration.
        named = sorted(name for name in kept if name in str(exc) or name.replace("_", " ") in str(exc))
        if not named:
            raise
        drop = " ".join(f"--backend-option {name}=null" for name in named)
        raise SpecError(f"{exc}; {', '.join(named)} was kept from {folder}, to drop it: {drop}") from exc
