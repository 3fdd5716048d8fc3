"""PyTorch model -> the portable fp32 ONNX graph: uint8 image in, mask out, checked against PyTorch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgeseg.artifacts import OnnxGraph, sha256_file
from edgeseg.convert.heads import LOGITS, Pipeline
from edgeseg.convert.macs import count_macs
from edgeseg.convert.naming import name_by_scope
from edgeseg.convert.parity import Parity, compare, make_probe_images, ort_session, run_session, torch_outputs
from edgeseg.convert.silence import silenced
from edgeseg.convert.simplify import simplify
from edgeseg.convert.translations import TRANSLATIONS
from edgeseg.errors import EdgesegError, ExportError, SpecError
from edgeseg.onnx_file import first_line, write_onnx
from edgeseg.spec import InputSpec, PipelineSpec

if TYPE_CHECKING:
    from edgeseg.convert.load import LoadedModel

OPSET = 20


@dataclass(frozen=True)
class ConversionReport:
    """What conversion did.

    Attributes:
        nodes_exported, macs_exported: of the graph as torch exported it (multiply-accumulates of one image).
        nodes, macs: of the portable graph.
        rewrites: times each rewrite applied.
        max_abs_error: largest difference of a logit from PyTorch's, on the probe images.
        mask_agreement: share of mask pixels equal to PyTorch's, ties aside.
        seconds: wall time of the whole conversion.
    """

    nodes_exported: int
    nodes: int
    macs_exported: int
    macs: int
    rewrites: dict[str, int]
    max_abs_error: float
    mask_agreement: float
    seconds: float


def export_onnx(
    loaded: LoadedModel, spec: PipelineSpec, path: Path, probe_images: NDArray[np.uint8] | None = None
) -> tuple[OnnxGraph, ConversionReport]:
    """Export ``loaded`` as one self-contained ONNX file that fulfils ``spec``, and check it against PyTorch.

    Args:
        loaded: the model, eval, float32.
        spec: its input, preprocessing and output contract.
        path: file to write, atomically; nothing is left there on failure.
        probe_images: uint8 ``(N, H, W, C)`` images to compare on; ``None`` for generated ones.

    Raises:
        SpecError: a size, activation or output the model cannot have.
        ExportError: torch could not export it, or the graph does not compute what the model computes.
    """
    start = time.monotonic()
    pipeline = Pipeline(loaded.module, spec).eval()
    images = make_probe_images(spec.input) if probe_images is None else probe_images
    reference = _reference(pipeline, images, spec)
    exported = export_graph(pipeline, spec)
    model, applied = simplify(exported)
    parity = check(model, spec, images, reference)
    delivered = without_extra_logits(model, spec)
    write_onnx(delivered, path)
    size = {"batch": 1, "height": spec.input.height, "width": spec.input.width}
    report = ConversionReport(
        nodes_exported=len(exported.graph.node),
        nodes=len(delivered.graph.node),
        macs_exported=sum(count_macs(exported, size).values()),
        macs=sum(count_macs(delivered, size).values()),
        rewrites=applied,
        max_abs_error=parity.max_abs_error,
        mask_agreement=parity.mask_agreement,
        seconds=time.monotonic() - start,
    )
    graph = OnnxGraph(path, sha256_file(path), "fp32", spec, loaded.weights_sha256)
    return graph, report


def _reference(pipeline: Pipeline, images: NDArray[np.uint8], spec: PipelineSpec) -> list[dict[str, NDArray[Any]]]:
    # Eagerly first: SMP checks the size only when not tracing, and an exported graph of a wrong size is silently wrong.
    try:
        return [torch_outputs(pipeline, images[i : i + 1]) for i in range(len(images))]
    except Exception as exc:
        size = f"{spec.input.height}x{spec.input.width}"
        raise SpecError(f"the model does not take a {size} image of {spec.input.channels} channels: {first_line(exc)}") from exc


def export_graph(pipeline: Pipeline, spec: PipelineSpec) -> onnx.ModelProto:
    """Export with torch's dynamo exporter; nodes named after their modules. Raises :class:`ExportError`."""
    batch = max(spec.input.batch.optimum, 2) if spec.input.batch.is_dynamic else spec.input.batch.optimum
    image = torch.from_numpy(make_probe_images(spec.input, count=batch))
    try:
        with silenced(), torch.inference_mode():
            names = list(pipeline(image))
            program = torch.onnx.export(
                pipeline,
                (image,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_shapes=_dynamic_shapes(spec.input),
                custom_translation_table=dict(TRANSLATIONS),
                verbose=False,
            )
        assert program is not None
        name_by_scope(program.model)
        return ir.serde.serialize_model(program.model)
    except EdgesegError:
        raise
    except Exception as exc:
        dynamic = " with dynamic shapes; try static ones" if _dynamic_shapes(spec.input) else ""
        raise ExportError(f"torch cannot export {spec.model.display_name}{dynamic}: {first_line(exc)}") from exc


def _dynamic_shapes(spec: InputSpec) -> dict[str, dict[int, Any]] | None:
    axes: dict[int, Any] = {}
    if spec.batch.is_dynamic:
        axes[0] = torch.export.Dim("batch", min=1, max=max(spec.batch.maximum, 2))
    if spec.dynamic_size:
        axes[1] = spec.stride * torch.export.Dim("height_strides")
        axes[2] = spec.stride * torch.export.Dim("width_strides")
    return {"image": axes} if axes else None


def check(
    model: onnx.ModelProto, spec: PipelineSpec, images: NDArray[np.uint8], reference: list[dict[str, NDArray[Any]]]
) -> Parity:
    """Compare ``model`` (``logits`` among its outputs) with PyTorch's outputs. Raises :class:`ExportError`."""
    session = ort_session(model)
    batch = 1 if spec.input.batch.is_dynamic else spec.input.batch.optimum
    actual = []
    for i in range(len(images)):
        outputs = run_session(session, np.repeat(images[i : i + 1], batch, axis=0))
        actual.append({name: value[:1] for name, value in outputs.items()})
    return compare(spec, reference, actual)


def without_extra_logits(model: onnx.ModelProto, spec: PipelineSpec) -> onnx.ModelProto:
    """Drop the ``logits`` output that only the check needed."""
    if spec.output.kind == LOGITS:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept = [o for o in result.graph.output if o.name != LOGITS]
    logits = next(o for o in result.graph.output if o.name == LOGITS)
    result.graph.value_info.append(logits)
    del result.graph.output[:]
    result.graph.output.extend(kept)
    return result
