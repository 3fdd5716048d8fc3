"""From the model asked for to its checked fp32 graph: load, input size, export."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeseg.convert.saved_preprocessing import CONFIG_NAME
from edgeseg.errors import SpecError
from edgeseg.evaluate.tables import counted
from edgeseg.graph.grid import Marks
from edgeseg.pipeline.candidate import GRAPH_NAME
from edgeseg.pipeline.verification_data import sample_images
from edgeseg.progress import Reporter, stage
from edgeseg.spec import BatchRange, InputSpec, PipelineSpec
from edgeseg.store.cache import cached_folder, software
from edgeseg.store.documents import read_json, write_json
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

if TYPE_CHECKING:
    import torch  # noqa: TID251  # the type only

    from edgeseg.convert.export import ConversionReport
    from edgeseg.convert.loaded import LoadedModel
    from edgeseg.pipeline.request import BuildRequest

EXPORT_FOLDER = "export"
"""Of a graph that cannot be found again, inside the engine folder in the making."""


FEW_COLLECTIONS = (200_000, 30, 30)


@contextmanager
def few_collections() -> Iterator[None]:
    """Let Python look for garbage less often while it lasts.

    torch, torchvision and timm leave half a million objects that stay; walked again and again, they took an eighth of a build.
    """
    before = gc.get_threshold()
    gc.set_threshold(*FEW_COLLECTIONS)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def load_stage(request: BuildRequest, model: torch.nn.Module | None, reporter: Reporter) -> LoadedModel:
    """Load the model and tell the user all that was assumed on the way."""
    images = functools.partial(sample_images, request)
    with stage(reporter, "load") as said:
        if model is None:
            from edgeseg.convert.load import load_model

            loaded = load_model(request.model, images)
        else:
            from edgeseg.convert.load import wrap_module

            loaded = wrap_module(model, request.model, images, request.size)
        said.append(
            f"{loaded.model.display_name}, {counted(loaded.model.classes, 'class', 'classes')}, {loaded.weights}"
        )
    loaded = fitted(request, loaded)
    if loaded.trained is not None and request.precision != "int8":
        note = f"its fake-quantizers are off for {request.precision}: int8 takes their scales"
        loaded = dataclasses.replace(loaded.in_float(), notes=(*loaded.notes, note))
    for note in loaded.notes:
        reporter.note(note)
    return loaded


def fitted(request: BuildRequest, loaded: LoadedModel) -> LoadedModel:
    """Settle how the preprocessing saved with the model brings images to the engine; the user's size and fit win.

    Raises:
        SpecError: the preprocessing has a transform that no engine can hold, and no option takes its place.
    """
    saved = loaded.saved
    if saved is None:
        return loaded
    saved.require_fit({name for name in ("mean", "std", "size", "fit") if getattr(request, name) is not None})
    channels = loaded.model.in_channels
    shapes = ((image.shape[0], image.shape[1]) for image in sample_images(request, channels))
    fitting = saved.fitting(request.size, request.fit, shapes, channels)
    notes = fitting.notes
    if request.dynamic_size and saved.scaling is not None:
        notes = (*notes, f"--dynamic-size overrides the saved {saved.scaling.words}: images keep their own scale")
    return dataclasses.replace(
        loaded,
        size=fitting.size or loaded.size,
        fitting=fitting,
        notes=tuple(dict.fromkeys((*loaded.notes, *notes))),
    )


def pipeline_spec(request: BuildRequest, loaded: LoadedModel, reporter: Reporter) -> PipelineSpec:
    """Join what was asked for and what the model needs into the one contract."""
    height, width = request.size or loaded.size
    try:
        loaded.check_size(height, width)
    except SpecError as exc:
        if request.size is None and loaded.fitting.size is not None:
            raise SpecError(f"{exc} with --size: {height}x{width} is of {CONFIG_NAME}") from exc
        raise
    if loaded.fixed_batch is not None and request.batch != BatchRange(*(loaded.fixed_batch,) * 3):
        only = counted(loaded.fixed_batch, "image")
        raise SpecError(
            f"{loaded.model.display_name} was exported for {only} at a time, not {request.batch}; give --batch "
            f"{loaded.fixed_batch}, or export it with a dynamic batch"
        )
    stride, min_size = loaded.stride, None
    if request.dynamic_size:
        from edgeseg.convert.dynamic_size import dynamic_sizes

        with stage(reporter, "sizes") as said:
            sizes = dynamic_sizes(loaded, height, width)
            stride, min_size = sizes.stride, sizes.min_size
            said.append(f"multiples of {stride}, from {min_size[0]}x{min_size[1]}")
        for note in sizes.notes:
            reporter.note(note)
    return PipelineSpec(
        model=loaded.model,
        input=InputSpec(
            height=height,
            width=width,
            channels=loaded.model.in_channels,
            batch=request.batch,
            stride=stride,
            dynamic_size=request.dynamic_size,
            min_size=min_size,
            fit=request.fit or loaded.fitting.fit or "resize",
            interpolation=loaded.fitting.interpolation,
            padding=loaded.fitting.padding,
            dtype=request.input_dtype,
        ),
        preprocess=loaded.preprocess,
        output=request.output,
    )


def export_stage(
    loaded: LoadedModel, spec: PipelineSpec, scratch: Path, reporter: Reporter
) -> tuple[OnnxGraph, ConversionReport]:
    """Export, simplify and check the fp32 graph, or find it in the cache.

    Only a model that edgeseg built is found again: a user's module computes what its code says, which no key knows. Its
    graph is made in ``scratch``.
    """
    from edgeseg.convert.export import ConversionReport, export_onnx
    from edgeseg.convert.loaded import hash_structure
    from edgeseg.convert.reparameterize import merge_branches

    def make(folder: Path) -> None:
        # The merged module is only what is exported; the verification compares with the one that was loaded.
        side = loaded.fixed_size[0] if loaded.fixed_size else max(spec.input.height, spec.input.width)
        module, saved = loaded.module, 0
        if loaded.trained is None:
            module, saved = merge_branches(loaded.module, spec.input.channels, side)
        _, report = export_onnx(dataclasses.replace(loaded, module=module), spec, folder / GRAPH_NAME)
        write_json(folder / "report.json", dataclasses.replace(report, layers_merged=saved))

    with stage(reporter, "export") as said:
        if loaded.users_module:
            folder, reused = scratch / EXPORT_FOLDER, False
            folder.mkdir()
            make(folder)
        else:
            inputs = {
                "weights": loaded.weights_sha256,
                "structure": hash_structure(loaded.module),
                "spec": spec,
                "software": software(),
            }
            folder, reused = cached_folder("export", inputs, make)
        report = read_json(folder / "report.json", ConversionReport, "conversion report")
        graph = OnnxGraph(folder / GRAPH_NAME, sha256_file(folder / GRAPH_NAME), "fp32", spec, loaded.weights_sha256)
        said.append(
            f"{report.nodes_exported} -> {report.nodes} nodes, {report.macs_exported / 1e9:.2f} -> "
            f"{report.macs / 1e9:.2f} GMAC, mask agreement with {loaded.reference} {report.mask_agreement:.6f}"
        )
        if reused:
            said.append("reused")
    if report.layers_merged:
        reporter.note(f"the encoder's training branches were merged: {report.layers_merged} layers fewer, same results")
    return graph, report


def read_marks(exported: OnnxGraph) -> Marks:
    """The fake-quantizers that :func:`export_stage` found in a module."""
    from edgeseg.convert.export import MARKS_NAME

    return read_json(exported.path.with_name(MARKS_NAME), Marks, "list of fake-quantizers")
