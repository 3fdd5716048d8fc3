"""PyTorch model -> the portable fp32 ONNX graph: image in, mask out, checked against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgeseg.convert.dynamic_size import constant_same_padding, pads_by_size
from edgeseg.convert.evidence import normalized
from edgeseg.convert.fake_quantizers import mode
from edgeseg.convert.geometry import first_of, larger_size, run_raw
from edgeseg.convert.heads import LOGITS, Pipeline
from edgeseg.convert.loaded import LoadedModel
from edgeseg.convert.marks import drop_marks, take_marks
from edgeseg.convert.naming import name_by_scope, name_dynamic_axes
from edgeseg.convert.onnx_network import OnnxNetwork
from edgeseg.convert.onnx_reading import OPSET
from edgeseg.convert.parity import RELATIVE_TOLERANCE, compare, make_probe_images, torch_outputs
from edgeseg.convert.simplify import simplify
from edgeseg.convert.small_terms import hide_small_terms, show_small_terms
from edgeseg.convert.strides import AXES, as_image, given_in_strides, in_strides
from edgeseg.convert.translations import TRANSLATIONS, FloatBounds
from edgeseg.errors import EdgesegError, ExportError, SpecError, first_line
from edgeseg.graph.proto import copied, refill
from edgeseg.graph.running import GraphSession
from edgeseg.graph.types import graph_macs
from edgeseg.silence import silenced
from edgeseg.spec import InputSpec, PipelineSpec
from edgeseg.store.documents import write_json
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import write_onnx

MARKS_NAME = "marks.json"
"""Beside the graph of a module with fake-quantizers: where they stand, :class:`~edgeseg.graph.grid.Marks`."""


@dataclass(frozen=True)
class ConversionReport:
    """What conversion did.

    Attributes:
        nodes_exported, macs_exported: of the graph as torch exported it; multiply-accumulates of one image.
        nodes, macs: of the portable graph.
        rewrites: how often each rewrite applied.
        max_abs_error: largest difference of a logit from PyTorch's, on the probe images.
        mask_agreement: share of mask pixels equal to PyTorch's, ties aside.
        seconds: wall time of the whole conversion.
        layers_merged: how many layers fewer the network has since its training branches were merged.
    """

    nodes_exported: int
    nodes: int
    macs_exported: int
    macs: int
    rewrites: dict[str, int]
    max_abs_error: float
    mask_agreement: float
    seconds: float
    layers_merged: int = 0


def export_onnx(loaded: LoadedModel, spec: PipelineSpec, path: Path) -> tuple[OnnxGraph, ConversionReport]:
    """Export ``loaded`` as one self-contained ONNX file that fulfils ``spec``, and check it against PyTorch.

    The same model and spec give the same bytes.

    Args:
        loaded: the model, evaluation mode, float32.
        spec: its input, preprocessing and output contract.
        path: file to write, atomically; nothing appears there on failure. Of a module with fake-quantizers the graph is
            float with the weights they rounded, and :data:`MARKS_NAME` is written beside it.

    Raises:
        SpecError: a size, activation or output the model cannot have.
        ExportError: torch could not export it, or the graph does not compute what the model computes.
        ArtifactError: the file cannot be written.
    """
    start = time.monotonic()
    pipeline = Pipeline(loaded.module, spec).eval()
    probes = _probes(spec)
    # Rounding of activations is not of the float graph; their places are. Weights are what they were rounded to.
    with mode(pipeline, "weights"):
        reference = [_reference(pipeline, image, spec) for image in probes]
    if spec.input.dynamic_size:
        module = constant_same_padding(loaded.module, spec.input.channels, spec.input.stride)
        pipeline = Pipeline(module, spec).eval()
    with mode(pipeline, "marked"):
        exported = export_graph(pipeline, spec)
    if loaded.trained is None:
        model, applied = simplify(exported)
    else:
        exported, kept = take_marks(exported)
        model, applied = simplify(exported, keeps_weights=True)
        model, marks = drop_marks(model, kept, loaded.trained.tools)
        write_json(path.with_name(MARKS_NAME), marks)
    try:
        session = GraphSession(model, "the exported graph", ExportError, optimized=True)
        parity = compare(reference, [session.run(images) for images in probes], loaded.reference)
    except ExportError as exc:
        own = max(rounding_error(loaded, images) for images in probes)
        # Two float32 computations differ by up to the sum of what each is off.
        if 2 * own > RELATIVE_TOLERANCE:
            raise ExportError(
                f"{spec.model.display_name} with {loaded.weights} cannot be compared: PyTorch's own float32 logits are {own:.2g} "
                f"of their range off its float64 ones (engines may be {RELATIVE_TOLERANCE:g} off PyTorch), for this network "
                "amplifies rounding; with trained weights it should not"
            ) from exc
        if spec.input.dynamic_size and _holds_at_own_size(reference, probes, model, spec):
            raise ExportError(
                f"{spec.model.display_name} can only be exported for {spec.input.height}x{spec.input.width}: torch.export "
                "fixes a size in its forward (torch.linspace's, say; torch.arange keeps it); build it without --dynamic-size"
            ) from exc
        raise
    delivered = without_extra_logits(model, spec)
    write_onnx(delivered, path)
    report = ConversionReport(
        nodes_exported=len(exported.graph.node),
        nodes=len(delivered.graph.node),
        macs_exported=sum(graph_macs(exported, spec.input).values()),
        macs=sum(graph_macs(delivered, spec.input).values()),
        rewrites=applied,
        max_abs_error=parity.max_abs_error,
        mask_agreement=parity.mask_agreement,
        seconds=time.monotonic() - start,
    )
    return OnnxGraph(path, sha256_file(path), "fp32", spec, loaded.weights_sha256), report


def _probes(pipeline: PipelineSpec) -> list[NDArray[Any]]:
    """Batches to compare on: each image alone; then what is dynamic, put to the test."""
    spec = pipeline.input
    make = partial(make_probe_images, channels=spec.channels, preprocess=pipeline.preprocess, dtype=spec.dtype)
    images = make(spec.height, spec.width)
    static = 1 if spec.batch.is_dynamic else spec.batch.optimum
    probes = [np.repeat(images[i : i + 1], static, axis=0) for i in range(len(images))]
    if spec.batch.is_dynamic:
        probes.append(np.concatenate([images[:1], images[-1:]])[: spec.batch.maximum])
    if spec.dynamic_size:
        height, width = (_another(v, spec, i) for i, v in enumerate((spec.height, spec.width)))
        for size in {(height, width), spec.min_size or (height, width)}:
            other = make(*size, count=1, seed=1)
            probes.append(np.repeat(other, static, axis=0))
    return probes


def _holds_at_own_size(
    reference: Sequence[Mapping[str, NDArray[Any]]],
    probes: Sequence[NDArray[Any]],
    model: onnx.ModelProto,
    spec: PipelineSpec,
) -> bool:
    """Whether the graph computes what PyTorch does on the probes of the size it was exported at."""
    own = [i for i, images in enumerate(probes) if images.shape[1:3] == (spec.input.height, spec.input.width)]
    session = GraphSession(model, "the exported graph", ExportError, optimized=True)
    try:
        compare([reference[i] for i in own], [session.run(probes[i]) for i in own], "PyTorch")
    except ExportError:
        return False
    return True


def _another(value: int, spec: InputSpec, axis: int) -> int:
    """A second size along ``axis`` that a dynamic graph must take; grown by unequal steps for height and width."""
    larger = value + (axis + 1) * spec.stride
    fits = spec.max_size is None or larger <= spec.max_size[axis]
    return larger if fits else max(spec.stride, spec.min_size[axis] if spec.min_size else value - spec.stride)


def _reference(pipeline: Pipeline, images: NDArray[Any], spec: PipelineSpec) -> dict[str, NDArray[Any]]:
    # Eagerly, before tracing: SMP checks sizes only when not tracing, and the graph of a wrong size is silently wrong.
    try:
        return torch_outputs(pipeline, images)
    except Exception as exc:
        _, height, width, channels = images.shape
        what = f"{spec.model.display_name} does not take {height}x{width} images of {channels} channels"

        def runs(height: int, width: int) -> bool:
            return not run_raw(
                pipeline, torch.zeros((1, height, width, channels), dtype=getattr(torch, spec.input.dtype))
            )[1]

        fits = runs(height, width)
        if not fits and (smallest := larger_size(runs, height, width, spec.input.stride)) is not None:
            raise SpecError(f"{what}, it needs at least {smallest[0]}x{smallest[1]}; give that as --size") from exc
        raise SpecError(f"{what}: {first_line(exc)}") from exc


def export_graph(pipeline: Pipeline, spec: PipelineSpec) -> onnx.ModelProto:
    """Export with torch's dynamo exporter; nodes named after their modules. Raises :class:`ExportError`."""
    # Only where it is needed: other graphs take sizes from the maps at hand, in fewer nodes.
    by_strides = spec.input.dynamic_size and pads_by_size(pipeline.model, spec.input)
    shapes = _dynamic_shapes(spec.input, by_strides)
    # torch.export takes a dimension of size 1 for a constant
    batch = max(spec.input.batch.optimum, 2) if spec.input.batch.is_dynamic else spec.input.batch.optimum
    shape: tuple[int, ...] = (batch, spec.input.height, spec.input.width, spec.input.channels)
    if by_strides:
        shape = in_strides(shape, spec.input.stride)
    image = torch.zeros(shape, dtype=getattr(torch, spec.input.dtype))
    try:
        strides = given_in_strides(pipeline) if by_strides else contextlib.nullcontext()
        with silenced(), torch.inference_mode(), FloatBounds(), strides:
            names = list(pipeline(image))
            program = torch.onnx.export(
                pipeline,
                (image,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_shapes=shapes,
                custom_translation_table=dict(TRANSLATIONS),
                verbose=False,
                optimize=False,
            )
            assert program is not None
            # Optimized here: the exporter's optimizer must not see what it would leave out.
            hide_small_terms(program.model)
            program.optimize()
            show_small_terms(program.model)
            # Of one tensor returned twice (probabilities of a module that returns them) the exporter names only the last.
            for value, name in zip(program.model.graph.outputs, names, strict=True):
                value.name = name
        if by_strides:
            as_image(program.model)
        for part in pipeline.modules():
            if isinstance(part, OnnxNetwork):
                part.inline(program.model)
        name_by_scope(program.model)
        name_dynamic_axes(program.model)
        exported = ir.serde.serialize_model(program.model)
    except EdgesegError:
        raise
    except Exception as exc:
        if depends_on_values(exc):
            raise SpecError(
                f"torch cannot export {spec.model.display_name}: its forward decides by the values of the image (an if, "
                "a loop, .item() or .numpy()), and a graph has one way only; give the network inside it, or write the "
                "choice with torch.where"
            ) from exc
        hint = " with dynamic shapes; try static ones" if shapes else ""
        reason = first_line(exc).partition(". Failure message:")[0]
        if (stopped := _where_stopped(exc)) is not None:
            reason = f"write {stopped} with other operators, its exporter does not take it ({reason})"
        raise ExportError(f"torch cannot export {spec.model.display_name}{hint}: {reason}") from exc
    sizes = exported.graph.input[0].type.tensor_type.shape.dim
    dynamic = ([0] if spec.input.batch.is_dynamic else []) + ([1, 2] if spec.input.dynamic_size else [])
    if fixed := [axis for axis in dynamic if sizes[axis].HasField("dim_value")]:
        # torch.export answers code that branches on a size by fixing the size.
        what = " and ".join(f"{('batch', 'height', 'width')[axis]} {sizes[axis].dim_value}" for axis in fixed)
        raise ExportError(
            f"{spec.model.display_name} can only be exported for {what}: its code depends on the size; build it without "
            f"{'a range of batch sizes' if fixed == [0] else '--dynamic-size'}"
        )
    return exported


def depends_on_values(exc: BaseException) -> bool:
    """Whether tracing stopped because Python asked for a tensor's values."""
    reason: BaseException | None = exc
    while reason is not None:
        if "data-dependent" in str(reason).lower() or "is not supported for tensor subclasses" in str(reason):
            return True
        reason = reason.__cause__ or reason.__context__
    return False


def _where_stopped(exc: BaseException) -> str | None:
    """The operator that the exporter could not translate, and its module: its frames know them, its messages do not."""
    reason: BaseException | None = exc
    while reason is not None:
        for frame, _ in traceback.walk_tb(reason.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, torch.fx.Node) and node.op == "call_function":
                modules = list(node.meta.get("nn_module_stack", {}).values())
                path = modules[-1][0].removeprefix("model") if modules else ""
                return f"{node.target} in {path or 'its forward'}"
        reason = reason.__cause__ or reason.__context__
    return None


def _dynamic_shapes(spec: InputSpec, by_strides: bool) -> dict[str, dict[int, Any]] | None:
    axes: dict[int, Any] = {}
    if spec.batch.is_dynamic:
        axes[0] = torch.export.Dim("batch", min=1, max=max(spec.batch.maximum, 2))
    if spec.dynamic_size:
        if by_strides:  # of a plain Dim torch wants proof for every size that no branch of its own code is left
            axes |= dict.fromkeys(AXES, torch.export.Dim.AUTO)
        else:
            axes[1] = spec.stride * torch.export.Dim("height_strides", min=1, max=4096)
            axes[2] = spec.stride * torch.export.Dim("width_strides", min=1, max=4096)
    return {"image": axes} if axes else None


def without_extra_logits(model: onnx.ModelProto, spec: PipelineSpec) -> onnx.ModelProto:
    """Drop the ``logits`` output that only the check needed."""
    if spec.output.kind == LOGITS:
        return model
    result = copied(model)
    result.graph.value_info.extend(o for o in result.graph.output if o.name == LOGITS)
    refill(result.graph.output, (o for o in result.graph.output if o.name != LOGITS))
    return result


def rounding_error(loaded: LoadedModel, images: NDArray[Any]) -> float:
    """How far PyTorch's float32 logits are from its float64 ones, relative to the largest: what rounding alone does.

    Untrained networks without working normalization amplify it from layer to layer.
    """
    x = normalized(images, loaded.preprocess)
    with silenced(), torch.inference_mode():
        try:
            outputs = [copy.deepcopy(loaded.module).to(dtype)(x.to(dtype)) for dtype in (torch.float32, torch.float64)]
        except RuntimeError:  # a module with constants of its own in float32
            return 0.0
    single, double = map(first_of, outputs)
    return float((single - double).abs().max() / double.abs().max().clamp(min=1.0))
