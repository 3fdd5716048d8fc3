"""What goes into a loaded engine and what comes out, compared with what its manifest says of it.

A manifest is a text file: edited, or beside the engine of another build, it would give results another meaning. So every
backend asks, when it has loaded an engine, whether it is one of the contract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from edgeseg.errors import ArtifactError, InputError
from edgeseg.spec import PipelineSpec

if TYPE_CHECKING:
    import onnx

Extent: TypeAlias = "tuple[int, int | None]"
"""Smallest and largest size of a dimension an engine says it takes; ``None``: it sets no limit."""

ANY: Extent = (0, None)

AUXILIARY = "aux_logits"
"""A second output a model may have; nothing else depends on it."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a loaded engine.

    Attributes:
        name: of the tensor.
        dtype: numpy's name.
        shape: of each dimension; ``None`` where the backend does not tell how many there are.
    """

    name: str
    dtype: str
    shape: tuple[Extent, ...] | None

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is one of these."""
        return self.shape is None or (
            len(shape) == len(self.shape)
            and all(low <= n and (high is None or n <= high) for n, (low, high) in zip(shape, self.shape, strict=True))
        )

    def refusal(self, dtype: np.dtype[Any], shape: Sequence[int]) -> InputError | None:
        """Why images are none of these; ``None`` where they are."""
        if dtype == self.dtype and self.takes(shape):
            return None
        return InputError(f"images are {dtype} {shape}, this engine takes {self.kind}")

    def size_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of one of this shape."""
        return math.prod(shape) * np.dtype(self.dtype).itemsize

    @property
    def kind(self) -> str:
        """``uint8 (1..8, 256, 256, 3)``."""
        sizes = [_text(extent) for extent in self.shape] if self.shape is not None else ["..."]
        return f"{self.dtype} ({', '.join(sizes)})"

    def __str__(self) -> str:
        return f"{self.name} {self.kind}"


def check_signature(
    inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], spec: PipelineSpec, *, has_uint16: bool = True
) -> None:
    """Raise :class:`ArtifactError` unless the engine takes and gives what ``spec`` says.

    Args:
        inputs: of the engine.
        outputs: of the engine.
        spec: of its manifest.
        has_uint16: the backend has 16-bit integers; else it takes float32 and gives wider integers in their place.
    """
    image = expected_image(spec, has_uint16=has_uint16)
    if len(inputs) != 1:
        raise _other("inputs", inputs, [image])
    if not _fits(inputs[0], image):
        raise _other("input", inputs, [image])
    expected = expected_outputs(spec, has_uint16=has_uint16)
    by_name = {tensor.name: tensor for tensor in outputs}
    if set(by_name) - {AUXILIARY} != {tensor.name for tensor in expected}:
        raise _other("outputs", outputs, expected)
    if AUXILIARY in by_name:
        expected.append(TensorInfo(AUXILIARY, "float32", None))
    for tensor in expected:
        has = by_name[tensor.name]
        wide = tensor.dtype == "int32" and has.dtype == "int64"
        if not (_fits(has, tensor) or (wide and _fits(TensorInfo(has.name, tensor.dtype, has.shape), tensor))):
            raise _other("output", [has], [tensor])


def check_graph(path: Path, spec: PipelineSpec) -> None:
    """Raise :class:`ArtifactError` unless a portable graph can be read, and takes and gives what ``spec`` says. Needs onnx."""
    from edgeseg.store.onnx_file import read_onnx

    graph = read_onnx(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [_declared(value) for value in graph.input if value.name not in weights]
    check_signature(inputs, [_declared(value) for value in graph.output], spec)


def _declared(value: onnx.ValueInfoProto) -> TensorInfo:
    import onnx

    tensor = value.type.tensor_type
    # Of what is no tensor, or of a type this onnx does not know, the dtype is one that no contract has.
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    dtype = names.get(tensor.elem_type, f"type {tensor.elem_type}")
    shape = tuple((d.dim_value, d.dim_value) if d.HasField("dim_value") else ANY for d in tensor.shape.dim)
    return TensorInfo(value.name, {"float": "float32"}.get(dtype, dtype), shape if tensor.HasField("shape") else None)


def expected_image(spec: PipelineSpec, *, has_uint16: bool = True) -> TensorInfo:
    """The image input of the contract; of a backend without 16-bit integers uint16 is float32, which holds every value."""
    size = spec.input
    sides: tuple[Extent, Extent] = ((size.height, size.height), (size.width, size.width))
    if size.dynamic_size:
        low, high = size.min_size or (size.height, size.width), size.max_size or (size.height, size.width)
        sides = ((low[0], high[0]), (low[1], high[1]))
    dtype = "float32" if size.dtype == "uint16" and not has_uint16 else size.dtype
    return TensorInfo("image", dtype, (_batch(spec), *sides, (size.channels, size.channels)))


def expected_outputs(spec: PipelineSpec, *, has_uint16: bool = True) -> list[TensorInfo]:
    """The outputs of the contract, without the auxiliary one; of a backend without 16-bit integers uint16 is int32."""
    _, height, width, _ = expected_image(spec).shape or ()
    classes: Extent = (spec.model.classes, spec.model.classes)
    per_class = (_batch(spec), classes, height, width)
    per_pixel = per_class if spec.model.task == "multilabel" else (_batch(spec), height, width)
    kind = spec.output.kind
    mask_dtype = "int32" if spec.mask_dtype == "uint16" and not has_uint16 else spec.mask_dtype
    first = TensorInfo(kind, mask_dtype, per_pixel) if kind == "mask" else TensorInfo(kind, "float32", per_class)
    return [first, TensorInfo("confidence", "float32", per_pixel)] if spec.output.confidence else [first]


def _batch(spec: PipelineSpec) -> Extent:
    return (spec.input.batch.minimum, spec.input.batch.maximum)


def _fits(has: TensorInfo, wanted: TensorInfo) -> bool:
    """Whether the engine's tensor can be what is wanted, sizes it leaves open included."""
    if (has.name, has.dtype) != (wanted.name, wanted.dtype):
        return False
    if has.shape is None or wanted.shape is None:
        return True
    return len(has.shape) == len(wanted.shape) and all(
        low <= (least or 0) and (high is None or high >= (most or 0))
        for (low, high), (least, most) in zip(has.shape, wanted.shape, strict=True)
    )


def _other(what: str, has: Sequence[TensorInfo], wanted: Sequence[TensorInfo]) -> ArtifactError:
    return ArtifactError(
        f"the engine's {what} {_listed(has)}, its manifest says {_listed(wanted, bare=True)}: edited, or of another "
        "engine; build it again"
    )


def _listed(tensors: Sequence[TensorInfo], *, bare: bool = False) -> str:
    words = ", ".join(map(str, tensors)) or "nothing"
    return words if bare else f"{'are' if len(tensors) != 1 else 'is'} {words}"


def _text(extent: Extent) -> str:
    low, high = extent
    if high is None:
        return "any"
    return str(low) if low == high else f"{low}..{high}"
