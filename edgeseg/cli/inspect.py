"""``edgeseg inspect``: what an engine folder holds, whether it is intact, and what runs in which precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeseg.cli.output import print_json, result_console
from edgeseg.cli.parameters import ENGINE
from edgeseg.errors import ArtifactError
from edgeseg.evaluate.summary import (
    class_table,
    fit_words,
    noise_lines,
    precision_line,
    repair_table,
    repairs_line,
    time_line,
    verification_table,
)
from edgeseg.evaluate.tables import MISSING, FigureTable, counted
from edgeseg.graph.modules import module_group, module_of
from edgeseg.store.engine import Engine, open_engine
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import Manifest

if TYPE_CHECKING:
    import onnx
    from rich.console import Group, RenderableType

# Operators that compute in integers whatever their output is called.
_INTEGER_OPS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention")


@dataclass(frozen=True)
class CheckedFile:
    """A file whose size and SHA-256 are those of the manifest."""

    role: str
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Layer:
    """One node of the executed graph.

    Attributes:
        name: of the node.
        module: the SMP module it came from (``encoder.layer3.0.conv1``), ``""`` for what edgeseg or the runtime added.
        op: operator.
        dtype: what it computes in (``int8``, ``fp32``, ...), ``None`` when the file does not tell.
        macs: multiply-accumulates of one image, 0 for nodes without any; ``None`` when the file has no shapes to count
            them from.
    """

    name: str
    module: str
    op: str
    dtype: str | None
    macs: int | None


@dataclass(frozen=True)
class EngineReport:
    """What :func:`inspect_engine` found.

    Attributes:
        folder: where.
        manifest: its content.
        files: every file it lists, checked.
        layers: nodes in execution order; ``None`` when they cannot be listed.
        layers_of: which file ``layers`` describes, or why there are none.
    """

    folder: str
    manifest: Manifest
    files: tuple[CheckedFile, ...]
    layers: tuple[Layer, ...] | None
    layers_of: str


def inspect_engine(folder: Path) -> EngineReport:
    """Read an engine folder and check every hash. Needs no backend; layers are listed when ``onnx`` is installed.

    Raises:
        ArtifactError: no engine folder, a damaged one, or one of a newer schema; says which file.
    """
    engine = open_engine(folder)
    layers, layers_of = _layers(engine)
    return EngineReport(str(folder), engine.manifest, tuple(_files(engine.manifest)), layers, layers_of)


def _files(manifest: Manifest) -> Iterable[CheckedFile]:
    listed: tuple[tuple[str, FileRef | None], ...] = (
        ("engine", manifest.engine),
        ("portable graph", manifest.graph),
        *(("candidate graph", ref) for ref in manifest.candidate_graphs),
        ("calibration table", manifest.calibration),
        *(("engine data", ref) for ref in manifest.extra_files),
    )
    for role, ref in listed:
        if ref is not None:
            yield CheckedFile(role, ref.name, ref.size_bytes, ref.sha256)


def _layers(engine: Engine) -> tuple[tuple[Layer, ...] | None, str]:
    executed = engine.manifest.engine
    path = engine.folder / executed.name if executed is not None and executed.name.endswith(".onnx") else None
    try:
        if path is not None:
            return read_layers(path), f"{path.name}, the graph {engine.manifest.target} executes"
        layers = read_layers(engine.graph_path)
    except ImportError:
        return None, "onnx is not installed: pip install 'edgeseg[onnxruntime]' to list layers"
    return layers, f"{engine.graph_path.name}, the portable graph ({engine.manifest.target} fuses it further)"


def read_layers(path: Path) -> tuple[Layer, ...]:
    """List the nodes of an ONNX file, one that ONNX Runtime optimized too.

    Raises:
        ArtifactError: not an ONNX file.
        ImportError: ``onnx`` is not installed.
    """
    from edgeseg.graph.macs import count_macs
    from edgeseg.store.onnx_file import parse_onnx

    model = parse_onnx(path, "build the engine again")
    names = (name for node in model.graph.node for name in (node.name, node.op_type, *node.input, *node.output))
    if not all(isinstance(name, str) for name in names):
        # protobuf gives bytes for a string that is no UTF-8.
        raise ArtifactError(f"{path} is damaged: a name in it is not text; build the engine again")
    try:
        macs = count_macs(model)
    except ArtifactError:
        # A dynamic size has no one number of multiply-accumulates, a graph without its shapes none at all.
        macs = {}
    types = _tensor_types(model)
    # What ONNX Runtime saves knows no shapes for its own operators: nothing could be counted, which is not zero.
    uncounted = 0 if macs else None
    return tuple(
        Layer(node.name, module_of(node.name), node.op_type, _dtype(node, types), macs.get(node.name, uncounted))
        for node in model.graph.node
    )


def _tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    types = {v.name: int(v.type.tensor_type.elem_type) for v in (*graph.value_info, *graph.input, *graph.output)}
    types.update({t.name: int(t.data_type) for t in graph.initializer})
    return types


def _dtype(node: onnx.NodeProto, types: dict[str, int]) -> str | None:
    import onnx

    from edgeseg.graph.types import FLOATS

    if node.op_type.startswith(_INTEGER_OPS):
        return "int8"
    names = {
        **FLOATS,
        onnx.TensorProto.INT8: "int8",
        onnx.TensorProto.UINT8: "int8",
        onnx.TensorProto.INT32: "int32",
        onnx.TensorProto.INT64: "int64",
    }
    # What goes in decides: an ArgMax of floats is float work though int64 comes out.
    for name in (*node.input[:1], *node.output[:1]):
        if types.get(name) in names:
            return names[types[name]]
    return None


def render(report: EngineReport, *, layers: bool = False) -> Group:
    """The report for a terminal."""
    from rich.console import Group
    from rich.text import Text

    manifest = report.manifest
    parts: list[RenderableType] = [_spec_table(manifest), _file_table(report.files)]
    parts.append(Text(precision_line(manifest.precision)))
    if (time := time_line(manifest.precision)) is not None:
        parts.append(Text(time))
    parts.extend(Text(f"  float: {name}: {why}", style="dim") for name, why in manifest.precision.float_layers.items())
    if manifest.repairs:
        parts.append(repair_table(manifest.repairs))
        parts.append(Text(repairs_line(manifest.repairs), style="dim"))
    if manifest.verification is not None:
        parts.append(verification_table(manifest.verification, manifest.name))
        parts += [Text(line, style="yellow") for line in noise_lines(manifest.verification)]
        parts.append(Text(f"measured on {manifest.verification.data}", style="dim"))
        classes = class_table(manifest.verification, manifest.spec.model.class_names)
        parts.extend([classes] if classes is not None else [])
    else:
        parts.append(Text("not verified against PyTorch on this device"))
    if report.layers is None:
        parts.append(Text(report.layers_of))
    else:
        parts.append(_layer_table(report.layers) if layers else _module_table(report.layers))
        parts.append(Text(f"layers of {report.layers_of}", style="dim"))
    parts.extend(Text(f"note: {note}", style="dim") for note in manifest.notes)
    return Group(*parts)


def _spec_table(manifest: Manifest) -> FigureTable:
    spec, preprocess = manifest.spec, manifest.spec.preprocess
    size = f"{spec.input.height}x{spec.input.width}"
    dynamic = f" or any multiple of {spec.input.stride}" if spec.input.dynamic_size else ""
    image = f"{spec.input.dtype} ({spec.input.batch}, {size}{dynamic}, {spec.input.channels})"
    output = f"{spec.output.kind}{', confidence' if spec.output.confidence else ''}"
    table = FigureTable((("", "words"), ("", "words")), has_header=False)
    for name, value in (
        ("engine", f"{manifest.name}: {manifest.precision.requested} for {manifest.target}"),
        ("scheme", manifest.scheme or MISSING),
        ("model", f"{spec.model.display_name}, {counted(spec.model.classes, 'class', 'classes')}, {spec.model.task}"),
        ("classes", ", ".join(spec.model.class_names) or MISSING),
        ("weights", manifest.weights),
        ("licence", (manifest.origin and manifest.origin.licence_words) or MISSING),
        ("input", f"image {image}, others {fit_words(spec.input)}"),
        (
            "normalization",
            f"mean {_numbers(preprocess.mean)} std {_numbers(preprocess.std)}, {preprocess.channel_order}",
        ),
        ("", f"scale {preprocess.scale:.6g} ({preprocess.source})"),
        *([] if preprocess.clip is None else [("", "clipped to {:g}..{:g} first".format(*preprocess.clip))]),
        ("output", output),
        ("built on", ", ".join(manifest.device.values()) or MISSING),
        ("built with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or MISSING),
        ("options", ", ".join(f"{name}={value}" for name, value in manifest.options.items()) or MISSING),
        ("edgeseg", manifest.edgeseg_version),
        ("to repeat", manifest.command or MISSING),
    ):
        if value != MISSING:
            table.add(name, value)
    return table


def _file_table(files: Sequence[CheckedFile]) -> FigureTable:
    table = FigureTable((("file", "name"), ("what", "words"), ("bytes", "figure"), ("SHA-256 (checked)", "words")))
    for file in files:
        table.add(file.name, file.role, f"{file.size_bytes:,}", file.sha256[:16])
    return table


def _layer_table(layers: Sequence[Layer]) -> FigureTable:
    table = FigureTable((("layer", "name"), ("op", "words"), ("dtype", "words"), ("MMAC", "figure")))
    for layer in layers:
        table.add(layer.name, layer.op, layer.dtype or MISSING, f"{layer.macs / 1e6:.2f}" if layer.macs else "")
    return table


def _module_table(layers: Sequence[Layer]) -> FigureTable:
    """A line per module, as ``bench --profile`` groups them: ``encoder.layer3``, ``decoder.p4``, ``segmentation_head``."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(module_group(layer.name) or "(around the network)", []).append(layer)
    total = sum(layer.macs or 0 for layer in layers)
    table = FigureTable(
        (("module", "name"), ("nodes", "figure"), ("MMAC", "figure"), ("share", "figure"), ("dtypes", "words"))
    )
    for name, members in groups.items():
        macs = sum(layer.macs or 0 for layer in members)
        counts = Counter(layer.dtype or MISSING for layer in members)
        listed = ", ".join(f"{dtype} {count}" for dtype, count in counts.most_common())
        figures = (f"{macs / 1e6:.1f}", f"{macs / total:.1%}") if total else (MISSING, MISSING)
        table.add(name, str(len(members)), *figures, listed)
    return table


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


@click.command("inspect", short_help="Show what an engine folder holds and check its hashes.")
@click.argument("folder", type=ENGINE, metavar="ENGINE_DIR")
@click.option("--layers", is_flag=True, help="List every layer of the executed graph.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(folder: Path, layers: bool, as_json: bool) -> None:
    """Show what ENGINE_DIR holds, check its hashes, and list what runs in which precision."""

    report = inspect_engine(folder)
    if as_json:
        print_json(report)
    else:
        result_console().print(render(report, layers=layers))
